"""Copies of documents in one build: what was dropped for another document, and comes back when that one is removed.

A duplicate is dropped because one like it stays; remove the one that stays, and at the next build the other does. So a removal takes the whole cluster: each
dropped document names those that stay (`duplicate_of` in `dropped/`), over any number of steps (an exact copy of a near copy).

A document that only lost paragraphs to another one (`shared/`) is a document of its own, and a paragraph that thousands share is a form's. They are told
apart, and removed when that is asked for.
"""
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.curate.documents import read_records
from megatron_ext.errors import UserError

ALIKE = ("exact", "near")  # steps whose copies are the same document; of the others only paragraphs are
IDENTITY = ("id", "sha256", "text_sha256")


@dataclass(frozen=True)
class Copies:
    """What belongs to the documents that were asked for.

    Attributes:
        entries: copies that were dropped, as a list of removals names them.
        stay: ids of documents that stay in the build in place of the documents or their copies.
        shared: ids of documents that stay and lost paragraphs to one of them.
    """

    entries: tuple[dict[str, str], ...] = ()
    stay: frozenset[str] = frozenset()
    shared: frozenset[str] = frozenset()


def copies(text: Path, asked: Mapping[str, frozenset[str]]) -> Copies:
    """Copies of the documents in a folder of cleaned documents. The files are read once for each link of the longest chain; memory is that of what is found.

    Args:
        asked: {"id": ..., "sha256": ..., "text_sha256": ...}: hexadecimal digits, as index.find has it.

    Raises:
        UserError: a file that cannot be read.
    """
    ids, found, stay = set(asked["id"]), {}, set()
    hashes = {name: {value[:32] for value in asked[name]} for name in IDENTITY[1:]}
    known = -1
    while known < len(ids):
        known = len(ids)
        for record in _records(text / "dropped"):
            of = record.get("duplicate_of", ())
            alike = record["step"] in ALIKE
            named = record["id"] in ids or any(record.get(name, "")[:32] in values for name, values in hashes.items())
            if named or not ids.isdisjoint(of):
                found[record["id"]] = {name: record[name] for name in IDENTITY if name in record}
                ids.add(record["id"])
                if alike:
                    ids.update(of)
                    stay.update(of)
    shared = {record["id"] for record in _records(text / "shared") if not ids.isdisjoint(record["shared_with"]) and record["id"] not in ids}
    return Copies(tuple(found[one] for one in sorted(found)), frozenset(stay - found.keys()), frozenset(shared))


def _records(folder: Path) -> Iterator[dict]:
    for path in sorted(folder.glob("*.jsonl.zst")) if folder.is_dir() else ():
        try:
            yield from read_records(path)
        except (ValueError, KeyError):
            raise UserError("--document", path, "is damaged; the build has to be made anew") from None
