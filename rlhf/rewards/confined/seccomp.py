"""A filter of system calls that Linux runs before each call of this process, and that it cannot take off again (seccomp(2), mode FILTER).

It is a list of what is refused, not of what is allowed: an interpreter needs too many calls for that. Refused with EPERM are new processes and
programs (threads are allowed), sockets, signals and limits for others, the attributes of files (Landlock does not cover chmod), System V memory
and memory files (which outlive or evade the limit on memory), mounts, namespaces, tracing, and doors into the kernel that a program has no
business with. Calls that are newer than the list do not exist for it (ENOSYS), and the C library then takes the older one.

The filter is a program of classic BPF over struct seccomp_data {int nr; u32 arch; u64 ip; u64 args[6]}.
"""
import ctypes
import errno
import os
import platform
import struct
import sys

NEWEST = 451  # cachestat; later numbers are the same on all architectures
CLONE_THREAD = 0x10000
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_*

# name: numbers on x86_64 and aarch64 (asm/unistd_64.h, asm-generic/unistd.h); None: there is no such call
REFUSED: dict[str, tuple[int | None, int | None]] = {
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "setsid": (112, 157), "setpgid": (109, 154),
    "socket": (41, 198), "io_uring_setup": (425, 425),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "process_madvise": (440, 440), "kcmp": (312, 272),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424), "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "migrate_pages": (256, 238), "move_pages": (279, 239),
    "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118), "sched_setattr": (314, 274),
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "chown": (92, None), "fchown": (93, 55), "lchown": (94, None),
    "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "mknod": (133, None), "mknodat": (259, 33), "open_by_handle_at": (304, 265),
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180), "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "mount_setattr": (442, 442),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "personality": (135, 92), "sethostname": (170, 161),
}  # fmt: skip
# Allowed for this process itself (first argument its number; 0 where that means the same), refused for others.
ITSELF: dict[str, tuple[int, int]] = {"kill": (62, 129), "tgkill": (234, 131), "prlimit64": (302, 261)}
CLONE, CLONE3 = (56, 220), 435

_LOAD, _EQUAL, _ABOVE, _ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_NUMBER, _ARCH, _FIRST = 0, 4, 16  # offsets; the lower half of the first argument, on little-endian machines
_ALLOW, _REFUSE, _ABSENT, _KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS, 0x80000000


def program(machine: str, process: int) -> list[tuple[int, int, int, int]]:
    """The filter as instructions (code, jump if true, jump if false, k).

    Args:
        machine: a key of ARCHITECTURES. process: the number that the filtered process has for itself.
    """
    column = list(ARCHITECTURES).index(machine)
    found = [
        (_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, ARCHITECTURES[machine]), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NUMBER),
        (_ABOVE, 0, 1, NEWEST), (_RETURN, 0, 0, _ABSENT), (_EQUAL, 0, 1, CLONE3), (_RETURN, 0, 0, _ABSENT),
        (_EQUAL, 0, 4, CLONE[column]), (_LOAD, 0, 0, _FIRST), (_ANY_BIT, 0, 1, CLONE_THREAD), (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE),
    ]  # fmt: skip
    for numbers in ITSELF.values():
        found += [(_EQUAL, 0, 5, numbers[column]), (_LOAD, 0, 0, _FIRST), (_EQUAL, 1, 0, process)]
        found += [(_EQUAL, 0, 1, 0) if numbers == ITSELF["prlimit64"] else (_RETURN, 0, 0, _REFUSE), (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE)]
    for numbers in REFUSED.values():
        if numbers[column] is not None:
            found += [(_EQUAL, 0, 1, numbers[column]), (_RETURN, 0, 0, _REFUSE)]
    return [*found, (_RETURN, 0, 0, _ALLOW)]


def install() -> bool:
    """From here on, in this process and for ever. False: this machine cannot, and nothing is changed. Needs PR_SET_NO_NEW_PRIVS to be set."""
    machine = platform.machine()
    if machine not in ARCHITECTURES or sys.maxsize < 2**32 or sys.byteorder != "little":
        return False
    instructions = program(machine, os.getpid())
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in instructions))

    class Program(ctypes.Structure):  # struct sock_fprog
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))

    filter_, mode = Program(len(instructions), ctypes.addressof(code)), 2
    return ctypes.CDLL(None, use_errno=True).prctl(22, mode, ctypes.byref(filter_), 0, 0) == 0
