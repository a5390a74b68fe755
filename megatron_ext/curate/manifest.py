"""The manifest of a build: what went in, what every step did, what came out. Written last: where it is, the build is complete.

It holds no time, no machine and no path but those that settings name, so that the same input, settings and code give the same bytes anywhere, and its hash names the build.
"""
import hashlib
import json
import platform
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from megatron_ext import __version__
from megatron_ext.curate.blocks import entry, resolve
from megatron_ext.curate.build import Build, plain_settings
from megatron_ext.curate.documents import LineWriter, canonical, shard_name, write_json
from megatron_ext.curate.index import index_name
from megatron_ext.curate.ingest.licences import forbidden, is_known, licence, warnings
from megatron_ext.curate.ingest.units import fingerprint, list_files
from megatron_ext.curate.tally import added
from megatron_ext.data.directories import publish
from megatron_ext.errors import UserError

FILE = "manifest.json"
FORMAT = "megatron_ext.curated/1"
ORIGIN = ".input"  # which input, seen how: not part of what the build is
PACKAGES = ("datatrove", "trafilatura", "lxml", "pypdfium2", "warcio", "charset-normalizer", "pyarrow", "zstandard", "kiwipiepy", "kenlm", "fasttext")


@dataclass(frozen=True)
class Curated:
    """A folder of cleaned documents. `sha256` is the manifest's; `fields` all that it says."""

    folder: Path
    sha256: str
    fields: dict

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    @classmethod
    def load(cls, folder: str | Path, key: str = "curate.output") -> "Curated":
        """Raises UserError: no folder of a complete build, or a damaged one."""
        folder = Path(folder)
        try:
            content = (folder / FILE).read_bytes()
            fields = json.loads(content)
        except OSError:
            raise UserError(key, folder, f"is no folder of cleaned documents: it has no {FILE}") from None
        except ValueError:
            raise UserError(key, folder, f"its {FILE} is damaged; build it anew") from None
        if not isinstance(fields, dict) or fields.get("format") != FORMAT:
            raise UserError(key, folder, f"its {FILE} is not of the format {FORMAT}; build it anew")
        return cls(folder, hashlib.sha256(content).hexdigest(), fields)

    def warnings(self) -> list[str]:
        return warnings(self.fields["sources"], self.fields["settings"]["uses"])

    def describe(self) -> str:
        """What a person wants to know of it, a few lines."""
        fields = self.fields
        output = fields["output"]
        lines = [f"{self.folder}: {output['documents']:,} documents of {fields['steps'][0]['in']:,}, {output['characters']:,} characters, manifest {self.sha256[:16]}"]
        for row in fields["steps"]:
            if row["step"].startswith("write_") and not row["dropped"]:  # between two groups of steps
                continue
            told = [f"{count:,} {reason}" for reason, count in sorted(row["dropped"].items(), key=lambda pair: (-pair[1], pair[0]))]
            lines.append(f"  {row['step']:<13} {row['in']:>9,} in, {row['out']:>9,} out" + (f", {row['changed']:,} changed" if row["changed"] else "")
                         + (f"; dropped: {', '.join(told[:6])}" if told else ""))
        aside = fields["set_aside"]
        if aside["entries"]:
            lines.append(f"  set aside     {aside['entries']:,} files and records that could not be read: set_aside.jsonl names them")
        return "\n".join([*lines, *(f"  warning: {line}" for line in self.warnings())])


def finish(build: Build) -> Curated:
    """Writes the manifest of a build whose phases are all done, and gives the result its name. Raises UserError."""
    out, seen = build.out, build.asked()["fingerprint"]
    if fingerprint(build.input, list_files(build.input)) != seen:
        raise UserError("input", build.input, f"changed while it was read; remove {build.work} and start again when nothing writes to it")
    try:
        _reports(build)
        write_json(out / FILE, _fields(build, _set_aside(build)))
        for folder in (out, *(path for path in out.iterdir() if path.is_dir())):
            for draft in folder.glob(".*"):  # of tasks that were killed
                draft.unlink()
        write_json(out / ORIGIN, {"input": build.hidden().name(str(build.input)), "fingerprint": seen})
        if not publish(out, build.output):
            raise UserError("curate.output", build.output, "exists already and was not made by this build; give another one or remove it")
    except OSError as error:
        raise UserError("curate.output", build.output, f"cannot be written: {error.strerror}") from None
    shutil.rmtree(build.work, ignore_errors=True)
    return Curated.load(build.output)


