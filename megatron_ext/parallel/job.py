"""The ranks of a job on one machine: started together, ended together. No torch.

Port. Rank 0's store listens on MASTER_PORT. The parent binds that port (the system's choice) with SO_REUSEADDR and keeps it bound,
never listening: Linux then gives the port to nobody who asks for "any port", yet lets rank 0, which sets SO_REUSEADDR too, bind and
listen. So nothing can slip in between choosing and using it.

Failure. The parent prints the first failure once, with its traceback, and ends the others: SIGTERM, then SIGKILL. Ranks that merely
lost their peer are not quoted.
"""
import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_ext.config.schema import Config
from megatron_ext.errors import UserError
from megatron_ext.parallel.signals import STOPS, UNFINISHED, held_back
from megatron_ext.redact import redact_text

PARENT = "MEGATRON_EXT_PARENT"  # process id of the parent of a rank that we started
FAILURES = "MEGATRON_EXT_FAILURES"  # folder for what failing ranks have to say
TERM_GRACE = 5.0  # seconds between SIGTERM and SIGKILL once a rank has failed
STOP_GRACE = 120.0  # seconds that ranks get to save and stop after Ctrl-C or SIGTERM
TAIL_BYTES = 8192  # of a silent rank's output, shown when it dies without a word


@contextlib.contextmanager
def held_port(asked: int = 0):
    """A port for rank 0's store, bound (not listening) until the context ends. `asked=0`: the system's choice. Raises UserError."""
    holder = socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET, socket.SOCK_STREAM)
    with holder:
        try:
            _bind(holder, asked)
            if asked:  # binding beside a listener can succeed on some systems; listening cannot
                with socket.socket(holder.family, socket.SOCK_STREAM) as probe:
                    _bind(probe, asked)
                    probe.listen(1)
        except OSError as error:
            raise UserError("launch.master_port", asked, f"{error.strerror}; leave it at 0 and a free port is chosen") from None
        yield holder.getsockname()[1]


