"""Programs in processes that were forked from one which has imported torch and megatron-core: five processor seconds less a process.

What runs is the same program (`-m megatron_ext`, a file, or `-c text`) in a process of its own, with its own environment, folder, files and exit code;
imports alone are shared. tests/test_cli.py, test_launch.py, test_run.py, test_slurm.py and others type the real command; MEGATRON_EXT_FORK=no types it
everywhere.
"""
import atexit
import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
READ_AT_IMPORT = ("PYTHONPATH", "OMP_NUM_THREADS", "TRITON_INTERPRET", "PYTHONWARNINGS", "CUDA_VISIBLE_DEVICES", "LD_PRELOAD")
IMPORTS = ("megatron_ext.cli.main", "megatron_ext.cli.verbs.train", "megatron_ext.cli.verbs.evaluate", "megatron_ext.cli.verbs.generate",
           "megatron_ext.train.pretrain", "megatron_ext.train.life", "megatron_ext.checkpoint", "rlhf.ppo", "rlhf.sft", "rlhf.reward", "rlhf.dpo", "rlhf.grpo")
WHERE_INSTALLED = ("fastapi", "uvicorn", "rlhf.collect.server", "rlhf.collect.own")
_servers: dict[tuple, "Server"] = {}


class Process:
    """A program under way; what this file needs of `subprocess.Popen`."""

    def __init__(self, server: "Server", pid: int):
        self.server, self.pid, self.code = server, pid, None

    def poll(self) -> int | None:
        if self.code is None:
            self.code = self.server.ask(poll=self.pid)["code"]
        return self.code

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.02)
        return self.code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def start(arguments: Sequence[str], *, env: dict[str, str], out: Path | None, error: Path, quiet: bool = False) -> "Process | subprocess.Popen":
    """`python ARGUMENTS` with its output in files (out=None: where this process's goes). quiet: as with `-W ignore`."""
    if os.environ.get("MEGATRON_EXT_FORK") == "no" or sys.platform != "linux":
        with open(error, "w") as errors, open(out or os.devnull, "w") as outs:
            return subprocess.Popen([sys.executable, *(["-W", "ignore"] if quiet else []), *arguments], env=env, stdout=outs if out else None, stderr=errors)
    key = tuple(env.get(name) for name in READ_AT_IMPORT)
    if key not in _servers or _servers[key].process.poll() is not None:
        _servers[key] = Server(env)
    files = [str(out) if out else None, str(error)]
    return Process(_servers[key], _servers[key].ask(program=list(arguments), env=env, cwd=os.getcwd(), files=files, quiet=quiet)["pid"])


def run(words: Sequence[str], *, env: dict[str, str], timeout: float, program: Sequence[str] = ("-m", "megatron_ext"),
        quiet: bool = False) -> subprocess.CompletedProcess:
    """What `subprocess.run([sys.executable, *program, *words], env=env, capture_output=True, text=True, timeout=timeout)` returns."""
    with tempfile.TemporaryDirectory() as folder:
        out, error = Path(folder) / "out", Path(folder) / "error"
        process, deadline = start([*program, *words], env=env, out=out, error=error, quiet=quiet), time.monotonic() + timeout
        try:
            while process.poll() is None:
                if time.monotonic() > deadline:
                    raise subprocess.TimeoutExpired([*program, *words], timeout, out.read_text(), error.read_text())
                time.sleep(0.02)
        finally:
            process.kill()
            process.wait()
        return subprocess.CompletedProcess([*program, *words], process.poll(), out.read_text(encoding="utf-8"), error.read_text(encoding="utf-8"))


class Server:
    """The process that forks, and our end of the line to it."""

    def __init__(self, env: dict[str, str]):
        ours, theirs = socket.socketpair()
        self.process = subprocess.Popen([sys.executable, str(Path(__file__)), str(theirs.fileno())], env=env, pass_fds=[theirs.fileno()], cwd=ROOT,
                                        start_new_session=True)  # no signal that a test sends to its own group reaches it
        theirs.close()
        self.line = ours.makefile("rw", encoding="utf-8")
        assert json.loads(self.line.readline())["threads"] == 1, "only a process of one thread may be forked"
        atexit.register(self.close)

    def ask(self, **what) -> dict:
        self.line.write(json.dumps(what) + "\n")
        self.line.flush()
        return json.loads(self.line.readline())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


# ---- in the process that forks -----------------------------------------------------------------------------------------------------------


def _become(asked: dict) -> None:
    """The program, from its first line to its exit code. Does not return."""
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    for number, file in enumerate((os.devnull, *asked["files"])):
        if file is not None:
            opened = os.open(file, os.O_RDWR | os.O_CREAT | (os.O_TRUNC if number else 0), 0o600)
            os.dup2(opened, number)
            os.close(opened)
    if asked["quiet"]:
        warnings.simplefilter("ignore")
    kind, *rest = asked["program"]
    code = 1
    try:
        if kind == "-c":
            sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})  # noqa: S102 what `python -c` does
        elif kind == "-m":
            sys.argv, sys.path[0] = rest, asked["cwd"]
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = [kind, *rest], str(Path(kind).resolve().parent)
            runpy.run_path(kind, run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001 the interpreter prints all of them
        traceback.print_exc()
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve(number: int) -> None:
    import importlib

    sys.path[0] = str(ROOT)  # where this file lies is no place to import from
    from megatron_ext.platform import quiet

    quiet()
    for name in IMPORTS:
        importlib.import_module(name)
    for name in WHERE_INSTALLED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    line = socket.socket(fileno=number).makefile("rw", encoding="utf-8")

    def say(**what) -> None:
        line.write(json.dumps(what) + "\n")
        line.flush()

    say(threads=len(os.listdir("/proc/self/task")))
    while text := line.readline():
        asked = json.loads(text)
        if "poll" in asked:
            pid, status = os.waitpid(asked["poll"], os.WNOHANG)
            say(code=os.waitstatus_to_exitcode(status) if pid else None)
            continue
        pid = os.fork()
        if pid == 0:
            os.close(number)
            _become(asked)
        say(pid=pid)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