def _counts(build: Build, group: int | str) -> Iterator[dict]:
    for rank in range(build.tasks):
        yield json.loads((build.counts(group) / f"{rank:06d}.json").read_text(encoding="utf-8"))


def _reports(build: Build) -> None:
    """What steps have to tell beside counts: reports/STEP.json, and STEP.md for people."""
    for group, steps in enumerate(build.groups()):
        for step in steps:
            if (function := entry(step).report) is None:
                continue
            found = [counts["reports"][step] for counts in _counts(build, group) if step in counts["reports"]]
            report = resolve(function)(found, getattr(build.step_settings(step), "samples", 0))
            write_json(build.out / "reports" / f"{step}.json", report.to_json())
            (build.out / "reports" / f"{step}.md").write_text(report.markdown(), encoding="utf-8")


def _set_aside(build: Build) -> dict:
    """Writes set_aside.jsonl; what the manifest says of it."""
    reasons: Counter[str] = Counter()
    with LineWriter(build.out / "set_aside.jsonl") as writer:
        def put(entry: dict) -> None:
            writer.write(canonical({key: value for key, value in entry.items() if value}) + b"\n")
            reasons[entry["reason"]] += 1

        for one in build.set_aside:
            put(vars(one))
        for counts in _counts(build, 0):
            for entry in counts["set_aside"]:
                put(entry)
    return {"entries": writer.count, "sha256": writer.sha256, "reasons": dict(sorted(reasons.items()))}


def _fields(build: Build, aside: dict) -> dict:
    groups = len(build.groups())
    plan = json.loads((build.work / "plan.json").read_text(encoding="utf-8"))
    steps = added(tally for group in range(groups) for counts in _counts(build, group) for tally in counts["tallies"])
    read = hashlib.sha256()
    for counts in _counts(build, 0):
        for digest in counts["digests"]:
            read.update(canonical(digest))
    shards = [{"name": shard_name(rank), **counts["shard"], "index": {"name": index_name(rank), **counts["index"]}}
              for rank, counts in enumerate(_counts(build, groups - 1))]
    rows = {row["step"]: row for row in steps}
    sources, hidden, asked = [], build.hidden(), build.asked()
    for source in build.sources():
        first, last = rows["read"]["sources"].get(source.name), rows["write"]["sources"].get(source.name)
        told = {key: hidden.name(value) if key in ("owner", "terms", "date") else value for key, value in source.described().items()} | {"documents_in": first["in"] if first else 0, "documents_out": last["out"] if last else 0,
                                     "characters_out": last["characters_out"] if last else 0, "forbids": list(forbidden(source.described())),
                                     "licence_known": is_known(source.described()),
                                     # of records that name their own
                                     "licences": {name.removeprefix("licence "): count for name, count in sorted(last["counts"].items())} if last else {}}
        known = licence(source.licence)
        sources.append(told | ({"asks": known.asks} if known and known.asks else {}))
    return {
        "format": FORMAT,
        "code": {"version": __version__, "sha256": asked["code"], "packages": _versions()},
        "settings": plain_settings(build.settings), "settings_files": asked["settings_files"],
        "input": {"files": plan["files"], "bytes": plan["bytes"], "sha256": read.hexdigest()},
        "sources": sources, "steps": steps, "set_aside": aside,
        "output": {"documents": sum(shard["documents"] for shard in shards), "characters": sum(shard["characters"] for shard in shards), "shards": shards,
                   **({"webdataset": list(_counts(build, "webdataset"))} if build.settings.images else {})},
    }


def _versions() -> dict[str, str]:
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
