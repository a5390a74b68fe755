"""`prepare` with curation: raw files to a folder of cleaned documents, and that to tokens with a ledger beside them."""
import json
import shutil
from dataclasses import replace
from pathlib import Path

from megatron_ext.config.schema import Config
from megatron_ext.curate.build import Build, apart, code_sha256, plain_settings, settings_files
from megatron_ext.curate.config import CurateConfig
from megatron_ext.curate.ingest.items import needed
from megatron_ext.curate.ingest.units import fingerprint, list_files
from megatron_ext.curate.manifest import FILE, ORIGIN, Curated, finish
from megatron_ext.data.prepare import prepare
from megatron_ext.data.prepared import Prepared
from megatron_ext.data.progress import Progress
from megatron_ext.errors import UserError


def text_folder(config: Config) -> Path:
    """Where the cleaned documents go."""
    output = Path(config.output or "")
    return Path(config.curate.output) if config.curate.output else output.with_name(f"{output.name}-text")


def curate(settings: CurateConfig, input: str | Path, output: str | Path, progress: bool | None = None) -> Curated:
    """Builds the folder `output` of `input`, goes on with a build that was stopped, or finds it there already.

    Raises:
        UserError: bad input or settings, or an `output` that holds something else. RunFailed: a step that failed.
    """
    needed("datatrove", "curation")
    found = existing(settings, Path(input), Path(output))
    if found is not None:
        return found
    from megatron_ext.curate.executor import run_phases

    build = Build.start(settings, input, output)
    run_phases(build, progress=Progress(progress))
    return finish(build)


def existing(settings: CurateConfig, input: Path, output: Path) -> Curated | None:
    """The complete build at `output`, None where nothing is there. Raises UserError: something else is."""
    if not output.exists() or output.is_dir() and not any(output.iterdir()):
        return None
    if not (output / FILE).exists():
        raise UserError("curate.output", output, "exists and was not made by `prepare`; give another directory or an empty one")
    found = Curated.load(output)
    shutil.rmtree(output.with_name(f"{output.name}.work"), ignore_errors=True)  # of a build that was stopped at its very end
    asked = {"settings": plain_settings(settings), "settings_files": settings_files(settings)}
    different = [name for name, value in asked.items() if found.fields[name] != value]
    words = {"settings": "other settings", "settings_files": "another catalogue, list or model"}
    reasons = [words[name] for name in different]
    if found.fields["code"]["sha256"] != code_sha256():
        reasons.append("another version of this program")
    if json.loads((output / ORIGIN).read_text(encoding="utf-8"))["fingerprint"] != fingerprint(input, list_files(input)):
        reasons.append("other input, or one that has changed since")
    if reasons:
        raise UserError("curate.output", output, f"holds documents made with {' and '.join(reasons)}; give another directory or remove this one")
    return found


def prepare_curated(config: Config, progress: bool | None = None) -> tuple[Curated, Prepared]:
    """Both halves. Raises UserError, RunFailed."""
    from megatron_ext.curate.tokens import Counted

    apart(Path(config.input or ""), Path(config.output or ""), "output")
    curated = curate(config.curate, config.input or "", text_folder(config), progress)
    if not curated.fields["output"]["documents"]:
        raise UserError("curate.steps", ",".join(config.curate.steps), f"left none of {curated.fields['steps'][0]['in']} documents; {curated.folder / FILE} says "
                                                                       "which step dropped them, and why")
    data = replace(config.data, text_key="text")
    return curated, prepare(data, str(curated.shards), config.output or "", progress, beside=Counted(curated))
