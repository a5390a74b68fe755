"""Records out of files, one at a time: JSON lines (.jsonl, .ndjson), a JSON list (.json), comma-separated values (.csv), each also with .gz or .zst behind it.

What cannot be read is named by file and line (in .json: by the number of the record), counted and skipped. A file that is damaged as a whole (cut
off, no JSON list, a quotation mark that is never closed) is refused: nobody can say how much of it would be missing.
"""
import csv
import json
from collections.abc import Iterator
from pathlib import Path

from megatron_ext.data.decompress import file_chunks, lines
from megatron_ext.data.read import BadRecords
from megatron_ext.errors import UserError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv")
_READABLE = f"readable are {', '.join(SUFFIXES)}, each also with .gz or .zst"


class Skips(BadRecords):
    """Counts unusable records and refuses the input at the first one above `chat.max_bad_records`."""

    def add(self, path: Path, number: int | None, reason: str) -> None:
        try:
            super().add(path, number, reason)
        except UserError:
            place = path if number is None else f"{path}:{number}"
            raise UserError("chat.max_bad_records", self.limit, f"{self.count} records cannot be used, the latest {place}: {reason}; mend the file or "
                                                                "raise the limit") from None


def find(path: Path, *, key: str, without: Path | None = None) -> list[Path]:
    """The readable files under `path` (itself, if a file), in the order of their names; hidden ones are passed over.

    Args:
        without: a file, or all of a directory, that is not to be among them (records held out).
    Raises:
        UserError: nothing there, or nothing readable.
    """
    if not path.exists():
        raise UserError(key, path, "is not there; name a file or directory of records")
    if path.is_file():
        if _kind(path) is None:
            raise UserError(key, path, f"is of an unknown kind; {_READABLE}")
        return [path]
    found = sorted(file for file in path.rglob("*") if file.is_file() and _kind(file) and not _hidden(file.relative_to(path)))
    if without is not None:
        found = [file for file in found if without.resolve() not in (file.resolve(), *file.resolve().parents)]
    if not found:
        raise UserError(key, path, f"holds no readable file; {_READABLE}")
    return found


def values(file: Path, bad: BadRecords, *, key: str) -> Iterator[tuple[int, object]]:
    """(line, what stands there) of each record of a file. Raises UserError: damaged as a whole, or too many bad records."""
    read = {"jsonl": _json_lines, "ndjson": _json_lines, "json": _json, "csv": _csv}[_kind(file)]
    try:
        yield from read(file, bad, key)
    except UserError as error:
        if error.key != "input":  # what `file_chunks` calls whatever it is given
            raise
        raise UserError(key, error.value, error.reason) from None


def _kind(file: Path) -> str | None:
    suffixes = file.suffixes[:-1] if file.suffix in (".gz", ".zst") else file.suffixes
    return suffixes[-1].lower()[1:] if suffixes and suffixes[-1].lower() in SUFFIXES else None


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _json_lines(file: Path, bad: BadRecords, key: str) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(lines(file_chunks(file)), start=1):
        text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if not text.strip():
            continue
        try:
            value = json.loads(text.decode("utf-8"))
        except UnicodeDecodeError:
            bad.add(file, number, "is not UTF-8 text")
        except (ValueError, RecursionError):
            bad.add(file, number, "is no JSON")
        else:
            yield from _encodable(file, number, value, bad, b"\\u" in text)


def _json(file: Path, bad: BadRecords, key: str) -> Iterator[tuple[int, object]]:
    try:
        text = b"".join(file_chunks(file)).decode("utf-8-sig")
        found = json.loads(text)
    except UnicodeDecodeError as error:
        raise UserError(key, file, f"is not UTF-8 text (byte {error.start})") from None
    except (ValueError, RecursionError):
        raise UserError(key, file, "is no JSON; one object a line is .jsonl") from None
    if not isinstance(found, list):
        raise UserError(key, file, "is no JSON list of records")
    escaped = "\\u" in text
    for number, value in enumerate(found, start=1):
        yield from _encodable(file, number, value, bad, escaped)


def _csv(file: Path, bad: BadRecords, key: str) -> Iterator[tuple[int, object]]:
    # Bytes that are no UTF-8 become lone surrogates here, so that they spoil their own row and not the reader.
    rows = csv.reader((line.decode("utf-8", "surrogateescape") + "\n" for line in lines(file_chunks(file))), strict=True)
    header, number = None, 1
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            if rows.line_num > number:
                raise UserError(key, file, f"is no CSV: what begins in line {number} does not end as it should ({error})") from None
            bad.add(file, number, f"is no row of CSV ({error})")
            number = rows.line_num + 1
            continue
        if header is None:
            header = [name.removeprefix("\ufeff") if place == 0 else name for place, name in enumerate(row)]
        elif len(row) > len(header):
            bad.add(file, number, f"has {len(row)} cells, the first line names {len(header)}: a text with commas stands in quotation marks")
        elif row:
            yield from _encodable(file, number, dict(zip(header, row)), bad, True)
        number = rows.line_num + 1


def _encodable(file: Path, number: int, value: object, bad: BadRecords, doubtful: bool) -> Iterator[tuple[int, object]]:
    """The record, unless it holds half a character (a lone surrogate), which no tokenizer takes."""
    if doubtful:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except (UnicodeEncodeError, RecursionError):
            bad.add(file, number, "is not UTF-8 text")
            return
    yield number, value
