"""Starting the ranks of a job on one machine, and ending them together. No torch: the parent must be small and quick.

A rank is this same command again, as a subprocess, told who it is by the environment that torchrun uses (RANK, WORLD_SIZE, ...).

Port. Rank 0's store listens on MASTER_PORT. The parent binds that port (the system's choice) with SO_REUSEADDR and keeps it bound,
never listening: Linux then gives the port to nobody who asks for "any port", yet lets rank 0, which sets SO_REUSEADDR too, bind and
listen. So nothing can slip in between choosing and using it.

Failure. A rank that fails writes what it has to say into the parent's folder (as torchelastic's error files do) and leaves at once,
without waiting for collectives that cannot finish. The parent prints the first failure once and ends the others: SIGTERM, then
SIGKILL. Ranks that merely lost their peer are not quoted.

Death of the parent. Each rank asks Linux to be killed with its parent (PR_SET_PDEATHSIG), then looks whether the parent is still the
one that started it, so that no moment is left uncovered.
"""
import contextlib
import ctypes
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_ext.config.schema import Config
from megatron_ext.errors import UserError

PARENT = "MEGATRON_EXT_PARENT"  # process id of the parent of a rank that we started
FAILURES = "MEGATRON_EXT_FAILURES"  # folder for what failing ranks have to say
TERM_GRACE = 5.0  # seconds between SIGTERM and SIGKILL once a rank has failed
STOP_GRACE = 120.0  # seconds that ranks get to save and stop after Ctrl-C or SIGTERM
TAIL_BYTES = 8192  # of a silent rank's output, shown when it dies without a word


# ---- in a rank -----------------------------------------------------------------------------------------------------------------

def follow_parent() -> None:
    """In a rank that we started: die with the parent. Elsewhere: nothing."""
    parent = os.environ.get(PARENT)
    if parent is None:
        return
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(parent):
        os._exit(1)


def report_failure(code: int, text: str) -> bool:
    """In a rank that we started: leaves `text` and the exit code for the parent to print. False where there is no such parent."""
    folder = os.environ.get(FAILURES)
    if folder is None:
        return False
    content = json.dumps({"time": time.time(), "code": code, "text": text})
    name = Path(folder) / f"rank_{int(os.environ['RANK']):05d}.json"
    with contextlib.suppress(OSError):
        name.with_suffix(".part").write_text(content, encoding="utf-8")
        name.with_suffix(".part").rename(name)
        return True
    return False


def leave(code: int) -> int:
    """The exit code of a failed command. A rank leaves at once: Python's own exit may wait for threads of a broken collective."""
    if "RANK" in os.environ and code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


# ---- who starts the ranks ------------------------------------------------------------------------------------------------------

def in_ranks(config: Config, options: "Options", body: Callable[[Config], int | None]) -> int:  # noqa: F821
    """Runs `body(config)` in every rank of the job and returns the exit code.

    Launched already (by us, torchrun or srun): this process is a rank. Else `launch.ranks` of them are started here; a single
    one is this process itself. Raises UserError when the launcher's number of ranks is not what was asked for.
    """
    launched = launched_ranks(os.environ)
    if launched is not None:
        config = fit_launcher(config, launched, asked=any(word.startswith("launch.ranks=") for word in options.overrides))
        _adopt_slurm()
        return body(config) or 0
    if config.launch.ranks == 1:
        with held_port(config.launch.master_port) as port:
            os.environ.update(rank_environment(config, 0, port))
            return body(config) or 0
    command = [sys.executable, "-m", "megatron_ext", *options.argv]
    return start(command, config)


