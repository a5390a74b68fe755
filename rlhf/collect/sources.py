"""What is read: documents (JSON lines of datatrove's `Document`: text, id, metadata) and records of questions with answers (all formats of
`rlhf/data/records.py`), each with where it came from.

A record with a `text` (`data.text_key`) and no question is a document; where its lines are those of a row (`Q: ...`, `A: ...` with the names of
`chat.prompt_key` and `chat.response_key`) it is a pair, so that questions with answers can be cleaned as documents first. Of a folder that
`prepare curate=...` wrote the shards are read, and what its manifest says that a source's licence forbids goes with each document. What cannot be
read is named by file and line, counted and skipped; more than `chat.max_bad_records` refuse the input. Texts are never shown.
"""
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_ext.config.schema import Config
from megatron_ext.curate.ingest.licences import UNKNOWN, forbidden
from megatron_ext.curate.manifest import FILE as MANIFEST
from megatron_ext.curate.manifest import FORMAT, Curated
from rlhf.collect.rights import Gate
from rlhf.data import files, records
from rlhf.data.fields import Bad, Message

_FACTS = ("licence", "owner", "date", "origin", "language", "domain")
_HANGUL = re.compile("[가-힣\u1100-\u11ff]")
_QUESTIONS = ("messages", "conversations", "instruction", "chosen", "responses", "prompt")


@dataclass(frozen=True)
class Source:
    """Where a record came from. It goes into every record that is made of it, so that "what came of this document?" is a search.

    Attributes:
        id: the document's, or NAME:LINE of a row. file, line: where it stood.
        sha256: of the document's bytes where its metadata says so, else of its text.
        part: the piece of a document, such as an article. facts: licence, owner, date, origin, language and domain, where they are known.
        text_sha256: of a cleaned document's normalised text. derived_from: ids of what the document was itself made of. forbids: what its catalogue
        says that may not be done with it, where that is not what its licence's name says. also: other sources of a record that was made of several (few_shot.also_of).
    """

    id: str
    file: str
    line: int
    sha256: str
    part: str | None = None
    facts: Mapping[str, str] = None
    text_sha256: str | None = None
    derived_from: tuple[str, ...] = ()
    forbids: tuple[str, ...] | None = None
    also: tuple[Mapping, ...] = ()

    def of(self, part: str) -> "Source":
        return replace(self, part=part)

    def record(self) -> dict:
        """As records hold it."""
        facts = {name: value for name, value in (self.facts or {}).items() if name not in ("language", "domain")}
        more = {"part": self.part, "text_sha256": self.text_sha256, "derived_from": list(self.derived_from), "also": [dict(one) for one in self.also]}
        found = {"id": self.id, "file": self.file, "line": self.line, "sha256": self.sha256} | {name: value for name, value in more.items() if value} | facts
        return found if self.forbids is None else found | {"forbids": list(self.forbids)}

    @property
    def domain(self) -> str | None:
        return (self.facts or {}).get("domain")

    def language(self, text: str) -> str:
        """What its metadata says, or by its letters: ko where one in ten is Hangul, else en."""
        return (self.facts or {}).get("language") or language_of(text)


@dataclass(frozen=True)
class Document:
    text: str
    title: str | None
    source: Source


@dataclass(frozen=True)
class Pair:
    """A conversation that ends with an answer."""

    messages: tuple[Message, ...]
    response: str
    source: Source


def language_of(text: str) -> str:
    text = text[:2000]
    return "ko" if len(_HANGUL.findall(text)) * 10 >= max(sum(map(str.isalpha, text)), 1) else "en"


def inputs(path: Path, *, key: str = "input") -> list[Path]:
    """The files of records at or below a path; of folders of cleaned documents their shards alone. Raises UserError."""
    found = files.find(Path(path), key=key)
    if Path(path).is_file():
        return found
    below = {parent for file in found for parent in file.parents if Path(path) == parent or Path(path) in parent.parents}
    roots = [folder for folder in below if _is_cleaned(folder)]
    return [file for file in found if all(folder not in file.parents or file.parent == folder / "shards" for folder in roots)]


def _is_cleaned(folder: Path) -> bool:
    try:
        return json.loads((folder / MANIFEST).read_bytes()).get("format") == FORMAT
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def cleaned(files: Iterable[Path]) -> dict[Path, Curated]:
    """{folder of shards: the cleaned documents that it is of} of files in such folders. Raises UserError: a damaged one."""
    folders = {file.parent for file in files if file.parent.name == "shards"}
    return {folder: Curated.load(folder.parent, "input") for folder in sorted(folders) if _is_cleaned(folder.parent)}


