"""`report.md` of the main job: each stage's verdict, numbers and pictures, the samples before and after, and the chain of checkpoints.

What cannot be read back from the stages' folders (corpus, baseline, evaluation, completions) is kept in `run.dir`/report.json when the job is done, so
that `report run.dir=DIR` can write the pages again. That verb comes here too: it renders a stage's run directory, or a folder that holds several of
them under the stages' names, while they go on or after they have ended.
"""
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_ext import checkpoint
from megatron_ext.checkpoint.ancestry import chain
from megatron_ext.config.compose import load_config
from megatron_ext.config.stages import CHAT, TEXT
from megatron_ext.doctor import version_of
from megatron_ext.errors import UserError
from megatron_ext.observe import markdown, report, timeline
from megatron_ext.observe.goodput import read_goodput
from megatron_ext.observe.report import Run
from megatron_ext.pipeline import Finished
from megatron_ext.redact import redact
from rlhf.report import chain_table, stage_parts
from rlhf.report import write_report as write_stage

FACTS = "report.json"
FILES = ("config.yaml", "metrics.jsonl", "events.jsonl", "goodput.jsonl")  # any of them makes a directory a run's


def write(job: Finished) -> Path:
    """Writes `run.dir`/report.md, and a report.md into the folder of each stage. Returns the path of the first."""
    directory, corpus = Path(job.config.run.dir), job.prepared
    facts = {
        "summary": redact(_summary(job)), "bytes_per_token": corpus.splits["validation"].bytes_per_token,
        "baseline_bits_per_byte": float(job.baseline["bits_per_byte"]), "evaluated": job.stages[0],
        "evaluation_bits_per_byte": job.evaluation["bits_per_byte"],
        "sections": {
            "Evaluation": {name: value for name, value in job.evaluation.items() if isinstance(value, int | float | str)},
            "Corpus": {"name": corpus.fields["corpus"]["name"], "sha256": corpus.corpus_sha256, "vocabulary": corpus.vocab_size,
                       **{f"{name} tokens": split.tokens for name, split in corpus.splits.items()}},
            "Baseline": {name: value for name, value in job.baseline.items() if isinstance(value, int | float | str)},
        },
        "samples": [{"prompt": one["prompt"], "completion": one["completion"]} for one in job.completions],
    }
    report.publish(directory, [json.dumps(facts, indent=1)], FACTS)
    return render(directory, job.stages)


def render(directory: Path, stages: Sequence[str] | None = None) -> Path:
    """Writes report.md of a run, or of a folder of stages and of each of them. Returns its path.

    Args:
        stages: of a folder, in order; None = all that it has.

    Raises:
        UserError: the directory holds neither. OSError: it cannot be written.
    """
    directory = Path(directory)
    if is_run(directory):
        return _stage(Run.read(directory), {})
    facts, stages = _facts(directory), stages or stages_of(directory)
    if not stages:
        raise UserError("run.dir", directory, "holds no run; name the run.dir of a `train`, or that of a `run` (the folder of its stages)")
    parts = [f"# {_named(directory / stages[-1])[0]}: {' -> '.join(stages)}", markdown.table(facts["summary"]) if facts else "", *_times(directory, stages)]
    for stage in stages:
        run = Run.read(directory / stage)
        _stage(run, facts)
        parts.append(f"## {stage}\n\n[All of it]({stage}/report.md).")
        parts += stage_parts(run, bytes_per_token=facts.get("bytes_per_token"), prefix=f"{stage}/", level=3)
        if stage == facts.get("evaluated"):
            parts += [markdown.table({"validation, bits per byte": facts["evaluation_bits_per_byte"],
                                      "interpolated trigram, bits per byte": facts["baseline_bits_per_byte"]})]
    last = _chain(directory / stages[-1])
    if last:
        parts.append("## Where the last checkpoint comes from\n\n" + chain_table(last))
    return report.publish(directory, parts)


def is_run(directory: Path) -> bool:
    """Whether a directory is that of one stage's run."""
    return any((directory / name).is_file() for name in FILES)


def stages_of(directory: Path) -> list[str]:
    """The stages that have a run in a folder of theirs, as they build on one another."""
    return [stage for stage in (*TEXT, *CHAT) if is_run(directory / stage)]


def _stage(run: Run, facts: Mapping) -> Path:
    name, stage = _named(run.directory)
    if stage == "pretrain":
        own = facts if facts.get("evaluated") == stage else {}
        return report.write_report(run, title=f"{name}, {stage}", sections=own.get("sections"), samples=own.get("samples", ()),
                                   bytes_per_token=facts.get("bytes_per_token"), baseline_bits_per_byte=own.get("baseline_bits_per_byte"))
    return write_stage(run, title=f"{name}, {stage}", chain=_chain(run.directory), bytes_per_token=facts.get("bytes_per_token"))


def _times(directory: Path, stages: Sequence[str]) -> list[str]:
    """A row a stage that has a ledger."""
    rows = []
    for stage in stages:
        goodput = read_goodput(directory / stage)
        if goodput.goodput is not None:
            rows.append((stage, timeline.duration(goodput.allocated), f"{100 * goodput.goodput:.1f} %", len(goodput.lives), goodput.failures))
    return ["## Where the time went\n\n" + markdown.columns(("stage", "allocated", "goodput", "lives", "failed"), rows)] if rows else []


def _summary(job: Finished) -> dict[str, object]:
    versions = {name: version_of(name) for name in ("torch", "megatron-core", "tokenizers")}
    corpus = job.prepared
    minutes = {f"minutes of {stage}": job.seconds[stage] / 60 for stage in job.stages if job.seconds[stage] > 1}
    return {
        "corpus": f"{corpus.fields['corpus']['name']}, sha256 {corpus.corpus_sha256}", "vocabulary": corpus.vocab_size, **minutes,
        "minutes in all": job.seconds["all"] / 60, "python": platform.python_version(), **versions, "cores": os.cpu_count(),
        "written": time.strftime("%Y-%m-%d %H:%M", time.gmtime()), "command": "python -m megatron_ext run " + " ".join(job.words),
    }


def _facts(directory: Path) -> dict:
    """What `write` kept; {} where it has not come so far, or the file is not what it wrote."""
    try:
        found = json.loads((directory / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    kinds = {"summary": dict, "sections": dict, "samples": list, "evaluated": str, "bytes_per_token": float,
             "evaluation_bits_per_byte": float | None, "baseline_bits_per_byte": float}
    return found if isinstance(found, dict) and all(isinstance(found.get(name), kind) for name, kind in kinds.items()) else {}


def _named(folder: Path) -> tuple[str, str]:
    """Model and stage, as the run's configuration says; where it cannot be read the folder's name has to do."""
    try:
        config = load_config(folder)
    except UserError:
        return "?", folder.absolute().name
    return config.model.name, config.stage.name


def _chain(folder: Path) -> list[dict]:
    try:
        path = checkpoint.find(str(folder), folder / "checkpoints", best=True)
        return chain(path)
    except UserError:
        return []