def launched_ranks(environment: Mapping[str, str]) -> int | None:
    """Ranks of the job that this process was launched into; None when it was not launched as a rank."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return int(environment["WORLD_SIZE"])
    if "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment:  # srun; a batch script itself has no step
        tasks = int(environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1")))
        return tasks if tasks > 1 else None
    return None


def fit_launcher(config: Config, launched: int, *, asked: bool) -> Config:
    """`config` with the number of ranks that the launcher started. Raises UserError when another was asked for."""
    if asked and config.launch.ranks != launched:
        raise UserError("launch.ranks", config.launch.ranks, f"but the launcher started {launched} ranks; leave launch.ranks out")
    return replace(config, launch=replace(config.launch, ranks=launched))


def _adopt_slurm() -> None:
    if "RANK" in os.environ:
        return
    environ = os.environ
    environ["RANK"] = environ["SLURM_PROCID"]
    environ["LOCAL_RANK"] = environ["SLURM_LOCALID"]
    environ["WORLD_SIZE"] = str(launched_ranks(environ))
    if "MASTER_ADDR" not in environ:
        hosts = ["scontrol", "show", "hostnames", environ.get("SLURM_STEP_NODELIST", environ["SLURM_JOB_NODELIST"])]
        environ["MASTER_ADDR"] = subprocess.run(hosts, check=True, capture_output=True, text=True).stdout.split()[0]
    # Every rank has to know the port without talking: one that follows from the job and step, below the ephemeral range.
    environ.setdefault("MASTER_PORT", str(20000 + (int(environ["SLURM_JOB_ID"]) * 7 + int(environ["SLURM_STEP_ID"])) % 12000))


# ---- in the parent -------------------------------------------------------------------------------------------------------------

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


def rank_environment(config: Config, rank: int, port: int) -> dict[str, str]:
    """What one rank of this machine finds in its environment."""
    launch = config.launch
    threads = str(launch.threads) if launch.threads else os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // launch.ranks)))
    found = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(launch.ranks),
        "LOCAL_WORLD_SIZE": str(launch.ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": threads,
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

    def __init__(self, rank: int, command: Sequence[str], environment: dict[str, str], ended: queue.Queue):
        self.rank = rank
        self.tail = b""
        output = None if rank == 0 else subprocess.PIPE
        # A session of its own: Ctrl-C reaches ranks only through us, and a kill reaches what a rank started.
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output,
            stderr=None if rank == 0 else subprocess.STDOUT, start_new_session=True,
        )
        if rank:
            threading.Thread(target=self._drain, daemon=True).start()
        threading.Thread(target=self._wait, args=(ended,), daemon=True).start()

    def _drain(self) -> None:
        while chunk := self.process.stdout.read1(4096):
            self.tail = (self.tail + chunk)[-TAIL_BYTES:]

    def _wait(self, ended: queue.Queue) -> None:
        code = self.process.wait()
        ended.put((self.rank, code, time.time()))

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


def start(command: Sequence[str], config: Config) -> int:
    """Runs `command` as `config.launch.ranks` ranks and returns the job's exit code; the first failure is printed on stderr."""
    with tempfile.TemporaryDirectory(prefix="megatron_ext_") as folder, held_port(config.launch.master_port) as port:
        return _Job(command, config, Path(folder), port).wait()


class _Job:
    def __init__(self, command: Sequence[str], config: Config, folder: Path, port: int):
        self.folder = folder
        self.ended: queue.Queue = queue.Queue()
        self.signalled: int | None = None
        self.ranks: list[_Rank] = []
        self.before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        ours = {PARENT: str(os.getpid()), FAILURES: str(folder)}
        for rank in range(config.launch.ranks):
            environment = {**os.environ, **rank_environment(config, rank, port), **ours}
            self.ranks.append(_Rank(rank, command, environment, self.ended))

    def _on_signal(self, number: int, frame: object) -> None:
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
                    if code and deadline is None:
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
                rank.signal(number)

    def _verdict(self, codes: dict[int, tuple[int, float]]) -> int:
        failures = [self._failure(rank, code, when) for rank, (code, when) in codes.items() if code]
        if not failures:
            return 0
        if self.signalled is not None:
            return 128 + self.signalled
        first = cause(failures)
        if first.code == 2:
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
        tail = self.ranks[rank].tail.decode("utf-8", "replace").strip()
        text = f"{how} without a Python exception" + (f"; its last output:\n{tail}" if tail else "")
        return Failure(rank, when, 128 - code if code < 0 else code, text)


def cause(failures: Sequence[Failure]) -> Failure:
    """The failure that came first. A killed rank (out of memory, say) leaves no note and drags its peers down within milliseconds."""
    killed = [failure for failure in failures if failure.code == 128 + signal.SIGKILL]
    earliest = min(failures, key=lambda failure: failure.time)
    near = [failure for failure in killed if failure.time <= earliest.time + 0.25]
    return min(near, key=lambda failure: failure.time) if near else earliest