def read(path: Path, config: Config, bad: files.Skips, gate: Gate) -> Iterator[Document | Pair]:
    """Documents and pairs of a file or of all files of a directory, one at a time, that the gate admits. Raises UserError (see `files.py`, `rights.py`)."""
    found = inputs(path)
    rules = {folder: {one["name"]: one for one in of.fields["sources"]} for folder, of in cleaned(found).items()}
    for file in found:
        for line, value in files.values(file, bad, key="input"):
            try:
                item = _item(value, file, line, config)
            except Bad as error:
                bad.add(file, line, str(error))
                continue
            if (rule := rules.get(file.parent, {}).get((item.source.facts or {}).get("collection"))) and _says_more(rule, item.source):
                item = replace(item, source=replace(item.source, forbids=tuple(rule["forbids"])))
            if gate.admits(item.source.record()):
                yield item


def _says_more(rule: Mapping, source: Source) -> bool:
    """Whether a catalogue forbids other things than the licence's name does; a document with a licence of its own is under that."""
    licence = (source.facts or {}).get("licence", "")
    return licence == rule.get("licence", "") and [*rule.get("forbids", ())] != [*forbidden({"licence": licence})]


def values(path: Path, bad: files.Skips, *, key: str = "input") -> Iterator[tuple[Path, int, dict]]:
    """(file, line, record) of each record that is an object."""
    for file in inputs(path, key=key):
        for line, value in files.values(file, bad, key=key):
            if isinstance(value, dict):
                yield file, line, value
            else:
                bad.add(file, line, "is no object with fields")


def _item(value: object, file: Path, line: int, config: Config) -> Document | Pair:
    if not isinstance(value, dict):
        raise Bad("is no object with fields")
    key, asked = config.data.text_key, (*_QUESTIONS, config.chat.prompt_key)
    if isinstance(value.get(key), str) and not any(name in value for name in asked):
        text = value[key]
        if not text.strip():
            raise Bad("has an empty text")
        metadata = value.get("metadata") if isinstance(value.get("metadata"), dict) else {}
        if row := _row(text, config.chat.prompt_key, config.chat.response_key):
            return Pair(({"role": "user", "content": row[0]},), row[1], _source(value, metadata, file, line, text, config))
        title = metadata.get("title")
        return Document(text, title if isinstance(title, str) and title.strip() else None, _source(value, metadata, file, line, text, config))
    found = records.parse(value, config.chat, records.Conversation)
    text = json.dumps([dict(message) for message in found.messages], ensure_ascii=False)
    return Pair(found.messages[:-1], found.messages[-1]["content"], _source(value, value, file, line, text, config))


def _row(text: str, asked: str, answered: str) -> tuple[str, str] | None:
    """Question and answer of a row of a table that was cleaned as a document: `prepare` writes it out, `field: value` a line."""
    cells = [line.partition(":") for line in text.strip().split("\n")]
    found = [[value.strip() for name, _, value in cells if name == key] for key in (asked, answered)]
    right = all(colon for _, colon, _ in cells) and all(len(one) == 1 and one[0] for one in found)
    return (found[0][0], found[1][0]) if right else None


def _source(value: dict, metadata: Mapping, file: Path, line: int, text: str, config: Config) -> Source:
    given, wanted = value.get("source"), config.collect
    if isinstance(given, dict) and isinstance(given.get("id"), str):  # a record of ours, made of something else: that is its source still
        facts = {name: given[name] for name in (*_FACTS, "collection") if isinstance(given.get(name), str)}
        facts |= {name: value[name] for name in ("language", "domain") if isinstance(value.get(name), str)}
        where = given["line"] if isinstance(given.get("line"), int) else line
        return Source(given["id"], str(given.get("file", file.name)), where, str(given.get("sha256", "")), given.get("part"), facts, *_ancestry(given),
                      tuple(one for one in given.get("also") or () if isinstance(one, Mapping)))
    name = value.get("id")
    name = str(name) if isinstance(name, str | int) and not isinstance(name, bool) and str(name).strip() else None
    facts = {key: metadata[key] for key in _FACTS if isinstance(metadata.get(key), str) and metadata[key].strip()}
    if wanted.licence and facts.get("licence") == UNKNOWN:  # as cleaned documents without a catalogue say
        del facts["licence"]
    facts = {"domain": wanted.domain, "licence": wanted.licence} | facts
    if isinstance(metadata.get("source"), str):
        facts["collection"] = metadata["source"]
    digest = metadata.get("sha256")
    digest = digest if isinstance(digest, str) else hashlib.sha256(text.encode("utf-8")).hexdigest()
    facts = {key: fact for key, fact in facts.items() if fact}
    return Source(name or f"{wanted.source or file.name}:{line}", file.name, line, digest, None, facts, *_ancestry(metadata))


def _ancestry(found: Mapping) -> tuple[str | None, tuple[str, ...], tuple[str, ...] | None]:
    """(text_sha256, derived_from, forbids) of a document's metadata or a record's source."""
    digest, derived, forbids = found.get("text_sha256"), found.get("derived_from"), found.get("forbids")
    derived = [derived] if isinstance(derived, str) else derived if isinstance(derived, list) else []
    return (digest if isinstance(digest, str) else None, tuple(one for one in derived if isinstance(one, str)),
            tuple(one for one in forbids if isinstance(one, str)) if isinstance(forbids, list) else None)
