"""Files of many records: JSON lines, CSV, Parquet. They are streamed, and JSON lines and Parquet can be read in parts.

The position of a JSON line is the byte (decompressed) at which it begins, so that a part of a large file can be read without what is before it; that of a
row is its number, from 1.
"""
import csv
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from megatron_ext.curate.documents import canonical
from megatron_ext.curate.ingest.encoding import BROKEN, decode
from megatron_ext.curate.ingest.items import Item, Problem, Unreadable, sha256
from megatron_ext.curate.ingest.records import Reading, item

SAMPLE = 1 << 20  # bytes that tell the encoding of a CSV file
TOO_LONG = "a line or cell longer than curate.ingest.max_bytes"
ROWS = 512  # of Parquet at once


def json_lines(lines: Iterator[tuple[int, bytes | None]], reading: Reading) -> Iterator[Item | Problem]:
    """Documents of (offset, line) pairs; a line of None was too long."""
    for offset, line in lines:
        if line is None:
            yield Problem(str(offset), TOO_LONG)
            continue
        if offset == 0:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except UnicodeDecodeError as error:
            yield Problem(str(offset), f"not UTF-8 at byte {error.start} of the line")
        except json.JSONDecodeError as error:
            yield Problem(str(offset), f"not JSON: {error.msg} at column {error.colno}")
        except (ValueError, RecursionError):
            yield Problem(str(offset), "not JSON that can be read")
        else:
            if isinstance(record, dict):
                yield item(record, str(offset), sha256(line.strip()), reading)
            else:
                yield Problem(str(offset), f"not a JSON object but {type(record).__name__}")


def offsets(chunks: Iterator[bytes], most: int) -> Iterator[tuple[int, bytes | None]]:
    """(offset, line) of a stream; None instead of a line of more than `most` bytes, which is never held."""
    offset, held, size = 0, [], 0  # of the line under way: where it began, what is kept of it, how long it is
    for chunk in chunks:
        first, *rest = chunk.split(b"\n")
        held, size = ([*held, first] if size + len(first) <= most else []), size + len(first)
        for piece in rest:
            yield offset, b"".join(held) if size <= most else None
            offset, held, size = offset + size + 1, [piece], len(piece)
    if size:
        yield offset, b"".join(held) if size <= most else None


def part_of(path: Path, start: int, stop: int, most: int) -> Iterator[tuple[int, bytes | None]]:
    """(offset, line) of the lines that begin in bytes [start, stop) of a plain file; None as in `offsets`."""
    with path.open("rb", buffering=1 << 20) as stream:
        if start:
            stream.seek(start - 1)
            _pass_over(stream)  # the rest of a line that began before, or only its end
        offset = stream.tell()
        while offset < stop and (line := stream.readline(most + 1)):
            whole = line.endswith(b"\n") or len(line) <= most
            yield offset, line.removesuffix(b"\n") if whole else None
            offset += len(line) + (0 if whole else _pass_over(stream))


def _pass_over(stream: BinaryIO) -> int:
    """Goes on behind the next end of a line; how many bytes that was."""
    size = 0
    while piece := stream.readline(1 << 20):
        size += len(piece)
        if piece.endswith(b"\n"):
            break
    return size


