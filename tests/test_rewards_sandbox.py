"""Code that means harm, run for real. Where a barrier is said to stop something, the same code runs without it too and has to succeed: else the test
would show nothing."""
import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from rlhf.rewards import sandbox
from rlhf.rewards.sandbox import BARRIERS, Limits, SandboxFailed, run

ROOT = Path(__file__).resolve().parent.parent
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


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Where the sandbox makes its folders; empty afterwards."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


# ---- what it is for ----------------------------------------------------------------------------------------------------------------

def test_how_code_ends(scratch):
    good = run("def double(x): return 2 * x", tests=["assert double(2) == 4", "assert double(0) == 1", "assert double('a') == 'aa'", "double.x"])
    assert (good.end, good.exit, good.passed, good.ok) == ("ended", 1, {0, 2}, False)
    assert good.barriers == HELD and "AssertionError" in good.stderr
    everything = run("import dataclasses, threading\n@dataclasses.dataclass\nclass A:\n    x: 'int' = 1\n", tests=["A(2)", "threading.Thread(target=A).start()"])
    assert everything.ok and everything.passed == {0, 1}
    program = run("import sys\nif __name__ == '__main__':\n    print(sum(map(int, sys.stdin.read().split())), input.__name__, '안녕')", stdin="1 2\n3 ")
    assert program.ok and program.stdout == "6 input 안녕\n"
    assert [run(code).exit for code in ("1 / 0", "raise SystemExit(3)", "def f(:", "'\\ud800'.encode()", "\0", "\ud800")] == [1, 3, 1, 1, 1, 1]
    assert run("import sys\nassert sys.stdin.read() == ''\nassert __name__ == 'solution'").ok
    with pytest.raises(ValueError, match="not both"):
        run("", tests=["1"], stdin="")


def test_the_same_each_time_and_nothing_to_see():
    code = "import os, sys; print(hash('a'), set('abcdefgh'), dict(os.environ), os.listdir(), sys.argv, [p for p in sys.path if 'site-packages' in p])"
    one, two = run(code), run(code)
    assert one.ok and one.stdout == two.stdout and "} {} [] ['solution.py'] []" in one.stdout
    assert run("import torch").exit == run("import rlhf").exit == run("import barriers").exit == 1


@pytest.mark.parametrize("code", [
    "import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit",
    """
import os
for fd in range(3, 40):
    for line in (b'{"end": "ended", "exit": 0}\\n', b'word 0\\n', b'0\\n'):
        try: os.write(fd, line)
        except OSError: pass
os._exit(0)
""",
    "def f(): return 1\nimport threading, time\nthreading.Thread(target=time.sleep, args=(9,)).start()\nraise ValueError",
])  # fmt: skip
def test_tests_that_did_not_run_have_not_passed(code):
    outcome = run(code, tests=["assert f() == 1"])
    assert outcome.end == "ended" and outcome.passed == frozenset()


# ---- too much ----------------------------------------------------------------------------------------------------------------------

@sets(BARRIERS, NONE)
@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(99)", "import signal, time\nsignal.pthread_sigmask(0, range(1, 65))\ntime.sleep(99)"],
                         ids=["loop", "sleep", "blocked"])
def test_without_end(scratch, barriers, code):
    outcome = run(code, limits=Limits(seconds=0.3), barriers=barriers)
    assert outcome.end == "timeout" and outcome.exit == -signal.SIGKILL and 0.3 <= outcome.seconds < 10


def test_tests_passed_before_the_time_was_up_count():
    outcome = run("", tests=["1", "while True: pass", "1"], limits=Limits(seconds=0.3))
    assert outcome.end == "timeout" and outcome.passed == {0}


@pytest.mark.parametrize("where", ["stdout", "stderr"])
def test_output_without_end(scratch, where):
    outcome = run(f"import sys\nwhile True: sys.{where}.write('x' * 1000)", limits=Limits(output=10_000))
    assert outcome.end == "output" and 10_000 < len(getattr(outcome, where)) <= 10_000 + (1 << 16)
    assert run("print('x' * 9_999)", limits=Limits(output=10_000)).ok


