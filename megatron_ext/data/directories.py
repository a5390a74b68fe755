"""Directories that appear whole or not at all: made beside their place under another name, put on disk, and renamed (files: megatron_ext/files.py)."""
import errno
import glob
import os
import shutil
import socket
from pathlib import Path


def temporary(output: Path) -> Path:
    """A new directory beside `output`, after removing those that killed processes of this machine left. Raises OSError."""
    output.parent.mkdir(parents=True, exist_ok=True)
    stem = f".{output.name}.{socket.gethostname()}."
    for left in output.parent.glob(f"{glob.escape(stem)}*"):
        number = left.name.removeprefix(stem)
        if number.isdecimal() and not _alive(int(number)):
            shutil.rmtree(left, ignore_errors=True)
    made = output.parent / f"{stem}{os.getpid()}"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    return made


def publish(made: Path, output: Path) -> bool:
    """Renames: atomic, onto nothing or an empty directory. Files are on disk before their name is.

    Returns: False when another process was first; `made` is then left as it is.

    Raises OSError.
    """
    for path in [*made.iterdir(), made]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    try:
        os.rename(made, output)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        return False
    return True


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
