"""Processes that run reward functions (worker.py), seen from outside: started, asked, and ended when they take too long.

They are started as new programs, never forked: this process may have torch's threads. Each leads a session of its own, so that what it has started
can be ended with it, and ends when this process does. Start them from a thread that lives as long as they shall.
"""
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_ext.errors import RunFailed

START_SECONDS = 300.0  # importing the modules of a user's functions may take long
_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # a function is no rank, whatever it imports


class Worker:
    """One process.

    Attributes:
        task: what it has been asked, as the caller names it; None: it is idle, or not yet ready.
        deadline: by time.monotonic(), when it has to have answered; infinity while idle.
    """

    def __init__(self, entries: Sequence[str], *, scratch: str):
        """Starts it. `scratch`: the folder for temporary files."""
        path = [os.path.abspath(one) for one in sys.path] + [str(Path(__file__).resolve().parents[2])]
        environment = {name: value for name, value in os.environ.items() if name not in _RANKS} | {
            "PYTHONPATH": os.pathsep.join(dict.fromkeys(path)), "PYTHONHASHSEED": "0", "TMPDIR": scratch, "OMP_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen([sys.executable, "-P", "-m", "rlhf.rewards.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         env=environment, start_new_session=True)  # fmt: skip
        self._buffer, self.ready, self.task = b"", False, None
        self.deadline = time.monotonic() + START_SECONDS
        self._send({"functions": list(entries), "parent": os.getpid()})

    def fileno(self) -> int:
        return self._process.stdout.fileno()

    @property
    def idle(self) -> bool:
        return self.ready and self.task is None

    @property
    def dead(self) -> bool:
        return self._process.poll() is not None

    def ask(self, task: object, request: dict, *, seconds: float) -> bool:
        """False: it is not there any more."""
        self.task, self.deadline = task, time.monotonic() + seconds
        return self._send(request)

    def answer(self) -> dict | None:
        """Reads what is there: an answer, {} where its line is not yet complete, None where the process has ended.

        Raises:
            RunFailed: it could not start.
        """
        part = os.read(self.fileno(), 1 << 16)
        self._buffer += part
        line, newline, rest = self._buffer.partition(b"\n")
        if not newline:
            if not part and not self.ready:
                raise RunFailed(f"the process for reward functions ended while it started ({ended(self.end())}); standard error may say why")
            return {} if part else None
        self._buffer = rest
        try:
            found = json.loads(line)
        except ValueError:
            return None
        if "refused" in found:
            raise RunFailed(found["refused"])
        if "ready" in found:
            self.ready, self.deadline = True, float("inf")
            return {}
        self.task, self.deadline = None, float("inf")
        return found

    def end(self) -> int:
        """Ends it with all that it has started in its session, at once. Its exit code; minus the signal where it was killed, by us or another."""
        if self._process.returncode is None:
            if self._closed():  # on its way out by itself: how it ended says more than our kill
                until = time.monotonic() + 1
                while time.monotonic() < until and os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                    time.sleep(0.01)
            with contextlib.suppress(ProcessLookupError):  # before its number is given back, which may be another's afterwards
                os.killpg(self._process.pid, signal.SIGKILL)
        code = self._process.wait()
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.stdout.close()
        return code

    def _closed(self) -> bool:
        os.set_blocking(self.fileno(), False)
        try:
            return os.read(self.fileno(), 1) == b""
        except BlockingIOError:
            return False

    def _send(self, message: dict) -> bool:
        try:
            self._process.stdin.write((json.dumps(message, default=str) + "\n").encode())
            self._process.stdin.flush()
        except OSError:
            return False
        return True


def ended(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"signal {signal.Signals(-code).name}"
    return f"signal {-code}"
