"""The datatrove steps of a build: reading raw files, reading shards, blocks, and writing. Each keeps a Tally; the writer puts them beside its shard.

Removed documents go where the reader meets them; copies of them by their normalised text, which the step `Fingerprint` looks at behind `normalise`.
"""
import json
import re
import sysconfig
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from megatron_ext.curate.blocks import CHANGE, DROP, IDENTITY, KEPT, Shards, Verdict, dropped, opened
from megatron_ext.curate.documents import LineWriter, canonical, document_id, read_records, shard_name, text_sha256, to_line, write_json
from megatron_ext.curate.index import IndexWriter, index_name
from megatron_ext.curate.ingest import parts
from megatron_ext.curate.ingest.catalogue import Source
from megatron_ext.curate.ingest.files import Readers, raw_sha256
from megatron_ext.curate.ingest.items import Item, Problem, Unreadable
from megatron_ext.curate.ingest.licences import UNKNOWN, licence
from megatron_ext.curate.ingest.records import Reading
from megatron_ext.curate.ingest.tabular import group_bytes
from megatron_ext.curate.ingest.units import SetAside, Unit, place
from megatron_ext.curate.privacy.hidden import NOTHING, Hidden
from megatron_ext.curate.removals import Removals
from megatron_ext.curate.tally import Tally
from megatron_ext.errors import RunFailed, UserError
from megatron_ext.files import write_whole

READ = "read"
SHARED = "shared"  # a folder: documents that stayed, and which others hold the paragraphs that were taken out of them
_ID = re.compile("[0-9a-f]{32}")


class StepFailed(RunFailed):
    """A step failed on a document: its name, the document's id, the kind of error and the line of code; never the error's text, which may be a person's."""


class RawReader(PipelineStep):
    """The documents of a task's units, with what is known of their source.

    Attributes:
        problems: what could not be read. digests: of the units read, [source, path, start, sha256 of its bytes].
    """

    type, name = "curate", READ

    def __init__(self, root: Path, tasks: Path, sources: Sequence[Source], readings: Mapping[str, Reading], removals: Removals, pictures: Path | None,
                 hidden: Hidden):
        super().__init__()
        self._hidden = hidden
        self._root, self._tasks, self._readings, self._removals, self._pictures = root, tasks, readings, removals, pictures
        self._sources = {source.name: source for source in sources}
        self.tally, self.problems, self.digests, self.dropped = Tally(READ), [], [], []

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        units = [Unit(**fields) for fields in json.loads((self._tasks / f"{rank:06d}.json").read_text(encoding="utf-8"))]
        readers = Readers()
        try:
            for unit in units:
                yield from _timed(self, self._unit(readers, unit))
        finally:
            readers.close()

    def _unit(self, readers: Readers, unit: Unit) -> Iterator[Document]:
        path, where = place(self._root, unit.path), unit.path
        try:
            begin, end = 0, path.stat().st_size
            if unit.stop is not None:
                begin, end = (unit.start, unit.stop) if unit.kind == "jsonl" else group_bytes(path, range(unit.start, unit.stop))
            digest = f"{end - begin} bytes" if self._hidden.blind else self._hidden.digest(raw_sha256(path, begin, end))
            self.digests.append([unit.source, self._hidden.name(where), unit.start, digest])
            for found in readers.read(path, unit.kind, self._readings[unit.source], start=unit.start, stop=unit.stop):
                if isinstance(found, Problem):
                    self._aside(unit, found.position, found.reason)
                elif (document := self._document(unit, found)) is not None:
                    yield document
        except Unreadable as error:
            self._aside(unit, "", error.reason)
        except OSError as error:
            self._aside(unit, "", f"cannot be read: {error.strerror}")
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 whatever a reader stumbles over is set aside, never fatal; its message may hold text
            self._aside(unit, "", f"its reader failed ({type(error).__name__})")

    def _aside(self, unit: Unit, position: str, reason: str) -> None:
        shown, position, number = self._hidden.place(unit.path, position, unit.number)
        self.problems.append(SetAside(shown, position, reason, unit.source, number))
        self.tally.count(unit.source, "set_aside")

    def _document(self, unit: Unit, found: Item) -> Document | None:
        source = self._sources[unit.source]
        own = {key: value for key, value in found.metadata.items() if key != "licence" or licence(value)}  # of a record: believed where it is known
        known = {"source": source.name, "licence": source.licence, "owner": source.owner, "date": source.date, "language": source.language,
                 "domain": source.domain} | own
        known |= {"origin": unit.path + (f"#{found.position}" if found.position else ""), "sha256": self._hidden.digest(found.sha256), "images": list(found.images),
                  "tables": list(found.tables)}
        plain = document_id(source.name, unit.path, found.position)
        if self._hidden.on and "derived_from" in known:  # ids, and nothing else
            known["derived_from"] = [one for one in known["derived_from"] if _ID.fullmatch(one)]
        document = Document(found.text, self._hidden.identity(plain), [], {key: value for key, value in known.items() if value})
        verdict = KEPT
        if self._removals.before(plain, found.sha256, found.metadata.get("derived_from", ())) or self._removals.before(document.id, known["sha256"]):
            verdict = dropped("removed")
        elif problems := parts.problems(document.metadata) or _not_json(document.metadata):
            self._aside(unit, found.position, f"its images or tables are not as they should be: {problems[0]}")
            verdict = dropped("bad_parts")
        self.tally.add(source.name, verdict, len(found.text), len(found.text))
        if verdict.action == DROP:
            self.dropped.append(_gone(document, self.name, verdict.reason, self._hidden))
            return None
        for name, content in found.pictures.items():
            self._keep(name, content)
        return document

    def _keep(self, name: str, content: bytes) -> None:
        if self._pictures is None or (path := self._pictures / name[:2] / name).exists():
            return
        try:
            write_whole(path, content, sync=False)
        except OSError as error:
            raise UserError("curate.output", self._pictures, f"cannot be written: {error.strerror}") from None


