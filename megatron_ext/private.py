"""Run directories belong to their owner alone (`run.private`): what a run learns from, says and saves is not for every account of a cluster.

Two things make it so: the directory itself is made with mode 700, and the process's umask is 077 from then on, so that every file and folder
that it or its children (the checkpoint writer, wandb) make is 600 or 700, also in a directory that was there before. Directories and files that
exist are left as they are. With `run.private=false` the umask of the user or site decides, as a team's shared tree wants it (umask 007).
"""
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from megatron_ext.errors import UserError

UMASK = 0o077


def make_directory(path: Path, *, private: bool) -> None:
    """Makes a run directory where it is missing; its parents are made as the umask says, since other runs will lie there. Raises UserError."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700 if private else 0o777, exist_ok=True)
    except OSError as error:
        raise UserError("run.dir", path, f"cannot be written: {error.strerror}") from None


def own_files(*, private: bool) -> int:
    """From now on this process makes files for its owner alone (`private`), or as it did. Returns the umask that held before.

    To be called once the run directory is made. Caches that runs share (prepared data) are made inside `umask(before)`.
    """
    before = os.umask(UMASK)
    if not private:
        os.umask(before)
    return before


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    """What is made inside has modes without the bits of `mask`."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)
