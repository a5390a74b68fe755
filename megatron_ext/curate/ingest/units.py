"""The input, cut into tasks: which files there are, which source each belongs to, and which task reads it.

A function of the files' names and sizes, of the catalogue and of `task_bytes`, never of the machine: the same input has the same tasks everywhere. Large files
of JSON lines and Parquet are cut; the others are read by one task each.
"""
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.curate.ingest.catalogue import Source
from megatron_ext.curate.ingest.files import PACKED, kind_of, why_not
from megatron_ext.curate.ingest.items import Unreadable
from megatron_ext.curate.ingest.tabular import row_groups
from megatron_ext.errors import UserError

NO_FILE = "no file: a link that leads nowhere or to a folder, a pipe, or a folder that may not be looked into"


@dataclass(frozen=True)
class Unit:
    """A file, or a part of one.

    Attributes:
        source: name of its source. path: below the input, with `/` (the file's own name where the input is a file).
        kind: its reader. size: bytes of this unit on disk.
        start, stop: bytes (jsonl) or row groups (parquet); stop None = the whole file.
        number: of the file, from 1, in the order of all names.
    """

    source: str
    path: str
    kind: str
    size: int
    start: int = 0
    stop: int | None = None
    number: int = 0


@dataclass(frozen=True)
class SetAside:
    """A file that is not read, or a record of one, and why."""

    path: str
    position: str
    reason: str
    source: str | None = None
    number: int = 0  # of the file, where its name is not told as it is


def list_files(root: Path) -> list[tuple[str, int]]:
    """(path below `root`, bytes) of all files, in the order of their paths; what is hidden (a name that begins with a dot) is no input. What is there and is no
    file (a broken link, a link to a folder, a pipe, a folder that may not be looked into) has -1 bytes.

    Raises UserError: nothing there.
    """
    if root.is_file():
        return [(root.name, root.stat().st_size)]
    if not root.is_dir():
        raise UserError("input", root, "no such file or folder")
    found, closed = [], []
    for folder, below, names in os.walk(root, onerror=lambda error: closed.append(Path(error.filename))):
        below[:] = sorted(name for name in below if not name.startswith("."))
        links = [name for name in below if Path(folder, name).is_symlink()]  # not followed: they may lead round in a circle
        for name in (*names, *links):
            path = Path(folder, name)
            if not name.startswith("."):
                found.append((path.relative_to(root).as_posix(), path.stat().st_size if name not in links and path.is_file() else -1))
    if root in closed:
        raise UserError("input", root, "is a folder that may not be looked into")
    found += [(path.relative_to(root).as_posix(), -1) for path in closed]
    found.sort()
    if not found:
        raise UserError("input", root, "holds no file")
    return found


def place(root: Path, path: str) -> Path:
    """Where a unit's file is."""
    return root if root.is_file() else root / path


def fingerprint(root: Path, files: Iterable[tuple[str, int]]) -> str:
    """sha256 over names, sizes and modification times: the same one means the same input without reading it (as `make` and `rsync` hold)."""
    digest = hashlib.sha256()
    for path, size in files:
        changed = place(root, path).stat().st_mtime_ns if size >= 0 else 0
        digest.update(f"{path}\0{size}\0{changed}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def units_of(root: Path, files: Iterable[tuple[str, int]], catalogue: Sequence[Source], used: Sequence[Source], task_bytes: int) -> Iterator[Unit | SetAside]:
    """What each file is, in order. `used`: those of the catalogue's sources that the build reads."""
    for number, (path, size) in enumerate(files, 1):
        try:
            path.encode("utf-8")
        except UnicodeEncodeError:
            yield SetAside(path.encode("utf-8", "backslashreplace").decode(), "", "its name is not UTF-8: rename it")
            continue
        if size < 0:
            yield SetAside(path, "", NO_FILE)
            continue
        source = next((one for one in catalogue if one.holds(path)), None)
        if source is None or source not in used:
            yield SetAside(path, "", "in no source of the catalogue" if source is None else "its source is left out for its licence", source and source.name)
            continue
        kind = source.format if source.format != "auto" else kind_of(path)
        if kind is None:
            yield SetAside(path, "", why_not(path), source.name)
        elif size == 0:
            yield SetAside(path, "", "empty", source.name)
        elif kind == "jsonl" and size > task_bytes and not path.lower().endswith(PACKED):
            for start in range(0, size, task_bytes):
                yield Unit(source.name, path, kind, min(task_bytes, size - start), start, min(start + task_bytes, size), number)
        elif kind == "parquet" and size > task_bytes:
            yield from _row_groups(root, Unit(source.name, path, kind, size, number=number), task_bytes)
        else:
            yield Unit(source.name, path, kind, size, number=number)


def _row_groups(root: Path, unit: Unit, task_bytes: int) -> Iterator[Unit]:
    try:
        rows = row_groups(place(root, unit.path))
    except Unreadable:
        rows = []
    if len(rows) < 2:
        yield unit  # one group cannot be cut; what cannot be read is told by its task
        return
    share, start, held = unit.size / max(sum(rows), 1), 0, 0.0
    for number, count in enumerate(rows, 1):
        held += count * share
        if held >= task_bytes or number == len(rows):
            yield Unit(unit.source, unit.path, unit.kind, int(held), start, number, unit.number)
            start, held = number, 0.0


def tasks_of(units: Iterable[Unit], task_bytes: int) -> Iterator[list[Unit]]:
    """Units in order, gathered into tasks of about `task_bytes`."""
    task: list[Unit] = []
    held = 0
    for unit in units:
        if task and held + unit.size > task_bytes:
            yield task
            task, held = [], 0
        task.append(unit)
        held += unit.size
    if task:
        yield task
