"""Bytes of a plain, gzip or zstd file in chunks, with a truncated or damaged file named instead of silently cut short.

`zstandard`'s own stream reader ends without an error where a frame is cut off, and `gzip` needs three kinds of exceptions caught, so both are
fed here by hand: a file is whole if its last frame (member) ended exactly with the file.
"""
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_ext.errors import UserError

CHUNK = 1 << 18  # bytes read at once: 256 KiB


def file_chunks(path: Path, *, read: Callable[[int], None] = lambda size: None) -> Iterator[bytes]:
    """Decompressed chunks of `path` (by its last suffix: .gz, .zst, else as it is).

    Args:
        path: file to read.
        read: called with the number of bytes taken from disk, for a progress bar.

    Raises:
        UserError: unreadable, truncated or damaged file.
    """
    if path.suffix == ".gz":
        return _decompressed(path, read, lambda: zlib.decompressobj(wbits=31), (zlib.error,), b"\0")
    if path.suffix == ".zst":
        import zstandard

        return _decompressed(path, read, lambda: zstandard.ZstdDecompressor().decompressobj(), (zstandard.ZstdError,), b"")
    return _raw(path, read)


def _raw(path: Path, read: Callable[[int], None]) -> Iterator[bytes]:
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                read(len(chunk))
                yield chunk
    except OSError as error:
        raise UserError("input", path, f"cannot be read: {error.strerror}") from error


def _decompressed(path: Path, read: Callable[[int], None], new: Callable, errors: tuple, padding: bytes) -> Iterator[bytes]:
    frame, whole = None, False
    for chunk in _raw(path, read):
        while chunk:
            if frame is None:
                chunk = chunk.lstrip(padding) if padding and whole else chunk  # gzip allows zeros behind its last member
                if not chunk:
                    break
                frame = new()
            try:
                text = frame.decompress(chunk)
            except errors as error:
                raise UserError("input", path, f"damaged {path.suffix} file ({error}); make it anew from its source") from error
            if text:
                yield text
            if frame.eof:
                chunk, frame, whole = frame.unused_data, None, True
            else:
                chunk = b""
    if frame is not None or not whole:
        raise UserError("input", path, f"truncated {path.suffix} file: it ends before its compressed data does; copy or make it anew")


def lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines without their `\\n`, split at that byte alone: text may hold `\\r`, U+2028 or NUL and keep them."""
    rest: list[bytes] = []
    for chunk in chunks:
        parts = chunk.split(b"\n")
        if len(parts) == 1:
            rest.append(chunk)
            continue
        yield b"".join(rest) + parts[0]
        yield from parts[1:-1]
        rest = [parts[-1]]
    if last := b"".join(rest):
        yield last