@sets(BARRIERS, NONE)
def test_memory_and_files(scratch, barriers):
    limits = Limits(memory=128 << 20, disk=1 << 20)
    hogs = {
        "b = bytearray(1 << 30)": "MemoryError", "l = []\nwhile True: l.append(bytearray(1 << 20))": "MemoryError",
        "import mmap; mmap.mmap(-1, 1 << 30)": "Cannot allocate", "open('a', 'wb').write(b'x' * (2 << 20))": "File too large|No space left",
        "[open(f'{i}', 'w') for i in range(100)]": "Too many open files", "def f(): f()\nf()": "RecursionError",
    }
    for code, reason in hogs.items():
        outcome = run(code, limits=limits, barriers=barriers)
        assert outcome.end == "ended" and outcome.exit == 1 and re.search(reason, outcome.stderr), (code, outcome)


@sets(WORLD)
def test_many_files_fill_nothing_but_their_own(scratch, barriers):
    code = "n = 0\ntry:\n  while True:\n    open(f'{n}', 'wb').write(b'x' * 50000); n += 1\nexcept OSError as e: print(n, e.errno)"
    outcome = run(code, limits=Limits(disk=1 << 20), barriers=barriers)
    count, number = map(int, outcome.stdout.split())
    assert number == errno.ENOSPC and 15 <= count <= 21


# ---- what it must not touch --------------------------------------------------------------------------------------------------------

WRITES = {
    "write": "open(path, 'w').write('changed')", "append": "open(path, 'a').write('changed')", "truncate": "os.truncate(path, 0)", "unlink": "os.unlink(path)",
    "rename": "os.rename(path, path + '.moved')", "replace": "open('mine', 'w').close(); os.replace('mine', path)", "link": "os.link(path, path + '.too')",
    "create": "open(path + '.new', 'w').close()", "folder": "os.mkdir(path + '.folder')", "mode": "os.chmod(path, 0o777)", "times": "os.utime(path, (1, 1))",
    "symlink": "os.symlink(path, 'there'); open('there', 'a').write('changed')", "attribute": "os.setxattr(path, 'user.a', b'b')",
}  # fmt: skip


@sets(BARRIERS, WORLD, KERNEL, NONE)
def test_files_of_others(scratch, tmp_path, barriers):
    """All in one program, each attempt on a file of its own; what an attempt changed is looked up afterwards."""
    os.chmod(tmp_path, 0o755)
    for name in WRITES:
        (tmp_path / name).write_text("as it was")
        os.utime(tmp_path / name, (10, 10))
    code = "import os\n" + "".join(f"path = {str(tmp_path / name)!r}\ntry: {code}\nexcept OSError: pass\n" for name, code in WRITES.items())

    def state(name: str) -> tuple:
        path = tmp_path / name
        if not path.exists():
            return ("gone",)
        others = sorted(one.name for one in tmp_path.glob(f"{name}.*"))
        return path.read_text(), path.stat().st_mode, path.stat().st_mtime, path.stat().st_nlink, os.listxattr(path), others

    before = {name: state(name) for name in WRITES}
    assert run(code, barriers=barriers).ok
    changed = {name for name in WRITES if state(name) != before[name]}
    assert changed == set() if barriers else changed >= set(WRITES) - {"attribute", "replace"}  # of the file system, of the same one


@sets(BARRIERS, KERNEL, NONE)
def test_secrets(scratch, tmp_path, barriers):
    secret, environment = tmp_path / "secret", Path(f"/proc/{os.getpid()}/environ")
    secret.write_text("a key")
    os.chmod(tmp_path, 0o755)
    read = {path for path in (secret, Path("/etc/passwd"), environment) if run(f"open({str(path)!r}).read()", barriers=barriers).ok}
    # Root's processes are not to be read by one without root's privileges, which no barrier is needed for.
    assert read == set() if barriers else read - {environment} == {secret, Path("/etc/passwd")}


