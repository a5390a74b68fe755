"""Runs Python code that a model has written, in a process that can do little more than compute.

    outcome = run("def double(x): return 2 * x", tests=["assert double(2) == 4"])

Between the code and the machine stand, each where the kernel offers it (`confined/barriers.py`; `Outcome.barriers` says which held):

| barrier | what it stops |
|---|---|
| a process of its own, timed | endless loops, endless sleep, endless output |
| resources | memory, CPU time, large files, many files, core dumps |
| namespaces | the network; other processes cannot be seen, signalled or left behind |
| mounts | writing any file: all is read-only but a small file system in memory that vanishes |
| landlock | reading or writing a file outside the Python library and the working directory; TCP; signals to others |
| seccomp | new processes and programs, sockets, signals and priorities of others, attributes of files, shared memory |

The code sees an empty environment, an empty working directory, no standard input but what it is given, no installed packages (the standard library
alone), and hashes with a fixed seed, so that it gives the same today and tomorrow. No shell is involved.

What this is not. It is no boundary against an attacker who has an exploit for the kernel: a virtual machine is. With `namespaces` or `seccomp` missing,
code can open connections; with neither, it can leave processes and signal this user's. With `mounts` and `landlock` missing it can do to files what this
user can. Root is not counted by the kernel's limit on processes. And tests run in the process of the code that they test: code that replaces what a
test uses, or looks for the pipe that its results go through, passes. For programs judged by their output that door does not exist.
"""
import contextlib
import functools
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

BARRIERS = ("namespaces", "mounts", "landlock", "seccomp")
GRACE = 30.0  # seconds that the supervisor may take around the program's own, on a machine with too much to do


@dataclass(frozen=True, kw_only=True)
class Limits:
    """seconds: by the clock, from the code's first line on, and of CPU time (rounded up). The rest in bytes, or how many."""

    seconds: float = 5.0
    memory: int = 512 << 20
    disk: int = 16 << 20
    output: int = 64 << 10  # of standard output, and of standard error
    files: int = 32
    threads: int = 16


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How it went.

    Attributes:
        end: ended (by itself, or the kernel ended it for a limit: see exit) | timeout | output (wrote more than it may).
        exit: exit code; minus the number of the signal that ended it. 0 only when code and tests all went well.
        passed: tests that passed, by number.
        stdout, stderr: at most Limits.output bytes of each, as text.
        barriers: of BARRIERS, those that held.
    """

    end: str
    exit: int
    passed: frozenset[int]
    stdout: str
    stderr: str
    barriers: tuple[str, ...]
    seconds: float
    cpu_seconds: float

    @property
    def ok(self) -> bool:
        return self.end == "ended" and self.exit == 0


class SandboxFailed(RuntimeError):
    """The sandbox itself did not work: nothing is known of the code."""


def run(code: str, *, tests: Sequence[str] = (), stdin: str | None = None, limits: Limits | None = None, barriers: Sequence[str] = BARRIERS) -> Outcome:
    """Runs `code` as the module `solution`, then each test in that module; with `stdin`, as the module `__main__` that reads it.

    Args:
        barriers: those to try.
    Raises:
        SandboxFailed: not because of the code.
        ValueError: tests and stdin at once.
    """
    if tests and stdin is not None:
        raise ValueError("a program has tests or an input, not both")
    if sys.platform != "linux":
        raise SandboxFailed("running code of a model needs Linux")
    limits, word = limits or Limits(), secrets.token_hex(8)
    with _folder() as folder, tempfile.TemporaryFile() as job, _pipe() as status, _pipe() as results:
        job.write(json.dumps({
            "code": code, "tests": list(tests), "main": stdin is not None, "stdin": stdin or "", "folder": folder, "readable": _readable(),
            "barriers": list(barriers), "seconds": limits.seconds, "cpu_seconds": limits.seconds, "memory": limits.memory, "disk": limits.disk,
            "files": limits.files, "threads": limits.threads, "word": word, "parent": os.getpid(), "status": status.writing, "results": results.writing,
        }).encode())  # fmt: skip
        job.seek(0)
        # -I would also ignore PYTHONHASHSEED; what else it does stands here. -S: no site-packages. -B: writes no bytecode.
        command = [sys.executable, "-s", "-P", "-S", "-B", "-X", "utf8", "-W", "ignore", str(Path(__file__).with_name("confined"))]
        supervisor = subprocess.Popen(command, stdin=job, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder, env={"PYTHONHASHSEED": "0"},
                                      start_new_session=True, pass_fds=(status.writing, results.writing))  # fmt: skip
        try:
            status.close_writing(), results.close_writing()
            read, overflow = _read(supervisor, status.reading, results.reading, limits)
        finally:
            if supervisor.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(supervisor.pid, signal.SIGKILL)
            supervisor.wait()
            supervisor.stdout.close(), supervisor.stderr.close()
    return _outcome(read, overflow, word, len(tests))


@functools.cache
def available() -> tuple[str, ...]:
    """The barriers that hold on this machine, found by running nothing inside them. Raises SandboxFailed."""
    return run("").barriers


@dataclass
class _Pipe:
    reading: int
    writing: int

    def close_writing(self) -> None:
        if self.writing >= 0:
            os.close(self.writing)
        self.writing = -1


@contextlib.contextmanager
def _pipe() -> Iterator[_Pipe]:
    pipe = _Pipe(*os.pipe())
    try:
        yield pipe
    finally:
        os.close(pipe.reading)
        pipe.close_writing()


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="sandbox-")
    try:
        yield folder
    finally:
        remove(folder)


def remove(folder: str) -> None:
    """Deletes a folder whatever is in it: folders without permissions, or nested deeper than a path can be long. Follows no link."""
    how = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
    here = os.open(folder, how)
    try:
        names, left = [], [_unlink_files(here)]  # of the folders from `folder` down to here; what is still in each
        while names or left[-1]:
            if left[-1]:
                names.append(left[-1].pop())
                os.chmod(names[-1], 0o700, dir_fd=here)
                there = os.open(names[-1], how, dir_fd=here)
                left.append(_unlink_files(there))
            else:
                left.pop()
                there = os.open("..", how, dir_fd=here)
                os.rmdir(names.pop(), dir_fd=there)
            here, before = there, here
            os.close(before)
    finally:
        os.close(here)
    os.rmdir(folder)


def _unlink_files(folder: int) -> list[str]:
    """Deletes what is no folder. The names of the folders."""
    with os.scandir(folder) as entries:
        folders = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
    for name in [name for name, is_folder in folders.items() if not is_folder]:
        os.unlink(name, dir_fd=folder)
    return [name for name, is_folder in folders.items() if is_folder]


def _readable() -> list[str]:
    library = {os.path.dirname(os.__file__), sysconfig.get_path("stdlib"), os.path.join(sys.base_prefix, "lib")}
    system = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo", "/dev/null", "/dev/zero", "/dev/urandom")
    return [*sorted(library), *system]


def _read(supervisor: subprocess.Popen, status: int, results: int, limits: Limits) -> tuple[dict[str, bytearray], bool]:
    """What came through each pipe until the supervisor ended, and whether it was more than it may be (then the program is stopped)."""
    read = {name: bytearray() for name in ("stdout", "stderr", "status", "results")}
    overflow, deadline = False, time.monotonic() + limits.seconds + GRACE
    with selectors.DefaultSelector() as waiting:
        for name, file in (("stdout", supervisor.stdout.fileno()), ("stderr", supervisor.stderr.fileno()), ("status", status), ("results", results)):
            os.set_blocking(file, False)
            waiting.register(file, selectors.EVENT_READ, name)
        while status in waiting.get_map():
            ready = waiting.select(max(0.0, deadline - time.monotonic()))
            if not ready and time.monotonic() >= deadline:
                break
            for key, _ in ready:
                overflow = _take(key, read, waiting, limits.output) or overflow
            if overflow and supervisor.poll() is None:
                supervisor.terminate()
        for key in list(waiting.get_map().values()):  # what is still in the pipes; somebody may hold their other ends for ever
            while key.fileobj in waiting.get_map() and len(read[key.data]) <= limits.output and _waits(key.fileobj):
                overflow = _take(key, read, waiting, limits.output) or overflow
    return read, overflow


def _take(key: selectors.SelectorKey, read: dict[str, bytearray], waiting: selectors.BaseSelector, most: int) -> bool:
    """Reads once. Whether that is more than allowed: then no more is read."""
    part = os.read(key.fileobj, 1 << 16)
    read[key.data] += part
    overflow = len(read[key.data]) > (most if key.data.startswith("std") else 1 << 20)
    if not part or overflow:
        waiting.unregister(key.fileobj)
    return overflow


def _waits(file: int) -> bool:
    with selectors.DefaultSelector() as look:
        look.register(file, selectors.EVENT_READ)
        return bool(look.select(0))


def _outcome(read: dict[str, bytearray], overflow: bool, word: str, count: int) -> Outcome:
    said: dict = {}
    for line in read["status"].splitlines():
        said |= json.loads(line)
    if "barriers" not in said or "end" not in said or "broken" in said:
        reason = said.get("broken") or bytes(read["stderr"][-300:]).decode("utf-8", "replace").strip() or "it gave no answer"
        raise SandboxFailed(f"the sandbox did not work: {reason}")
    lines = set(read["results"].decode("utf-8", "replace").split("\n"))
    return Outcome(
        end="output" if overflow else said["end"], exit=said["exit"], passed=frozenset(number for number in range(count) if f"{word} {number}" in lines),
        barriers=tuple(said["barriers"]), seconds=said["seconds"], cpu_seconds=said["cpu"],
        **{name: bytes(read[name]).decode("utf-8", "replace") for name in ("stdout", "stderr")},
    )  # fmt: skip
