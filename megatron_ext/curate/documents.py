"""Documents on disk: one JSON object a line, in shards of zstd. The same documents give the same bytes.

    {"id": "5b0c...", "metadata": {"source": "statutes", ...}, "text": "..."}

Keys are sorted, nothing depends on the time or the machine, and a shard appears whole or not at all.
"""
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from megatron_ext.data.decompress import file_chunks, lines
from megatron_ext.files import whole

LEVEL = 3  # of zstd: 3 takes a tenth of the time that tokenising takes


def shard_name(number: int) -> str:
    return f"{number:06d}.jsonl.zst"


def document_id(source: str, path: str, position: str) -> str:
    """32 hexadecimal digits that stand for a place: the same file, read again, gives the same documents.

    Args:
        source: name in the catalogue.
        path: of the file below the input, with `/`.
        position: inside the file, "" where the file is the document.
    """
    return hashlib.blake2b(f"{source}\0{path}\0{position}".encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def text_sha256(text: str) -> str:
    """What exact copies share."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def canonical(value: object) -> bytes:
    """A line of JSON without its end: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("utf-8")


def to_line(document: Any) -> bytes:
    """A document (anything with id, text, metadata) as its line of a shard."""
    return canonical({"id": document.id, "text": document.text, "metadata": document.metadata}) + b"\n"


def read_records(path: Path) -> Iterator[dict]:
    """The objects of a shard. Raises UserError: unreadable or truncated file."""
    for line in lines(file_chunks(path)):
        yield json.loads(line)


class LineWriter:
    """Lines into a file that appears when all are written. By the end of its name: `.zst` is compressed, else plain.

    Attributes:
        count: lines. size, sha256: of the file, once it is closed.
    """

    def __init__(self, path: Path):
        self.path, self.count, self.size, self.sha256 = path, 0, 0, ""
        self._hash = hashlib.sha256()

    def __enter__(self) -> Self:
        self._whole = whole(self.path)
        self._file = self._whole.__enter__()
        self._compressor = None
        if self.path.suffix == ".zst":
            import zstandard

            self._compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True).compressobj()
        return self

    def write(self, line: bytes) -> None:
        """`line` ends in \\n."""
        self.count += 1
        self._put(line if self._compressor is None else self._compressor.compress(line))

    def _put(self, content: bytes) -> None:
        if content:
            self._file.write(content)
            self._hash.update(content)
            self.size += len(content)

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if kind is None and self._compressor is not None:
                self._put(self._compressor.flush())
        except BaseException as failed:  # a full disk
            self._whole.__exit__(type(failed), failed, failed.__traceback__)
            raise
        self._whole.__exit__(kind, error, traceback)
        self.sha256 = self._hash.hexdigest()


def write_json(path: Path, value: object) -> None:
    """A small file of JSON, whole or not at all."""
    with whole(path) as stream:
        stream.write(json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True, allow_nan=False).encode("utf-8") + b"\n")