def csv_rows(chunks: Iterator[bytes], reading: Reading, *, tabs: bool) -> Iterator[Item | Problem]:
    """Documents of a table with a header. Raises Unreadable: no header, no text."""
    head = b""
    for chunk in chunks:
        head += chunk
        if len(head) >= SAMPLE:
            break
    whole = len(head) < SAMPLE
    sample = head if whole else head[: head.rfind(b"\n") + 1] or head
    _, encoding, _ = decode(sample, wanted=reading.encoding, max_broken=max(reading.settings.max_broken, 0.001))
    csv.field_size_limit(reading.settings.max_bytes)
    stream = io.TextIOWrapper(io.BufferedReader(_Chunks(head, chunks)), encoding={"utf-8": "utf-8-sig"}.get(encoding, encoding), errors="replace", newline="")
    lines = iter(lambda: _line(stream, reading.settings.max_bytes), "")
    first = next(lines, "")
    delimiter = "\t" if tabs else max(",;\t|", key=first.count)
    rows = csv.reader(itertools.chain([first], lines), delimiter=delimiter)
    try:
        header = next(rows, [])
    except csv.Error:
        raise Unreadable("a table whose header cannot be read") from None
    names = [" ".join(name.split()) or f"column{number}" for number, name in enumerate(header, 1)]
    if not any(name.strip() for name in header):
        raise Unreadable("a table without a header")
    number = 0
    while True:
        number += 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            if "field larger" in str(error):
                raise Unreadable(f"row {number}: {TOO_LONG}; what follows it was not read") from None
            yield Problem(str(number), "not a row that can be read")
            continue
        if row is None:
            return
        if not any(cell.strip() for cell in row):
            continue
        if any(BROKEN in cell for cell in row):
            yield Problem(str(number), f"not {encoding}")
        elif len(row) > len(names):
            yield Problem(str(number), f"{len(row)} cells, the header has {len(names)}")
        else:
            yield item(dict(zip(names, row)), str(number), sha256("\x1f".join(row).encode()), reading, rows=True)


def _line(stream: TextIO, most: int) -> str:
    line = stream.readline(most)
    if len(line) >= most and not line.endswith("\n"):
        raise Unreadable(f"{TOO_LONG}; what follows it was not read")
    return line


class _Chunks(io.RawIOBase):
    """A stream of what was read already and what follows."""

    def __init__(self, head: bytes, chunks: Iterator[bytes]):
        self._rest, self._chunks = memoryview(head), chunks

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def row_groups(path: Path) -> list[int]:
    """Rows of each group of a Parquet file. Raises Unreadable."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            return [table.metadata.row_group(number).num_rows for number in range(table.num_row_groups)]
    except (pyarrow.ArrowException, OSError):
        raise Unreadable("not a Parquet file that can be read") from None


def group_bytes(path: Path, groups: range) -> tuple[int, int]:
    """Where the columns of some row groups lie in a Parquet file: bytes [begin, end). Raises Unreadable."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            found = [table.metadata.row_group(number) for number in groups]
            columns = [group.column(number) for group in found for number in range(group.num_columns)]
            starts = [min(one for one in (column.dictionary_page_offset, column.data_page_offset) if one) for column in columns]
            return min(starts), max(start + column.total_compressed_size for start, column in zip(starts, columns))
    except (pyarrow.ArrowException, OSError, ValueError):
        raise Unreadable("not a Parquet file that can be read") from None


def parquet_rows(path: Path, groups: range, reading: Reading) -> Iterator[Item | Problem]:
    """Documents of some row groups. Raises Unreadable."""
    import pyarrow
    import pyarrow.parquet

    before = sum(row_groups(path)[: groups.start])
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=ROWS, row_groups=list(groups)):
                for number in range(batch.num_rows):
                    yield _row(batch.slice(number, 1), str(before + number + 1), reading)
                before += batch.num_rows
    except (pyarrow.ArrowException, OSError):
        raise Unreadable("damaged inside: Parquet's own reader gave up") from None


def _row(one, position: str, reading: Reading) -> Item | Problem:
    try:
        record = one.to_pylist()[0]
    except UnicodeDecodeError:
        return Problem(position, "not UTF-8")
    except (ValueError, OverflowError):  # a date beyond what Python knows
        return Problem(position, "holds a value that cannot be read")
    plain = {key: value if isinstance(value, str | int | float | bool | list | dict | None) else str(value) for key, value in record.items()}
    try:
        digest = sha256(canonical(plain))
    except (ValueError, TypeError):  # nan, or values inside lists that JSON does not know
        digest = sha256(repr(sorted(plain.items())).encode("utf-8", "replace"))
    return item(plain, position, digest, reading, rows=True)
