"""The index of a shard: 64 bytes a document, in the order of the shard, so that a document is found, and its tokens are counted, without reading text.

    id 16 bytes | sha256 of the raw bytes, 16 of 32 | of the normalised text, 16 of 32 | of the text as it is now, 8 of 32 | source u16 | domain u16 | bytes u32

The last hash is the one that decides a document's split (data/split.py). Source and domain are numbers of a table that the counts of the shard hold; bytes are
those of the text in UTF-8. Integers are little-endian. A search compares one column with numpy: a hundred million documents take seconds.
"""
import hashlib
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.files import whole

ROW = np.dtype([("id", "V16"), ("raw", "V16"), ("text", "V16"), ("split", ">u8"), ("source", "<u2"), ("domain", "<u2"), ("bytes", "<u4")])
assert ROW.itemsize == 64
_NUMBERS = struct.Struct("<HHI")
COLUMNS = {"id": "id", "sha256": "raw", "text_sha256": "text"}  # of what removals and questions name


def index_name(number: int) -> str:
    return f"{number:06d}.idx"


class IndexWriter:
    """Gathers rows (64 bytes each are held) and writes them when it is closed."""

    def __init__(self, path: Path):
        self._path, self._rows = path, bytearray()
        self._tables: dict[str, dict[str, int]] = {"source": {}, "domain": {}}

    def add(self, document: Any) -> None:
        content, metadata = document.text.encode("utf-8"), document.metadata
        source, domain = (table.setdefault(metadata.get(name) or "", len(table)) for name, table in self._tables.items())
        fixed = bytes.fromhex(document.id + metadata["sha256"][:32] + metadata["text_sha256"][:32]) + hashlib.sha256(content).digest()[:8]
        self._rows += fixed + _NUMBERS.pack(source, domain, min(len(content), 2**32 - 1))  # numpy would take ten times as long for one row

    def close(self) -> dict[str, Any]:
        """Writes the file. Returns {"sha256", "sources": [...], "domains": [...]}."""
        with whole(self._path) as stream:
            stream.write(self._rows)
        return {"sha256": hashlib.sha256(self._rows).hexdigest(), "sources": list(self._tables["source"]), "domains": list(self._tables["domain"])}


def read_index(path: Path) -> np.ndarray:
    """Rows of an index, mapped. An empty file has none."""
    return np.memmap(path, ROW, "r") if path.stat().st_size else np.empty(0, ROW)


def find(rows: np.ndarray, wanted: Mapping[str, frozenset[str]]) -> np.ndarray:
    """Numbers of the rows that one of the values names: {"id": {hexadecimal digits}, "sha256": ..., "text_sha256": ...}; int64, ascending."""
    hit = np.zeros(len(rows), bool)
    for name, values in wanted.items():
        column = np.ascontiguousarray(rows[COLUMNS[name]])
        for value in values:
            hit |= column == np.void(bytes.fromhex(value)[:16])
    return np.flatnonzero(hit)


def ids_at(folder: Path, places: Sequence[tuple[int, int]]) -> list[str]:
    """The ids of documents by (shard, number in it), in the order asked for. Each index is opened once."""
    opened = {shard: read_index(folder / index_name(shard)) for shard in {shard for shard, _ in places}}
    return [bytes(opened[shard][number]["id"]).hex() for shard, number in places]


def split_codes(rows: np.ndarray, fractions: tuple[float, ...]) -> np.ndarray:
    """The number of each document's split, as `data.split.split_of` decides it."""
    position = rows["split"].astype(np.float64) / 2.0**64
    cumulated = np.cumsum(np.asarray(fractions, np.float64))
    codes = np.searchsorted(cumulated, position, side="right")
    last = max(number for number, fraction in enumerate(fractions) if fraction > 0)
    return np.minimum(codes, last).astype(np.uint8)
