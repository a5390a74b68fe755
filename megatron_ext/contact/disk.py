"""The run directory: can it be written, is what comes back what was written, how fast, and is it the same directory on every node? No torch."""
import contextlib
import os
import secrets
import shutil
import socket
import time
from pathlib import Path

BLOCK = 1 << 20


def measure(directory: Path, size: int) -> dict:
    """Writes `size` bytes (at least one block of 1 MiB) to a file of its own, puts them on disk, reads them back past the cache, removes the file.

    Returns: `write_mb_s` and `read_mb_s` (10^6 bytes a second; the write includes fsync), `free_gib`, `damaged` (blocks that came back different).
    Raises: OSError where that cannot be done.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    name = directory / f".node_check.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"
    content, blocks = secrets.token_bytes(BLOCK - 8), max(1, size // BLOCK)
    handle = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        began = time.perf_counter()
        for number in range(blocks):
            _write(handle, number.to_bytes(8, "little") + content)
        os.fsync(handle)
        written = time.perf_counter() - began
        if hasattr(os, "posix_fadvise"):  # else the page cache would answer
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.lseek(handle, 0, os.SEEK_SET)
        damaged, began = 0, time.perf_counter()
        for number in range(blocks):
            damaged += _read(handle) != number.to_bytes(8, "little") + content
        read = time.perf_counter() - began
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):
            name.unlink()
    megabytes = blocks * BLOCK / 1e6
    return {
        "write_mb_s": megabytes / max(written, 1e-9), "read_mb_s": megabytes / max(read, 1e-9), "damaged": damaged,
        "free_gib": shutil.disk_usage(directory).free / 2**30,
    }


def _write(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view):]


def _read(handle: int) -> bytes:
    parts, left = [], BLOCK
    while left and (part := os.read(handle, left)):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def leave_word(directory: Path, word: str) -> Path:
    """Leaves a file that the other nodes should see. Raises OSError."""
    path = Path(directory) / f".node_check.{word}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(word, encoding="utf-8")
    return path


def sees_word(directory: Path, word: str, *, seconds: float = 5.0) -> bool:
    """Whether the file that `leave_word` made elsewhere is seen here; network file systems may take a moment."""
    path, deadline = Path(directory) / f".node_check.{word}", time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            if path.read_text(encoding="utf-8") == word:
                return True
        if time.monotonic() > deadline:
            return False
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # makes NFS look again
        time.sleep(0.2)
