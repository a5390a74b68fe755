"""Code in the sandbox: how it ends, what it may use up, what is left of it. (Reaching for others: test_rewards_attacks.py.)"""
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sandboxes import HELD, KERNEL, NONE, WORLD, holders, scratch_of, sets

from rlhf.rewards import sandbox
from rlhf.rewards.sandbox import BARRIERS, Limits, SandboxFailed, run

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    yield from scratch_of(tmp_path, monkeypatch)


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
    assert outcome.end == "timeout" and outcome.exit == -signal.SIGKILL and 0.3 <= outcome.seconds < 60


def test_the_time_begins_with_the_code():
    """A limit shorter than what the barriers take, as they do on a machine with too much to do: the sandbox works all the same."""
    assert run("while True: pass", limits=Limits(seconds=0.001)).end == "timeout"


def test_tests_passed_before_the_time_was_up_count():
    outcome = run("", tests=["1", "while True: pass", "1"], limits=Limits(seconds=1.5))
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
    for wait, seconds, end in ((0.1, 60, "ended"), (60, 1, "timeout")):
        outcome = run(code.format(wait), limits=Limits(seconds=seconds, threads=100_000), barriers=barriers)
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


def test_status_cannot_be_written_by_the_code():
    """The pipe is closed before the code runs: among its files are the standard ones and that of the results."""
    outcome = run("import os\nfor fd in range(4096):\n  try: os.fstat(fd); print(fd)\n  except OSError: pass")
    assert len(json.loads("[" + ",".join(outcome.stdout.split()) + "]")) == 4
