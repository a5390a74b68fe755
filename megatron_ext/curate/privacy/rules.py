"""A ministry's own rules: a YAML file with patterns, word lists, classification marks, exceptions and actions (docs/curate_privacy.md has an example).

Patterns must be bounded (linear.py). Nothing of a rules file but its names of kinds comes into a report; the lists themselves may be secret.
"""
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from megatron_ext.curate.privacy import kinds
from megatron_ext.curate.privacy.config import ACTIONS
from megatron_ext.curate.privacy.linear import Unsafe, check
from megatron_ext.curate.privacy.normal import Normal
from megatron_ext.errors import UserError

_KIND = re.compile(r"[A-Z][A-Z0-9_]{1,39}$")
_FIELDS = {
    "": {"name", "sources", "patterns", "words", "marks", "allow", "actions"},
    "patterns": {"kind", "pattern", "near", "score"}, "words": {"kind", "list", "file", "whole", "score"},
    "marks": {"mark", "action", "where", "lines"}, "allow": {"kind", "values", "pattern"},
}
MARK_ACTIONS = ("drop", "tag")
CLASSIFIED = "CLASSIFICATION"


@dataclass(frozen=True)
class OwnPattern:
    kind: str
    regex: re.Pattern
    near: tuple[str, ...] = ()  # one of these within 32 characters before, or it is none
    score: float = 0.99


@dataclass(frozen=True)
class OwnWords:
    kind: str
    words: tuple[str, ...] = field(repr=False)
    whole: bool = True  # not inside a longer word (of Hangul: nothing before it; particles may follow)
    score: float = 0.99


@dataclass(frozen=True)
class Mark:
    """A classification mark, such as 대외비: `drop` the document, or `tag` the mark in it; `head` = in its first `lines` lines alone on a line or in brackets."""

    mark: str
    action: str = "drop"
    where: str = "head"
    lines: int = 10


@dataclass(frozen=True)
class Allow:
    """What stays although it was recognised: a ministry's own switchboard."""

    kind: str | None
    values: frozenset[str] = field(repr=False)
    regex: re.Pattern | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Rules:
    """Of one file. `sources`: patterns of the names of sources they are for; empty = all."""

    name: str
    sources: tuple[str, ...] = ()
    patterns: tuple[OwnPattern, ...] = ()
    words: tuple[OwnWords, ...] = ()
    marks: tuple[Mark, ...] = ()
    allow: tuple[Allow, ...] = ()
    actions: Mapping[str, str] = field(default_factory=dict)

    def serve(self, source: str) -> bool:
        return not self.sources or any(fnmatchcase(source, pattern) for pattern in self.sources)


def squeezed(value: str) -> str:
    """How values are compared: normalised, lower case, without blanks and separators."""
    return re.sub(r"[\s\-.·/()_,]+", "", Normal(value).text.lower())