@sets(WORLD)
def test_other_processes_cannot_be_seen_without_landlock(barriers):
    assert not run(f"open('/proc/{os.getpid()}/environ').read()", barriers=barriers).ok
    assert run("import os; print(os.listdir('/proc'))", barriers=barriers).stdout == "[]\n"


@sets(BARRIERS, WORLD, KERNEL, NONE)
def test_network(scratch, tmp_path, barriers):
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), timeout=1)"
        outcome = run(code, barriers=barriers)
        assert outcome.ok == (not barriers), outcome.stderr
    if "seccomp" in barriers:
        assert "not permitted" in run("import socket; socket.socket(socket.AF_UNIX)", barriers=barriers).stderr


ATTACKS = {"kill": "os.kill(pid, 9)", "stop": "os.kill(pid, 19)", "priority": "os.setpriority(os.PRIO_PROCESS, pid, 19)",
           "limits": "resource.prlimit(pid, resource.RLIMIT_NOFILE, (5, 5))", "cores": "os.sched_setaffinity(pid, {0})"}  # fmt: skip


@sets(BARRIERS, WORLD, KERNEL, NONE)
def test_other_processes(scratch, barriers):
    victims = {name: subprocess.Popen(["sleep", "60"]) for name in ATTACKS}
    try:
        code = "import os, resource\n" + "".join(f"pid = {victims[name].pid}\ntry: {code}; print('{name}')\nexcept OSError: pass\n" for name, code in ATTACKS.items())
        outcome = run(code, barriers=barriers)
        done = set(outcome.stdout.split())
        # Root's priorities need root's privileges, which the program has not got in any case.
        assert done == set() if barriers else done >= {"kill", "stop", "limits"}, outcome
        assert (victims["kill"].poll() is None) == bool(barriers)
    finally:
        for victim in victims.values():
            victim.kill()
            victim.wait()


@sets(BARRIERS, WORLD, KERNEL)
def test_its_supervisor_and_itself(barriers):
    """Its parent is out of reach; what it does to itself is its own end."""
    attempt = run("import os\nparent = os.getppid()\nos.kill(parent, 9) if parent else None\nprint('went on')", barriers=barriers)
    assert attempt.end == "ended" and ("not permitted" in attempt.stderr) == ("namespaces" not in barriers)
    assert run("import os; os.kill(os.getpid(), 11)", barriers=KERNEL).exit == -signal.SIGSEGV
    assert run("import os; os.abort()", barriers=barriers).exit == -signal.SIGABRT or "namespaces" in barriers
    assert run("import ctypes; ctypes.string_at(0)", barriers=barriers).exit == -signal.SIGSEGV


@sets(BARRIERS, WORLD)
def test_barriers_cannot_be_taken_down(tmp_path, barriers):
    os.chmod(tmp_path, 0o755)
    code = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for call in (("umount2", b"/proc", 2), ("mount", None, b"/", None, 32 | 4096, None), ("mount", b"none", {str(tmp_path).encode()!r}, b"tmpfs", 0, None),
             ("chroot", b"/"), ("sethostname", b"a", 1), ("setuid", 0), ("unshare", 0x40000000)):
    print(call[0], getattr(libc, call[0])(*call[1:]))
"""
    assert {line.split()[1] for line in run(code, barriers=barriers).stdout.splitlines()} == {"-1"}


# ---- what is left of it ------------------------------------------------------------------------------------------------------------

@sets(WORLD, NONE)
def test_no_process_is_left(scratch, tmp_path, barriers):
    """Twenty children in sessions of their own, each with a child, that ignore what they can and hold a file and the pipes."""
    marker = tmp_path / "marker"
    marker.touch()
    os.chmod(tmp_path, 0o755)
    code = f"""
import os, signal, time
held = open({str(marker)!r})
for _ in range(20):
    if os.fork() == 0:
        os.setsid()
        os.fork()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
        os._exit(0)
