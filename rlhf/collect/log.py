"""Records that are appended to a file of JSON lines and never changed: what people decided, what endpoints answered.

`append` returns when the record is on disk. A crash can leave at most the beginning of the last line; opening the file again moves that to
`NAME.torn` and goes on behind the last whole record. One process at a time holds the file (flock): a second one is refused.
"""
import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from megatron_ext.errors import UserError


def read(path: Path, *, key: str) -> Iterator[tuple[int, int, dict]]:
    """(offset, bytes, record) of each whole record, in order, without holding the file; another process may append meanwhile.

    Raises:
        UserError: a whole line that is no JSON object.
    """
    offset = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            if not isinstance(value, dict):
                raise UserError(key, f"{path}:{number}", "is no record: somebody else wrote into this file; take the line out by hand")
            yield offset, len(line), value
            offset += len(line)


class AppendLog:
    """An open log.

    Args:
        path: the file; made (mode 600) where it is missing, in a directory that is there.
        key: what the file is called in messages.
    Raises:
        UserError: it cannot be opened, another process holds it, or something in it is no record.
    """

    def __init__(self, path: Path, *, key: str):
        self.path, self._key = Path(path), key
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UserError(key, path, f"cannot be opened: {error.strerror}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._file)
            raise UserError(key, path, "is in use by another process; end that one, or name another directory") from None
        self._end, self._spoilt = self._mend(), False
        # The directory's entry of a new file has to reach the disk too.
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def records(self) -> Iterator[tuple[int, int, dict]]:
        """(offset, bytes, record) of each record, in order. Raises UserError: a whole line that is no JSON object."""
        return read(self.path, key=self._key)

    def append(self, record: dict) -> tuple[int, int]:
        """Writes a record and waits for the disk. Returns (offset, bytes). Raises OSError (disk full, ...), and then the file is as before."""
        line = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode("utf-8") + b"\n"
        written = 0
        try:
            if self._spoilt:  # what was left of a record could not be taken off at the time
                os.ftruncate(self._file, self._end)
            self._spoilt = True
            while written < len(line):
                written += os.write(self._file, line[written:])
            os.fsync(self._file)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._end)
                self._spoilt = False
            raise
        self._spoilt = False
        offset, self._end = self._end, self._end + len(line)
        return offset, len(line)

    def at(self, offset: int, size: int) -> dict:
        """The record that stands there."""
        return json.loads(os.pread(self._file, size, offset))

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _mend(self) -> int:
        """Takes off what a crash left of a line. Returns where the file ends now."""
        size = os.fstat(self._file).st_size
        end, step = size, 1 << 16
        while end > 0:
            begin = max(0, end - step)
            found = os.pread(self._file, end - begin, begin).rfind(b"\n")
            if found >= 0:
                end = begin + found + 1
                break
            end = begin
        if end < size:
            with self.path.with_name(self.path.name + ".torn").open("ab") as torn:
                torn.write(os.pread(self._file, size - end, end) + b"\n")
            os.ftruncate(self._file, end)
            os.fsync(self._file)
        return end
