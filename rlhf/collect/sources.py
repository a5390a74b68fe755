"""What is read: documents (JSON lines of datatrove's `Document`: text, id, metadata) and records of questions with answers (all formats of
`rlhf/data/records.py`), each with where it came from.

A record with a `text` (`data.text_key`) and no question is a document. What cannot be read is named by file and line, counted and skipped;
more than `chat.max_bad_records` refuse the input. Texts are never shown.
"""
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_ext.config.schema import Config
from rlhf.data import files, records
from rlhf.data.fields import Bad, Message

_KEPT = ("licence", "owner", "date", "origin", "language", "domain")
_QUESTIONS = ("messages", "conversations", "instruction", "chosen", "responses", "prompt")


@dataclass(frozen=True)
class Source:
    """Where a record came from. It goes into every record that is made of it, so that "what came of this document?" is a search.

    Attributes:
        id: the document's, or NAME:LINE of a row. file, line: where it stood.
        sha256: of the document's bytes where its metadata says so, else of its text.
        part: the piece of a document, such as an article. facts: licence, owner, date, origin, language and domain, where they are known.
    """

    id: str
    file: str
    line: int
    sha256: str
    part: str | None = None
    facts: Mapping[str, str] = None

    def of(self, part: str) -> "Source":
        return replace(self, part=part)

    def record(self) -> dict:
        """As records hold it."""
        facts = {name: value for name, value in (self.facts or {}).items() if name not in ("language", "domain")}
        return {"id": self.id, "file": self.file, "line": self.line, "sha256": self.sha256} | ({"part": self.part} if self.part else {}) | facts

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
    """A conversation that ends with an answer. values: all fields of its record."""

    messages: tuple[Message, ...]
    response: str
    source: Source
    values: Mapping


def language_of(text: str) -> str:
    letters = [letter for letter in text[:2000] if letter.isalpha()]
    hangul = sum("가" <= letter <= "힣" or "ᄀ" <= letter <= "ᇿ" for letter in letters)
    return "ko" if hangul * 10 >= max(len(letters), 1) else "en"


def read(path: Path, config: Config, bad: files.Skips) -> Iterator[Document | Pair]:
    """Documents and pairs of a file or of all files of a directory, one at a time. Raises UserError (see `files.py`)."""
    for file in files.find(Path(path), key="input"):
        for line, value in files.values(file, bad, key="input"):
            try:
                yield _item(value, file, line, config)
            except Bad as error:
                bad.add(file, line, str(error))


def values(path: Path, bad: files.Skips, *, key: str = "input") -> Iterator[tuple[Path, int, dict]]:
    """(file, line, record) of each record that is an object."""
    for file in files.find(Path(path), key=key):
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
        title = metadata.get("title")
        return Document(text, title if isinstance(title, str) and title.strip() else None, _source(value, metadata, file, line, text, config))
    found = records.parse(value, config.chat, records.Conversation)
    text = json.dumps([dict(message) for message in found.messages], ensure_ascii=False)
    return Pair(found.messages[:-1], found.messages[-1]["content"], _source(value, value, file, line, text, config), value)


def _source(value: dict, metadata: Mapping, file: Path, line: int, text: str, config: Config) -> Source:
    given, wanted = value.get("source"), config.collect
    if isinstance(given, dict) and isinstance(given.get("id"), str):  # a record of ours, made of something else: that is its source still
        facts = {name: given[name] for name in (*_KEPT, "collection") if isinstance(given.get(name), str)}
        facts |= {name: value[name] for name in ("language", "domain") if isinstance(value.get(name), str)}
        where = given["line"] if isinstance(given.get("line"), int) else line
        return Source(given["id"], str(given.get("file", file.name)), where, str(given.get("sha256", "")), given.get("part"), facts)
    name = value.get("id")
    name = str(name) if isinstance(name, str | int) and not isinstance(name, bool) and str(name).strip() else None
    facts = {key: metadata[key] for key in _KEPT if isinstance(metadata.get(key), str) and metadata[key].strip()}
    facts = {"domain": wanted.domain, "licence": wanted.licence} | facts
    if isinstance(metadata.get("source"), str):
        facts["collection"] = metadata["source"]
    digest = metadata.get("sha256")
    digest = digest if isinstance(digest, str) else hashlib.sha256(text.encode("utf-8")).hexdigest()
    return Source(name or f"{wanted.source or file.name}:{line}", file.name, line, digest, None, {key: fact for key, fact in facts.items() if fact})
