"""Documents that must not come in again: a list that a build reads and `ledger remove` writes. A line of JSON an entry:

    {"id": "5b0c...", "sha256": "...", "text_sha256": "...", "reason": "..."}      any of the first three; `reason` is for people

Hashes may be cut to their first 32 digits. `id` stands for a place (a file's path and the position in it), `sha256` for raw bytes wherever they lie, `text_sha256` for a normalised text, so that copies in
other files go too. What was made of a removed document (`derived_from` in its metadata: SFT examples, say) goes with it, at any depth: an entry covers what names
it, and whoever makes records out of records names all ancestors.
"""
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.curate.documents import canonical
from megatron_ext.errors import UserError
from megatron_ext.files import whole

KEY = "curate.removals"
NAMES = ("id", "sha256", "text_sha256")


@dataclass(frozen=True)
class Removals:
    """What is removed; sets of hexadecimal digits."""

    ids: frozenset[str] = frozenset()
    raw: frozenset[str] = frozenset()
    texts: frozenset[str] = frozenset()

    @classmethod
    def read(cls, path: str | Path | None) -> "Removals":
        """Raises UserError: no such file, or a line that is no entry."""
        if path is None:
            return cls()
        found: dict[str, set[str]] = {name: set() for name in NAMES}
        for entry in entries(path):
            for name in NAMES:
                if name in entry:
                    found[name].add(entry[name][:32])
        return cls(*(frozenset(found[name]) for name in NAMES))

    def __bool__(self) -> bool:
        return bool(self.ids or self.raw or self.texts)

    def before(self, document_id: str, sha256: str, derived_from: Sequence[str] = ()) -> bool:
        """Whether a document as it was read is removed, by its place, its bytes, or what it was made of."""
        return document_id in self.ids or sha256[:32] in self.raw or not self.ids.isdisjoint(derived_from)

    def covers(self, text_sha256: str) -> bool:
        """Whether a normalised text is removed."""
        return text_sha256[:32] in self.texts


def entries(path: str | Path) -> list[dict]:
    """The entries of a list. Raises UserError."""
    found = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(KEY, path, f"cannot be read: {error.strerror if isinstance(error, OSError) else 'not UTF-8'}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        known = isinstance(entry, Mapping) and any(isinstance(entry.get(name), str) for name in NAMES)
        if not known or any(not isinstance(entry[name], str) or not _hexadecimal(entry[name], *((32,) if name == "id" else (32, 64))) for name in NAMES if name in entry):
            raise UserError(KEY, path, f"line {number} is no entry: a JSON object with id (32 hexadecimal digits), sha256 or text_sha256 (64, or the first 32)")
        found.append(dict(entry))
    return found


def add(path: str | Path, new: Iterable[Mapping]) -> int:
    """Adds entries that are not there yet, the file whole or not at all. Returns how many were added. Raises UserError."""
    path = Path(path)
    old = entries(path) if path.exists() else []
    known = {tuple(entry.get(name) for name in NAMES) for entry in old}
    fresh = [dict(entry) for entry in new if tuple(entry.get(name) for name in NAMES) not in known]
    if fresh:
        try:
            with whole(path) as stream:
                stream.write(b"".join(canonical(entry) + b"\n" for entry in (*old, *fresh)))
        except OSError as error:
            raise UserError(KEY, path, f"cannot be written: {error.strerror}") from None
    return len(fresh)


def _hexadecimal(text: str, *digits: int) -> bool:
    return len(text) in digits and all(letter in "0123456789abcdef" for letter in text)
