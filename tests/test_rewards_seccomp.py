"""The sandbox's filter of system calls, run by an interpreter of its own, for both processors; its table against the kernel's headers."""
import errno
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _seccomp():
    sys.path.insert(0, str(ROOT / "rlhf/rewards/confined"))
    try:
        import seccomp
    finally:
        del sys.path[0]
    return seccomp


def _verdict(program: list, number: int, arch: int, argument: int = 0) -> str:
    """What the kernel's interpreter of classic BPF makes of it, from its documentation."""
    place, value = 0, 0
    data = {0: number, 4: arch, 16: argument & 0xFFFFFFFF}
    while True:
        code, yes, no, k = program[place]
        place += 1
        if code == 0x20:
            value = data[k]
        elif code == 0x06:
            return {0x7FFF0000: "allow", 0x80000000: "kill"}.get(k) or errno.errorcode[k & 0xFFFF]
        else:
            place += yes if {0x15: value == k, 0x25: value > k, 0x45: bool(value & k)}[code] else no


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_means_what_its_table_says(machine):
    seccomp = _seccomp()
    program, column, arch = seccomp.program(machine, 77), list(seccomp.ARCHITECTURES).index(machine), seccomp.ARCHITECTURES[machine]
    refused = {name: numbers[column] for name, numbers in seccomp.REFUSED.items() if numbers[column] is not None}
    clone = seccomp.CLONE[column]
    special = {clone, 435, *(numbers[column] for numbers in seccomp.ITSELF.values())}
    for number in range(452):
        if number not in special:
            assert _verdict(program, number, arch) == ("EPERM" if number in refused.values() else "allow"), number
    assert {_verdict(program, number, arch) for number in (435, 452, 9999, 0x40000000 + 57)} == {"ENOSYS"}
    assert _verdict(program, clone, arch, 17) == "EPERM" and _verdict(program, clone, arch, 0x10000 | 0x100) == "allow"
    for name, numbers in seccomp.ITSELF.items():
        verdicts = [_verdict(program, numbers[column], arch, one) for one in (77, 1, -1, 0)]
        assert verdicts == ["allow", "EPERM", "EPERM", "allow" if name == "prlimit64" else "EPERM"], name
    assert _verdict(program, 0, 0x40000003) == "kill"  # 32-bit calls have other numbers
    header = Path({"x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "/usr/include/asm-generic/unistd.h"}[machine])
    if header.exists():
        known = {name: int(number) for name, number in re.findall(r"define __NR(?:3264)?_(\w+)\s+(\d+)\b", header.read_text())}
        named = refused | {"clone": clone, "clone3": 435} | {name: numbers[column] for name, numbers in seccomp.ITSELF.items()}
        assert {name: known.get(name, number) for name, number in named.items()} == named
        assert {name for name in named if name not in known} <= {"memfd_secret"}  # newer than the header