class ShardReader(PipelineStep):
    """The documents of shard `rank` of a folder."""

    type, name = "curate", "shards"

    def __init__(self, folder: Path):
        super().__init__()
        self._folder = folder

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        records = (Document(record["text"], record["id"], [], record["metadata"]) for record in read_records(self._folder / shard_name(rank)))
        yield from _timed(self, records)


class BlockStep(PipelineStep):
    """Documents through the block of a step.

    Args:
        settings: the step's. shards: of a GlobalBlock, the documents that it has seen.
    """

    type = "curate"

    def __init__(self, step: str, settings: object, shards: Shards | None = None, *, hidden: Hidden):
        self.name = step
        super().__init__()
        self._hidden = hidden
        self._settings, self._shards = settings, shards
        self.tally, self.dropped, self.shared, self.report = Tally(step), [], [], None

    def run(self, data, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        block: Any = opened(self.name, self._settings)
        if self._shards is not None:
            block = block.decide(self._shards, rank)
        take = getattr(block, "take_report", None)
        if take is not None:
            take()  # of a task that failed in this process
        for document in data:
            with self.track_time():
                verdict = self._decide(block, document)
            if verdict.action == DROP:
                self.dropped.append(_gone(document, self.name, verdict.reason, self._hidden) | ({"duplicate_of": list(verdict.of)} if verdict.of else {}))
                continue
            if verdict.of:
                self.shared.append({"id": document.id, "step": self.name, "shared_with": list(verdict.of)})
            yield document
        self.report = None if take is None else take()

    def _decide(self, block: Any, document: Document) -> Verdict:
        text, source = document.text, document.metadata["source"]
        kept = {key: document.metadata[key] for key in IDENTITY if key in document.metadata}
        try:
            verdict = block.process(document)
            document.metadata |= kept
            if verdict.action == CHANGE:
                parts.realign(document.metadata, text, document.text)
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 its message may hold text
            raise StepFailed(f"step {self.name}, document {document.id} of {source}: {told(error)}") from None
        self.tally.add(source, verdict, len(text), len(document.text))
        return verdict


class Fingerprint(PipelineStep):
    """Writes `text_sha256`, of the text before anything but its form was changed, and drops what is a copy of a removed document."""

    type, name = "curate", "removals"

    def __init__(self, removals: Removals, hidden: Hidden):
        super().__init__()
        self._removals, self._hidden, self.tally, self.dropped = removals, hidden, Tally(self.name), []

    def run(self, data, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for document in data:
            with self.track_time():
                verdict = dropped("removed") if self._covers(document) else KEPT
                self.tally.add(document.metadata["source"], verdict, len(document.text), len(document.text))
            if verdict.action == DROP:
                self.dropped.append(_gone(document, self.name, verdict.reason, self._hidden))
            else:
                yield document

    def _covers(self, document: Document) -> bool:
        plain = text_sha256(document.text)
        document.metadata["text_sha256"] = digest = self._hidden.digest(plain)
        return self._removals.covers(plain) or self._removals.covers(digest)


class Settle(Fingerprint):
    """Behind `privacy` without a key: the hashes and ids that may be told (privacy/hidden.py); a removal that names one of these holds here."""

    name = "settle"

    def _covers(self, document: Document) -> bool:
        self._hidden.settle(document)
        digest = document.metadata["sha256"]
        return self._removals.before(document.id, digest) or self._removals.covers(digest)


class ShardWriter(PipelineStep):
    """Writes what comes as shard `rank`, and beside it what was dropped (no text), set aside and counted. Everything appears whole, the counts last.

    Args:
        folder: shards/ and index/ are made in it. before: the steps whose tallies are told.
        gone, counts: folders for what was dropped, and for what is counted. group: its number, None for the last one.
    """

    type = "curate"

    def __init__(self, folder: Path, before: Sequence[PipelineStep], *, gone: Path, counts: Path, group: int | None,
                 hidden: Hidden):
        self.name = "write" if group is None else f"write_{group}"
        super().__init__()
        self._hidden = hidden
        self._folder, self._before, self._dropped, self._counts, self._group = folder, list(before), gone, counts, group
        self.tally, self.dropped = Tally(self.name), []

    def run(self, data, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        entries = IndexWriter(self._folder / "index" / index_name(rank))
        characters = 0
        with LineWriter(self._folder / "shards" / shard_name(rank)) as shard:
            for document in data:
                if not document.text:  # a step has taken all of it
                    self.tally.add(document.metadata["source"], dropped("empty"), 0, 0)
                    self.dropped.append(_gone(document, self.name, "empty", self._hidden))
                    continue
                with self.track_time():
                    named = licence(document.metadata["licence"])
                    counts = {f"licence {named.name if named else UNKNOWN}": 1}
                    self.tally.add(document.metadata["source"], Verdict(counts=counts), len(document.text), len(document.text))
                    shard.write(to_line(document))
                    entries.add(document)
                    characters += len(document.text)
        index = entries.close()
        steps = [*self._before, self]
        with LineWriter(self._dropped / f"{'last' if self._group is None else self._group}-{shard_name(rank)}") as gone:
            for step in steps:
                for entry in getattr(step, "dropped", ()):
                    gone.write(canonical(entry) + b"\n")
        if parts := [entry for step in steps for entry in getattr(step, "shared", ())]:
            with LineWriter(self._dropped.with_name(SHARED) / shard_name(rank)) as writer:
                for entry in parts:
                    writer.write(canonical(entry) + b"\n")
        reader = self._before[0]
        write_json(self._counts / f"{rank:06d}.json", {
            "tallies": [step.tally.to_json() for step in steps if hasattr(step, "tally")],
            "set_aside": [vars(problem) for problem in getattr(reader, "problems", ())], "digests": getattr(reader, "digests", []),
            "shard": {"documents": shard.count, "bytes": shard.size, "sha256": shard.sha256, "characters": characters},
            "dropped": {"documents": gone.count, "bytes": gone.size, "sha256": gone.sha256}, "index": index,
            "reports": {step.name: step.report for step in steps if getattr(step, "report", None) is not None},
        })
        yield from ()


def _not_json(metadata: Mapping[str, Any]) -> list[str]:
    """What no line of a shard can hold: a number that is none, among what stands beside the text."""
    try:
        if "images" in metadata or "tables" in metadata:
            canonical({key: metadata[key] for key in ("images", "tables") if key in metadata})
    except (ValueError, TypeError, RecursionError):
        return ["images or tables hold what JSON cannot"]
    return []


def _timed(step: PipelineStep, documents: Iterator[Document]) -> Iterator[Document]:
    """The same documents; the time that each took is in the step's statistics, without what others do between them."""
    while True:
        with step.track_time():
            document = next(documents, None)
        if document is None:
            return
        yield document


def _gone(document: Document, step: str, reason: str, hidden: Hidden) -> dict[str, str]:
    """What is kept of a document that was dropped."""
    kept = {key: document.metadata[key] for key in ("sha256", "text_sha256", "source") if document.metadata.get(key, NOTHING) != NOTHING}
    name = document.id
    if hidden.blind and "sha256" not in kept and (shown := hidden.name(document.metadata["origin"])) != document.metadata["origin"]:
        name = document_id(document.metadata["source"], shown, "")
    return {"id": name, "step": step, "reason": reason, **kept}


def told(error: Exception) -> str:
    """The kind of an error and where in the code it happened."""
    frames = traceback.extract_tb(error.__traceback__)
    library = sysconfig.get_path("stdlib")  # site-packages lies in it, too
    last = next((frame for frame in reversed(frames) if not frame.filename.startswith(library) and "site-packages" not in frame.filename), frames[-1])
    return f"{type(error).__name__} at {Path(last.filename).name}, line {last.lineno}"
