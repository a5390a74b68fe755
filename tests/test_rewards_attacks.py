"""Code that reaches for what is not its own: files, secrets, the network, other processes, its barriers. The same code runs without barriers too and
has to succeed: else the test would show nothing."""
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from sandboxes import KERNEL, NONE, WORLD, scratch_of, sets

from rlhf.rewards.sandbox import BARRIERS, run


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    yield from scratch_of(tmp_path, monkeypatch)


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
        if not barriers:
            assert victims["kill"].wait(60) == -signal.SIGKILL
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
