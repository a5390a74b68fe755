"""megatron-core's indexed dataset, opened with care: existing Megatron files work as they are, damaged ones are named.

An `.idx` file is, little-endian: 9 bytes `MMIDIDX\\0\\0`, version uint64 = 1, type code uint8, number of sequences S uint64, number of document bounds B uint64, then
S lengths int32 (tokens), S pointers int64 (bytes into the `.bin`), B bounds int64 (sequences; 0 first, S last), and S modes int8 in multimodal
files. Sizes are checked against the header before megatron-core maps the files: past the end of a truncated file it would read garbage or die by SIGBUS.
"""
import struct
from pathlib import Path

import numpy as np

from megatron_ext.data.mcore import indexed_dataset
from megatron_ext.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_INTEGERS = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


class TokenFile:
    """Documents of tokens behind one `.bin`/`.idx` prefix.

    Attributes:
        prefix: path without the suffixes.
        lengths: tokens of each document, int64 [documents].
    """

    def __init__(self, prefix: str | Path, *, key: str = "data.paths"):
        """Opens and checks.

        Args:
            prefix: path without `.bin` and `.idx`.
            key: what to call it in messages.

        Raises:
            UserError: a file is missing, truncated, or inconsistent.
        """
        self.prefix = Path(prefix)
        self.dtype = _check_sizes(self.prefix, key)
        self._data = indexed_dataset().IndexedDataset(str(self.prefix), multimodal=False, mmap=True)
        lengths, pointers = self._data.index.sequence_lengths, self._data.index.sequence_pointers
        bounds = self._data.document_indices
        if np.any(lengths < 0) or bounds[0] != 0 or bounds[-1] != len(lengths) or np.any(np.diff(bounds) < 0):
            raise UserError(key, _with(self.prefix, ".idx"), "its lengths and document bounds contradict each other; make it anew")
        ends = pointers + lengths.astype(np.int64) * self.dtype.itemsize
        # A document is read as one piece, so its sequences must follow each other; between documents anything goes.
        inner = np.ones(len(lengths), dtype=bool)
        inner[bounds[:-1][bounds[:-1] < len(lengths)]] = False
        if np.any(pointers < 0) or np.any(pointers % self.dtype.itemsize) or np.any(pointers[1:][inner[1:]] != ends[:-1][inner[1:]]):
            raise UserError(key, _with(self.prefix, ".idx"), "its sequences do not follow each other; make it anew")
        size = _with(self.prefix, ".bin").stat().st_size
        if len(ends) and ends.max() > size:
            raise UserError(
                key, _with(self.prefix, ".bin"), f"truncated: {size} bytes, the index speaks of {ends.max()}; copy or make it anew"
            )
        cumulated = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self.lengths = np.diff(cumulated[bounds])
        self._pointers = pointers[np.minimum(bounds[:-1], max(len(lengths) - 1, 0))]

    @property
    def documents(self) -> int:
        return len(self.lengths)

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start, stop) of a document, in the file's own type, not copied."""
        stop = int(self.lengths[document]) if stop is None else stop
        if stop <= start:
            return np.empty(0, self.dtype)
        offset = int(self._pointers[document]) + start * self.dtype.itemsize
        return self._data.bin_reader.read(dtype=self.dtype.type, count=stop - start, offset=offset)

    def largest_token(self, *, about: int = 1 << 20) -> int:
        """The largest token id among about that many tokens spread over the file; a lower bound of the vocabulary."""
        step = max(1, int(self.lengths.sum()) // about)
        return max((int(self.read(document).max()) for document in range(0, self.documents, step) if self.lengths[document]), default=0)


def document_lengths(prefix: str | Path, *, key: str = "data.paths") -> np.ndarray:
    """Tokens of each document, int64, read from the index alone: no megatron-core, no torch. Raises UserError as TokenFile does for a bad file."""
    _check_sizes(Path(prefix), key)
    content = np.memmap(_with(Path(prefix), ".idx"), np.uint8, "r")
    _, _, _, sequences, bounds = _HEADER.unpack(content[: _HEADER.size].tobytes())
    start = _HEADER.size
    lengths = content[start : start + 4 * sequences].view("<i4")
    ends = content[start + 12 * sequences : start + 12 * sequences + 8 * bounds].view("<i8")
    return np.diff(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[ends])


def _with(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def _check_sizes(prefix: Path, key: str) -> np.dtype:
    index, binary = _with(prefix, ".idx"), _with(prefix, ".bin")
    for path in (index, binary):
        if not path.is_file():
            raise UserError(key, prefix, f"no file {path}; give a prepared directory, or the path of a .bin and .idx without these endings")
    size = index.stat().st_size
    with index.open("rb") as stream:
        head = stream.read(_HEADER.size)
    if not _MAGIC.startswith(head[:9]) or (len(head) >= 9 and head[:9] != _MAGIC):
        raise UserError(key, index, "not an index of megatron-core (it begins with other bytes)")
    if len(head) < _HEADER.size:
        raise UserError(key, index, f"truncated: {size} bytes, the header alone has {_HEADER.size}; copy or make it anew")
    _, version, code, sequences, bounds = _HEADER.unpack(head)
    if version != 1 or code not in _INTEGERS or bounds < 1:
        raise UserError(key, index, f"version {version}, type {code}, {bounds} document bounds: not an index of token ids")
    needed = _HEADER.size + 12 * sequences + 8 * bounds
    if size < needed:
        raise UserError(key, index, f"truncated: {size} bytes, its header speaks of {needed}; copy or make it anew")
    if size not in (needed, needed + sequences):
        raise UserError(key, index, f"{size} bytes where its header speaks of {needed}; make it anew")
    if binary.stat().st_size == 0:
        raise UserError(key, binary, "holds no tokens")
    return np.dtype(_INTEGERS[code])
