"""Files that appear whole or not at all: written beside their place under another name, and renamed. Standard library alone."""
import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def whole(path: Path, *, sync: bool = True, mode: int = 0o666) -> Iterator[BinaryIO]:
    """A stream into a file that gets its name behind the block, whoever else writes it at this moment; after an error nothing has changed.

    Args:
        sync: the content is on disk before the name is; False where a lost file is made again.
        mode: of the file, less the umask's bits.

    Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # hidden: readers of a directory pass it over
    try:
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as stream:
            yield stream
            if sync:
                stream.flush()
                os.fsync(stream.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: str | bytes, *, sync: bool = True, mode: int = 0o666) -> None:
    """All of a file at once, as `whole` does; text as UTF-8. Raises OSError."""
    with whole(path, sync=sync, mode=mode) as stream:
        stream.write(content.encode() if isinstance(content, str) else content)
