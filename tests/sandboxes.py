"""What the tests of the sandbox share: sets of barriers, and what code has left behind."""
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf.rewards import sandbox

HELD = sandbox.available()
WORLD, KERNEL, NONE = ("namespaces", "mounts"), ("landlock", "seccomp"), ()  # what bare metal, and what a container, usually offers


def sets(*wanted: tuple[str, ...]):
    """Parameters for sets of barriers; those that this kernel does not offer are skipped, and said."""
    marks = {one: pytest.mark.skipif(not set(one) <= set(HELD), reason=f"this kernel holds only {HELD}") for one in wanted}
    return pytest.mark.parametrize("barriers", [pytest.param(one, marks=marks[one], id="+".join(one) or "none") for one in wanted])


def holders(path: Path) -> list[int]:
    """Processes that have a file open."""
    found = []
    for place in Path("/proc").glob("[0-9]*/fd"):
        try:
            links = [os.readlink(entry.path) for entry in os.scandir(place)]
        except OSError:
            continue
        if any(link.startswith(str(path)) for link in links):
            found.append(int(place.parent.name))
    return found


def scratch_of(tmp_path: Path, monkeypatch) -> Iterator[Path]:
    """The body of a fixture: where the sandbox makes its folders; empty afterwards."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []
