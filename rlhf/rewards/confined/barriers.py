"""What a process on Linux can take from itself without being anybody special. Each says whether the kernel agreed.

    namespaces    no network (not even the loopback), no sight of other processes: no signals to them, and when the first process ends, all do
    mounts        all file systems read-only, the working directory a file system of its own with a size, /proc empty
    landlock      no file but those named (landlock(7)): read-only the Python library, freely the working directory; no TCP; no signal to others
    seccomp       no new process, no socket and more (seccomp.py)
    resources     limits of memory, CPU time, files and threads (setrlimit(2)); always
"""
import contextlib
import ctypes
import math
import os
import platform
import resource
import struct
import time
from collections.abc import Iterable

import seccomp

_NO_NEW_PRIVS, _PDEATHSIG, _SUBREAPER = 38, 1, 36
_NEWNS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_REC, _MS_PRIVATE, _MS_RDONLY = 2, 4, 0x4000, 1 << 18, 1
_NOBODY = 65534
# Landlock's rights over files: 1 = execute, 2 = write a file, 4 = read a file, 8 = read a directory, ..., by version of the interface.
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIRECTORY, _TRUNCATE = 1, 2, 4, 8, 1 << 14
_ALL_RIGHTS = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 4: 0x7FFF}  # from 5 on 0xFFFF


def _call(name: str, *arguments) -> int:
    """A function of the C library. Raises OSError where it returns -1."""
    library = ctypes.CDLL(None, use_errno=True)
    result = getattr(library, name)(*(ctypes.c_long(one) if isinstance(one, int) else one for one in arguments))
    if result == -1:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def follow_parent() -> None:
    """Killed when the process that started this one ends."""
    _call("prctl", _PDEATHSIG, 9, 0, 0, 0)


def adopt_orphans() -> None:
    """Descendants whose parents have ended become children of this process."""
    _call("prctl", _SUBREAPER, 1, 0, 0, 0)


def namespaces() -> bool:
    """The next child is the first process of a world of its own, in which it is nobody. This process must have a single thread."""
    user, group = os.geteuid(), os.getegid()
    try:
        _call("unshare", _NEWUSER | _NEWPID | _NEWNET | _NEWIPC | _NEWNS)
    except (OSError, AttributeError):
        return False
    with contextlib.suppress(OSError):  # without a map it is nobody all the same; only `mounts` needs one
        for name, text in (("setgroups", "deny"), ("uid_map", f"{_NOBODY} {user} 1"), ("gid_map", f"{_NOBODY} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    return True


def mounts(folder: str, *, size: int) -> bool:
    """After `namespaces`. `folder` becomes the working directory, empty, of at most `size` bytes in memory."""
    try:
        _call("mount", None, b"/", None, _MS_REC | _MS_PRIVATE, None)
        attributes = ctypes.create_string_buffer(struct.pack("=QQQQ", 3, 0, 0, 0))  # MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID
        at_fdcwd, recursive = -100, 0x8000
        _call("syscall", 442, at_fdcwd, b"/", recursive, attributes, 32)
        own = f"size={size},nr_inodes=1000,mode=700".encode()
        _call("mount", b"none", os.fsencode(folder), b"tmpfs", _MS_NOSUID | _MS_NODEV, own)
        _call("mount", b"none", b"/proc", b"tmpfs", _MS_NOSUID | _MS_RDONLY, None)
        os.chdir(folder)
    except (OSError, AttributeError):
        return False
    return True


def no_privileges() -> None:
    """No capability, and none by running a program."""
    _call("prctl", _NO_NEW_PRIVS, 1, 0, 0, 0)
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0))
    _call("capset", header, ctypes.create_string_buffer(24))


def landlock(folder: str, readable: Iterable[str]) -> bool:
    """Only `folder` (all but running programs) and what lies in `readable` (reading; devices also writing). After `no_privileges`."""
    try:
        version = _call("syscall", 444, None, 0, 1)
        rights = _ALL_RIGHTS.get(version, 0xFFFF)
        attributes = struct.pack("=QQQ", rights, 3, 3)  # files; binding and connecting TCP; abstract Unix sockets and signals
        size = 8 if version < 4 else 16 if version < 6 else 24
        rules = _call("syscall", 444, ctypes.create_string_buffer(attributes), size, 0)
        for path in (folder, *readable):
            reading = _READ_FILE | (_READ_DIRECTORY if os.path.isdir(path) else 0) | (_WRITE_FILE | _TRUNCATE if path == os.devnull else 0)
            _allow(rules, path, rights & (~_EXECUTE if path == folder else reading))
        _call("syscall", 446, rules, 0)
        os.close(rules)
    except (OSError, AttributeError):
        return False
    return True


def _allow(rules: int, path: str, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH)
    except FileNotFoundError:
        return
    _call("syscall", 445, rules, 1, ctypes.create_string_buffer(struct.pack("=Qi", rights, place)), 0)
    os.close(place)


def system_calls() -> bool:
    """After `no_privileges`."""
    return seccomp.install()


def resources(*, seconds: float, memory: int, file: int, files: int) -> None:
    """Limits that are only ever lowered: CPU time (beside what was used so far; rounded up), bytes of addresses, bytes of a file, open files."""
    _limit({
        resource.RLIMIT_CPU: math.ceil(seconds + time.process_time()), resource.RLIMIT_AS: memory, resource.RLIMIT_FSIZE: file, resource.RLIMIT_NOFILE: files,
        resource.RLIMIT_CORE: 0, resource.RLIMIT_MEMLOCK: 0, resource.RLIMIT_MSGQUEUE: 0,
    })  # fmt: skip


def processes(most: int) -> None:
    """Processes and threads of this user: in its namespace, where it has one; else all on the machine. The kernel does not count root's."""
    _limit({resource.RLIMIT_NPROC: most})


def _limit(wanted: dict[int, int]) -> None:
    for kind, value in wanted.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def is_linux() -> bool:
    return platform.system() == "Linux"