def _bind(sock: socket.socket, port: int) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind(("", port))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads(config: Config) -> str:
    """OMP threads of a rank: what the configuration says, else the user's own setting, else an even share of the cores."""
    if config.launch.threads:
        return str(config.launch.threads)
    return os.environ.get("OMP_NUM_THREADS") or str(max(1, cores() // config.launch.ranks))


def rank_environment(config: Config, rank: int, port: int) -> dict[str, str]:
    """What one rank of this machine finds in its environment."""
    launch = config.launch
    found = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(launch.ranks),
        "LOCAL_WORLD_SIZE": str(launch.ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": threads(config),
    }
    if sys.platform == "linux":  # gloo resolves the host's name otherwise, which fails on machines without one
        found["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return found


@dataclass(frozen=True)
class Failure:
    """How a rank ended that should not have: when (seconds since the epoch), with which code, and what it said."""

    rank: int
    time: float
    code: int
    text: str


class _Rank:
    """One running rank. Rank 0 shares our terminal; of the others the tail of what they print is kept."""

    def __init__(self, rank: int, command: Sequence[str], environment: dict[str, str], ended: queue.Queue, stdin: Path | None):
        self.rank = rank
        self.tail, self.drain = b"", None
        output = None if rank == 0 else subprocess.PIPE
        # A session of its own: Ctrl-C reaches ranks only through us, and a kill reaches what a rank started.
        with open(stdin or os.devnull, "rb") as source, held_back():
            self.process = subprocess.Popen(
                command, env=environment, stdin=source, stdout=output,
                stderr=None if rank == 0 else subprocess.STDOUT, start_new_session=True,
            )
        if rank:
            self.drain = threading.Thread(target=self._drain, daemon=True)
            self.drain.start()
        threading.Thread(target=self._wait, args=(ended,), daemon=True).start()

    def _drain(self) -> None:
        while chunk := self.process.stdout.read1(4096):
            self.tail = (self.tail + chunk)[-TAIL_BYTES:]

    def said(self) -> str:
        """The tail of what it printed, once it has ended. What it left running may hold the pipe open: that is not waited for."""
        if self.drain is not None:
            self.drain.join(1.0)
        return self.tail.decode("utf-8", "replace").strip()

    def _wait(self, ended: queue.Queue) -> None:
        code = self.process.wait()
        ended.put((self.rank, code, time.time()))

    def stopped(self) -> bool:
        """Whether it was stopped (SIGSTOP): any signal but SIGKILL would wait with it."""
        try:
            return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        except OSError:  # gone, or no Linux
            return False

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


def start(command: Sequence[str], config: Config, *, stdin: bytes | None = None) -> int:
    """Runs `command` as `config.launch.ranks` ranks and returns the job's exit code; the first failure is printed on stderr.

    Args:
        stdin: what each rank finds on its standard input; None = nothing.

    Raises:
        UserError: the port that was asked for is in use.
    """
    with tempfile.TemporaryDirectory(prefix="megatron_ext_") as name, held_port(config.launch.master_port) as port:
        folder = Path(name)
        if stdin is not None:
            (folder / "stdin").write_bytes(stdin)
        return _Job(command, config, folder, port, folder / "stdin" if stdin is not None else None).wait()


class _Job:
    def __init__(self, command: Sequence[str], config: Config, folder: Path, port: int, stdin: Path | None):
        self.folder, self.port = folder, port
        self.ended: queue.Queue = queue.Queue()
        self.signalled: int | None = None
        self.ranks: list[_Rank] = []
        self.before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, *STOPS)}
        ours = {PARENT: str(os.getpid()), FAILURES: str(folder)}
        for rank in range(config.launch.ranks):
            environment = {**os.environ, **rank_environment(config, rank, port), **ours}
            self.ranks.append(_Rank(rank, command, environment, self.ended, stdin))

    def _on_signal(self, number: int, frame: object) -> None:
        forward = number
        if number != signal.SIGUSR1:  # a warning, which has a time limit of its own
            # The second one does not wait any more.
            forward = number if self.signalled is None else signal.SIGKILL
            self.signalled = self.signalled or number
        for rank in self.ranks:
            if rank.process.poll() is None:
                rank.signal(forward)

    def wait(self) -> int:
        """Until all ranks have ended; returns the exit code."""
        codes: dict[int, tuple[int, float]] = {}
        deadline, sent = None, signal.SIGTERM
        try:
            while len(codes) < len(self.ranks):
                with contextlib.suppress(queue.Empty):
                    rank, code, when = self.ended.get(timeout=0.2)
                    codes[rank] = (code, when)
                    if code not in (0, UNFINISHED) and deadline is None:
                        deadline = time.monotonic() + 0.5  # its peers may be writing down the true cause
                if self.signalled is not None and deadline is None:
                    deadline, sent = time.monotonic() + STOP_GRACE, signal.SIGKILL
                if deadline is not None and time.monotonic() > deadline:
                    self._signal_all(sent, codes)
                    deadline, sent = time.monotonic() + TERM_GRACE, signal.SIGKILL
        finally:
            self._signal_all(signal.SIGKILL, codes)
            for number, handler in self.before.items():
                signal.signal(number, handler)
        return self._verdict(codes)

    def _signal_all(self, number: int, codes: Mapping[int, object]) -> None:
        for rank in self.ranks:
            if rank.rank not in codes:
                rank.signal(signal.SIGKILL if rank.stopped() else number)

    def _verdict(self, codes: dict[int, tuple[int, float]]) -> int:
        failures = [self._failure(rank, code, when) for rank, (code, when) in codes.items() if code not in (0, UNFINISHED)]
        if not failures:
            return max(code for code, _ in codes.values())
        if self.signalled is not None:
            return 128 + self.signalled
        first = cause(failures)
        if "EADDRINUSE" in first.text:  # another job took the same port between our look and rank 0's listening
            first = replace(first, code=2, text=f"launch.master_port={self.port}: in use; leave it at 0 and a free port is chosen")
        first = replace(first, text=redact_text(first.text))
        if first.code == 2 or first.text.startswith("hang:"):  # whoever leads tells of a hang, and is not to blame
            print(f"error: {first.text}", file=sys.stderr)
        else:
            print(f"error: rank {first.rank} of {len(self.ranks)} failed first:\n{first.text.rstrip()}", file=sys.stderr)
        return first.code

    def _failure(self, rank: int, code: int, when: float) -> Failure:
        said = self.folder / f"rank_{rank:05d}.json"
        if said.is_file():
            content = json.loads(said.read_text("utf-8"))
            return Failure(rank, content["time"], content["code"], content["text"])
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        tail = self.ranks[rank].said()
        text = f"{how} without a Python exception" + (f"; its last output:\n{tail}" if tail else "")
        return Failure(rank, when, 128 - code if code < 0 else code, text)


def cause(failures: Sequence[Failure]) -> Failure:
    """The failure that came first. A killed rank (out of memory, say) leaves no note and drags its peers down within milliseconds."""
    killed = [failure for failure in failures if failure.code == 128 + signal.SIGKILL]
    earliest = min(failures, key=lambda failure: failure.time)
    near = [failure for failure in killed if failure.time <= earliest.time + 0.25]
    return min(near, key=lambda failure: failure.time) if near else earliest
