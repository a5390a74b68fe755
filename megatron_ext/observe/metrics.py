"""`metrics.jsonl`: one object a step (`step`, `loss`, `tokens_per_second`, ...), in full float precision.

When a run resumes, what an earlier life wrote for the steps that will now be done again is dropped, in one atomic replacement of the file,
so that every step stands there once. The rule for NaN is in `lines`.
"""
import json
import os
from pathlib import Path

from megatron_ext.files import whole

from .lines import LineFile, encode, read_lines


class Metrics:
    """Writer of one run's metrics.

    Args:
        path: the file; its directory is made.
        first: the first step that this life will write; records of earlier lives with `step` >= `first` are dropped. 0 = a new run.

    Raises:
        OSError: the file cannot be rewritten at the start (later errors only warn).
    """

    def __init__(self, path: Path, *, first: int = 0):
        self.path = Path(path)
        self.dropped = drop_from(self.path, first)  # lines that are gone: repeated steps, and torn ones
        self._lines = LineFile(self.path)

    def write(self, step: int, **fields: object) -> None:
        self._lines.append({"step": step, **fields})

    def close(self) -> None:
        self._lines.close()


def read_metrics(path: Path) -> list[dict]:
    """The records, in the order of the file; an empty list when there is no file."""
    return [record for record in read_lines(path) if isinstance(record.get("step"), int)]


def drop_from(path: Path, first: int) -> int:
    """Takes the records of step `first` and later out of a file of records, and torn lines; how many lines that are. Raises OSError."""
    if not path.exists():
        return 0
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = sum(1 for _ in file)
    kept = [record for record in read_metrics(path) if record["step"] < first]
    if len(kept) == lines and path.stat().st_size and _ends_with_newline(path):
        return 0
    with whole(path) as file:
        file.writelines(f"{json.dumps(encode(record), ensure_ascii=False, allow_nan=False)}\n".encode() for record in kept)
    return lines - len(kept)


def _ends_with_newline(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
