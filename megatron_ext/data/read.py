"""Documents from what a user has: plain text, JSONL (also gzip, zstd), Parquet, or a folder of these.

Nothing is normalised: bytes are decoded as strict UTF-8 and go on as they are, byte-order marks, NUL, `\\r\\n`, combining marks and all.
A record that cannot be read is named by file and line (row, in Parquet), skipped and counted; more than `max_bad_lines` of them
refuse the whole input. Messages name places, never text: data may be personal.
"""
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ext.data.decompress import file_chunks, lines
from megatron_ext.errors import UserError

_COMPRESSED = (".gz", ".zst")
_KINDS = {".txt": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
READABLE = ".txt, .jsonl, .ndjson (each also with .gz or .zst behind it), .parquet, or a folder of these"


@dataclass
class BadRecords:
    """Counts unreadable records and refuses the input at the first one above `limit`."""

    limit: int
    count: int = 0
    places: list[str] = field(default_factory=list)  # of the first few, for the report

    def add(self, path: Path, number: int | None, reason: str) -> None:
        place = f"{path}: {reason}" if number is None else f"{path}:{number}: {reason}"
        self.count += 1
        if len(self.places) < 20:
            self.places.append(place)
        if self.count > self.limit:
            raise UserError(
                "data.max_bad_lines", self.limit, f"{self.count} unreadable records, the latest {place}; mend the input or raise the limit"
            )


def find_files(path: Path) -> tuple[list[Path], list[Path]]:
    """Readable files under `path` (itself, if a file), sorted by relative POSIX path, and the files that were passed over.

    Raises:
        UserError: nothing there, or nothing readable.
    """
    if not path.exists():
        raise UserError("input", path, "no such file or folder")
    if path.is_file():
        if kind_of(path) is None:
            raise UserError("input", path, f"unknown kind of file {path.suffix or '(no extension)'}; readable are {READABLE}")
        return [path], []
    found = [file for file in path.rglob("*") if file.is_file() and not any(p.startswith(".") for p in file.relative_to(path).parts)]
    found.sort(key=lambda file: file.relative_to(path).as_posix())
    readable = [file for file in found if kind_of(file) is not None]
    if not readable:
        raise UserError("input", path, f"no readable file in this folder ({len(found)} others); readable are {READABLE}")
    return readable, [file for file in found if kind_of(file) is None]


def kind_of(path: Path) -> str | None:
    """`text`, `jsonl`, `parquet`, or None for a file that cannot be read."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        inner = _KINDS.get(suffixes[-2]) if len(suffixes) > 1 else None
        return inner if inner != "parquet" else None
    return _KINDS.get(suffixes[-1]) if suffixes else None


def fingerprint(files: list[Path]) -> str:
    """sha256 over names, sizes and modification times: the same fingerprint means the same input without reading it (as `make` and `rsync` hold)."""
    digest = hashlib.sha256()
    for file in files:
        status = file.stat()
        digest.update(f"{file.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def read_documents(
    files: list[Path], *, text_key: str, bad: BadRecords, read: Callable[[int], None] = lambda size: None
) -> Iterator[str]:
    """The documents of `files` in order; empty ones are passed over.

    Args:
        files: from `find_files`.
        text_key: field of a JSONL object, column of a Parquet table.
        bad: counts what is skipped.
        read: called with the bytes taken from disk.

    Raises:
        UserError: too many bad records; truncated, damaged or unreadable files; a Parquet table without that column.
    """
    for path in files:
        kind = kind_of(path)
        if kind == "text":
            documents = _text(path, bad, read)
        elif kind == "jsonl":
            documents = _jsonl(path, text_key, bad, read)
        else:
            documents = _parquet(path, text_key, bad, read)
        yield from (text for text in documents if text)


def _text(path: Path, bad: BadRecords, read: Callable[[int], None]) -> Iterator[str]:
    try:
        yield b"".join(file_chunks(path, read=read)).decode("utf-8")
    except UnicodeDecodeError as error:
        bad.add(path, None, f"not UTF-8 at byte {error.start}")


def _jsonl(path: Path, text_key: str, bad: BadRecords, read: Callable[[int], None]) -> Iterator[str]:
    for number, line in enumerate(lines(file_chunks(path, read=read)), 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # a mark of the file, outside any text field
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            bad.add(path, number, f"not UTF-8 at byte {error.start} of the line")
            continue
        except json.JSONDecodeError as error:
            bad.add(path, number, f"not JSON: {error.msg} at column {error.colno}")
            continue
        except (ValueError, RecursionError):  # a number of too many digits, brackets nested too deep
            bad.add(path, number, "not JSON that can be read")
            continue
        if not isinstance(record, dict):
            bad.add(path, number, f"not a JSON object but {type(record).__name__}")
        elif text_key not in record:
            bad.add(path, number, f"no field {text_key!r} (data.text_key)")
        elif not isinstance(record[text_key], str):
            bad.add(path, number, f"field {text_key!r} is not text but {type(record[text_key]).__name__}")
        elif b"\\u" in line and not _encodable(record[text_key]):  # only an escape can spell one: the line itself is UTF-8
            bad.add(path, number, f"field {text_key!r} holds a lone surrogate, which UTF-8 cannot hold")
        else:
            yield record[text_key]


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _parquet(path: Path, text_key: str, bad: BadRecords, read: Callable[[int], None]) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            schema = table.schema_arrow
            if text_key not in schema.names:
                raise UserError("data.text_key", text_key, f"{path} has no such column; it has {', '.join(schema.names)}")
            kind = schema.field(text_key).type
            kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_string_view(kind)):
                raise UserError("data.text_key", text_key, f"that column of {path} is {kind}, not text")
            row, rows, size, done = 0, table.metadata.num_rows, path.stat().st_size, 0
            for batch in table.iter_batches(batch_size=256, columns=[text_key]):
                # as bytes: pyarrow does not check UTF-8 on reading, and a bad row must be skipped, not the batch
                for value in batch.column(0).cast(kind).cast(pyarrow.large_binary()).to_pylist():
                    row += 1
                    if value is None:
                        bad.add(path, row, f"column {text_key!r} is null")
                        continue
                    try:
                        text = value.decode("utf-8")
                    except UnicodeDecodeError as error:
                        bad.add(path, row, f"not UTF-8 at byte {error.start}")
                        continue
                    yield text
                read(size * row // max(rows, 1) - done)
                done = size * row // max(rows, 1)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError("input", path, f"not a Parquet file that can be read: {str(error).splitlines()[0]}") from error