time.sleep({{}})
print("left them")
"""
    for wait, end in ((0.1, "ended"), (60, "timeout")):
        outcome = run(code.format(wait), limits=Limits(seconds=1, threads=100_000), barriers=barriers)
        assert outcome.end == end and (outcome.stdout == "left them\n") == (end == "ended")
        assert holders(marker) == []


@sets(BARRIERS, KERNEL)
def test_new_processes_and_programs(scratch, barriers):
    code = """
import ctypes, os, subprocess, threading
def attempt(f):
    try: f()
    except OSError as error: print(error.errno)
    else: print("did")
for f in (os.fork, lambda: os.posix_spawn("/bin/true", ["true"], {}), lambda: os.execv("/bin/true", ["true"]), lambda: subprocess.run(["true"]),
          os.setsid, lambda: os.setpgid(0, 0), lambda: os.memfd_create("a")):
    attempt(f)
thread = threading.Thread(target=print, args=("thread",)); thread.start(); thread.join()
"""
    outcome = run(code, barriers=barriers)
    assert set(outcome.stdout.split()) == {str(errno.EPERM), "thread"} and outcome.ok
    bomb = run("import os\nwhile True:\n  try: os.fork()\n  except OSError: pass", limits=Limits(seconds=0.3), barriers=barriers)
    assert bomb.end == "timeout" and bomb.stderr == ""


@pytest.mark.skipif(os.geteuid() == 0, reason="the kernel does not count root's processes")
@sets(WORLD, NONE)
def test_processes_are_counted_where_no_filter_refuses_them(scratch, barriers):
    code = "import os, time\nfor _ in range(200):\n  try:\n    if os.fork() == 0: time.sleep(60)\n    print('x')\n  except OSError: pass"
    outcome = run(code, limits=Limits(threads=12), barriers=barriers)
    assert outcome.ok and outcome.stdout.count("x") < 12 and (outcome.stdout.count("x") > 5 or not barriers)


def test_folders_that_are_hard_to_delete(scratch, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o755)
    (outside / "file").write_text("as it was")
    code = f"""
import os
os.symlink({str(outside)!r}, "link")
os.mkdir("closed"); open("closed/file", "w").close(); os.chmod("closed", 0)
for _ in range(1500):
    os.mkdir("deep"); os.chdir("deep")
"""
    assert run(code, barriers=()).ok
    assert (outside / "file").read_text() == "as it was" and outside.stat().st_mode & 0o777 == 0o755


@sets(NONE)
def test_it_ends_with_who_started_it(tmp_path, barriers):
    marker = tmp_path / "marker"
    marker.touch()
    code = f"held = open({str(marker)!r})\nwhile True: pass"
    starter = f"from rlhf.rewards.sandbox import *; run({code!r}, limits=Limits(seconds=60), barriers=())"
    process = subprocess.Popen([sys.executable, "-c", starter], env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)})
    _until(lambda: holders(marker))
    process.kill()
    process.wait()
    _until(lambda: not holders(marker))


def _until(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_sandbox_that_does_not_work_says_nothing_about_the_code(monkeypatch, scratch):
    monkeypatch.setattr(sandbox.sys, "executable", "/bin/false")
    with pytest.raises(SandboxFailed, match="gave no answer"):
        run("1")
    monkeypatch.undo()
    with pytest.raises(SandboxFailed, match="did not work: ValueError"):  # in the program's process, before the program
        run("1", limits=Limits(threads=-5))


# ---- the filter of system calls ----------------------------------------------------------------------------------------------------

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


def test_status_cannot_be_written_by_the_code():
    """The pipe is closed before the code runs: among its files are the standard ones and that of the results."""
    outcome = run("import os\nfor fd in range(64):\n  try: os.fstat(fd); print(fd)\n  except OSError: pass")
    assert len(json.loads("[" + ",".join(outcome.stdout.split()) + "]")) == 4
