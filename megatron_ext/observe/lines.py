"""A file of JSON lines that outlives crashes and full disks: what `metrics.jsonl` and `events.jsonl` are written with.

A line is one `write` to the end of the file. A reader at that moment may still see a part of it (ext4, where it crosses a page), and a crash can leave
one: `read_lines` passes over it. It is cut off when the file is next opened, and at once when the disk is full. Errors of the disk are warned of
once and never stop a run.

JSON knows no NaN and no infinity: they are written as the strings "NaN", "Infinity" and "-Infinity", and read back as floats.
Finite floats are written as Python's `repr`, which reads back to the same bits. Texts are written without secrets (redact.py).
"""
import json
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from megatron_ext.redact import Redactor

_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def encode(value: object) -> object:
    """`value` with what JSON cannot hold replaced: non-finite floats by strings, tensors and arrays of one element by numbers."""
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, (str, int, bool)):
        return value
    if isinstance(value, dict):
        return {str(k): encode(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(v) for v in value]
    if hasattr(value, "item"):
        return encode(value.item())
    return str(value)


def decode(value: object) -> object:
    """The inverse of `encode` for numbers."""
    if isinstance(value, str):
        return _SPECIAL.get(value, value)
    if isinstance(value, dict):
        return {k: decode(v) for k, v in value.items()}
    if isinstance(value, list):
        return [decode(v) for v in value]
    return value


def read_lines(path: Path) -> Iterator[dict]:
    """The objects of a file of JSON lines; none when it does not exist. Lines that are no JSON object (torn by a crash) are left out."""
    if not Path(path).exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield decode(record)


class LineFile:
    """Appends objects to a file; makes its directory. One writer at a time.

    Args:
        redactor: what takes secrets out of the objects' texts; None = all of it.
    """

    def __init__(self, path: Path, *, redactor: Redactor | None = None):
        self.path, self._fd, self._warned = Path(path), None, False
        self._redact = redactor or Redactor()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            self._cut_torn_line()
        except OSError as error:
            self._warn(error)

    def append(self, record: dict) -> bool:
        """False where the line could not be written."""
        if self._fd is None:
            return False
        data = (json.dumps(encode(self._redact(record)), ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", errors="backslashreplace")
        try:
            written = os.write(self._fd, data)
            if written < len(data):
                os.ftruncate(self._fd, os.fstat(self._fd).st_size - written)
                self._warn(OSError("the disk took only a part of a line"))
                return False
        except OSError as error:
            self._warn(error)
            return False
        return True

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _cut_torn_line(self) -> None:
        end = size = os.fstat(self._fd).st_size
        while end > 0:
            block = os.pread(self._fd, min(end, 65536), end - min(end, 65536))
            newline = block.rfind(b"\n")
            if newline >= 0:
                end = end - len(block) + newline + 1
                break
            end -= len(block)
        if end < size:
            os.ftruncate(self._fd, end)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"{self.path}: {error}; lines are being lost, the run goes on", RuntimeWarning, stacklevel=3)