def load(path: str) -> Rules:
    """Raises UserError: a file that cannot be read, an unknown key, an unsafe pattern, ..."""
    key = "curate.privacy.rules"
    try:
        read = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(key, path, f"cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise UserError(key, path, "is no YAML in UTF-8") from None
    if not isinstance(read, dict):
        raise UserError(key, path, f"must be a mapping with some of {', '.join(sorted(_FIELDS['']))}")
    return _Reader(path).rules(read)


class _Reader:
    def __init__(self, path: str):
        self.path = path

    def wrong(self, where: str, reason: str) -> UserError:
        return UserError("curate.privacy.rules", self.path, f"{where}: {reason}")

    def rules(self, read: dict) -> Rules:
        self.known(read, "", "the file")
        return Rules(
            name=self.text(read, "name", "the file", Path(self.path).stem), sources=self.texts(read, "sources", "the file"),
            patterns=tuple(self.pattern(entry, f"patterns[{n}]") for n, entry in enumerate(self.entries(read, "patterns"))),
            words=tuple(self.words(entry, f"words[{n}]") for n, entry in enumerate(self.entries(read, "words"))),
            marks=tuple(self.mark(entry, f"marks[{n}]") for n, entry in enumerate(self.entries(read, "marks"))),
            allow=tuple(self.allowed(entry, f"allow[{n}]") for n, entry in enumerate(self.entries(read, "allow"))), actions=self.actions(read))

    def pattern(self, entry: dict, where: str) -> OwnPattern:
        return OwnPattern(self.kind(entry, where), self.regex(entry, where), tuple(word.lower().replace(" ", "") for word in self.texts(entry, "near", where)), self.score(entry, where))

    def words(self, entry: dict, where: str) -> OwnWords:
        given = list(self.texts(entry, "list", where))
        if "file" in entry:
            file = Path(self.path).parent / self.text(entry, "file", where)
            try:
                given += [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip() and not line.startswith("#")]
            except (OSError, UnicodeDecodeError):
                raise self.wrong(where, f"file {file.name} cannot be read as UTF-8") from None
        given = sorted({Normal(word).text for word in given})
        if not given or any(len(word) < 2 for word in given):
            raise self.wrong(where, "needs `list` or `file` with words of two characters and more")
        return OwnWords(self.kind(entry, where), tuple(given), self.flag(entry, "whole", where, True), self.score(entry, where))

    def mark(self, entry: dict, where: str) -> Mark:
        made = Mark(Normal(self.text(entry, "mark", where)).text, self.text(entry, "action", where, "drop"), self.text(entry, "where", where, "head"), entry.get("lines", 10))
        if made.action not in MARK_ACTIONS:
            raise self.wrong(where, f"action must be one of {', '.join(MARK_ACTIONS)}")
        if made.where not in ("head", "anywhere"):
            raise self.wrong(where, "where must be head or anywhere")
        if type(made.lines) is not int or made.lines < 1:
            raise self.wrong(where, "lines must be a whole number above 0")
        return made

    def allowed(self, entry: dict, where: str) -> Allow:
        kind = self.kind(entry, where) if "kind" in entry else None
        values = frozenset(map(squeezed, self.texts(entry, "values", where)))
        if not values and "pattern" not in entry:
            raise self.wrong(where, "needs `values` or `pattern`")
        return Allow(kind, values, self.regex(entry, where) if "pattern" in entry else None)

    def actions(self, read: dict) -> dict[str, str]:
        given = read.get("actions") or {}
        if not isinstance(given, dict) or any(action not in ACTIONS for action in given.values()):
            raise self.wrong("actions", f"must map kinds to one of {', '.join(ACTIONS)}")
        return {str(kind): action for kind, action in given.items()}

    # ---- values
    def known(self, entry: Any, part: str, where: str) -> None:
        if not isinstance(entry, dict):
            raise self.wrong(where, f"must be a mapping with some of {', '.join(sorted(_FIELDS[part]))}")
        for name in entry:
            if name not in _FIELDS[part]:
                raise self.wrong(where, f"{name}: unknown; there are {', '.join(sorted(_FIELDS[part]))}")

    def entries(self, read: dict, part: str) -> list[dict]:
        given = read.get(part) or []
        if not isinstance(given, list):
            raise self.wrong(part, "must be a list")
        for number, entry in enumerate(given):
            self.known(entry, part, f"{part}[{number}]")
        return given

    def kind(self, entry: dict, where: str) -> str:
        kind = self.text(entry, "kind", where)
        if kind not in kinds.KINDS and not _KIND.match(kind):
            raise self.wrong(where, "kind must be capital letters, digits and _, such as CASE_NUMBER")
        return kind

    def regex(self, entry: dict, where: str) -> re.Pattern:
        try:
            return check(self.text(entry, "pattern", where))
        except Unsafe as error:
            raise self.wrong(f"{where}.pattern", str(error)) from None

    def text(self, entry: dict, name: str, where: str, default: str | None = None) -> str:
        value = entry.get(name, default)
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(where, f"{name} must be text" if name in entry else f"{name} is missing")
        return value

    def texts(self, entry: dict, name: str, where: str) -> tuple[str, ...]:
        value = entry.get(name) or []
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(item, str) and item.strip() for item in value):
            raise self.wrong(where, f"{name} must be a list of texts (in quotes where they look like numbers)")
        return tuple(value)

    def flag(self, entry: dict, name: str, where: str, default: bool) -> bool:
        if not isinstance(value := entry.get(name, default), bool):
            raise self.wrong(where, f"{name} must be true or false")
        return value

    def score(self, entry: dict, where: str) -> float:
        value = entry.get("score", 0.99)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise self.wrong(where, "score must be a number above 0, up to 1")
        return float(value)
