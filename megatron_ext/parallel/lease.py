"""One life at a time in a run directory: `run.dir/lease.json` says who is at work there, and that it still is.

A node that Slurm takes for dead may only have lost its daemon: the ranks on it go on while the job starts anew elsewhere, and both would write
the same checkpoints. So rank 0 holds a lease, writes a heartbeat into it, and looks whether it is still its own.

    free                                                      taken
    the holder's process has ended (same machine)             taken over at once
    its heartbeat stands still for STALE seconds              taken over
    it beats: an earlier life of the same Slurm job           told to leave, which it does at its next beat; then taken over
    it beats: anything else                                   refused, by name

Clocks of two machines need not agree: a heartbeat is a counter, and whether it stands still is measured on the reader's own clock. Only a
heartbeat far older than any clock is wrong (FAR) is believed without looking on.

Taking over replaces the file; the heartbeat is written through the descriptor of the old one. So a life that was replaced can neither overwrite its
successor's lease nor fail to see that it has one, and ends itself.
"""
import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_ext.errors import UserError
from megatron_ext.parallel import slurm

FILE = "lease.json"
BEAT = 3.0  # seconds between heartbeats
STALE = 20.0  # seconds without one after which the holder is taken for dead
FAR = 300.0  # seconds by which clocks of a cluster never differ
WIDTH = 1024  # bytes of the file, filled up with blanks: a heartbeat replaces it in one write


@dataclass(frozen=True)
class Holder:
    """Who holds a lease. time: of the heartbeat, seconds since the epoch. machine: the boot and the process namespace that `pid` is of.
    started: clock ticks since that boot."""

    job: str  # "Slurm job 12", or "process 4711"
    restarts: int
    step: str
    host: str
    machine: str
    pid: int
    started: int
    beat: int = 0
    time: float = 0.0

    @classmethod
    def this(cls, environment: Mapping[str, str] | None = None) -> "Holder":
        """This process."""
        environment = os.environ if environment is None else environment
        job = environment.get("SLURM_JOB_ID")
        return cls(f"Slurm job {job}" if job else f"process {os.getpid()}", slurm.restarts(environment), environment.get("SLURM_STEP_ID", ""),
                   socket.gethostname(), _machine(), os.getpid(), (_process(os.getpid()) or ("", 0))[1], time=time.time())

    def __str__(self) -> str:
        return f"{self.job} on {self.host} (process {self.pid}" + (f", restart {self.restarts})" if self.restarts else ")")

    def later_than(self, other: "Holder") -> bool:
        """Whether this is a later life of the same Slurm job."""
        return self.job == other.job and self.job.startswith("Slurm") and self.restarts > other.restarts

    def here(self) -> bool:
        """Whether its process is one of this machine, so that this process can see it."""
        return self.machine == _machine()

    def ended(self) -> bool:
        """Whether its process is known to have ended; False where that cannot be known from here."""
        if not self.here():
            return False
        found = _process(self.pid)
        return found is None or found[0] == "Z" or found[1] != self.started  # the number may be another process's by now


def _process(pid: int) -> tuple[str, int] | None:
    """(state, start in clock ticks since boot) of a process; None where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19])


def _machine() -> str:
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


@contextlib.contextmanager
def hold(run_dir: Path, *, say: Callable[[str], None] = lambda text: print(text, flush=True), leave: Callable[[str], None] | None = None,
         beat: float = BEAT, stale: float = STALE) -> Iterator["Lease"]:
    """Holds the lease of `run_dir`, which is made where it is not there, until the context ends. For rank 0 alone, before the ranks meet: it may wait.

    Args:
        say: takes a line when there is something to wait for or to take over.
        leave: ends this process with a reason when a later life has taken over; None: as launch.report_failure has it, exit code 1.
        beat, stale: seconds.

    Raises:
        UserError: somebody else is at work in the directory, or it cannot be written.
    """
    held = Lease(Path(run_dir), Holder.this(), beat=beat, stale=stale, say=say, leave=leave or _leave)
    held.take()
    try:
        yield held
    finally:
        held.release()


class Lease:
    """See `hold`."""

    def __init__(self, run_dir: Path, mine: Holder, *, beat: float, stale: float, say: Callable[[str], None], leave: Callable[[str], None]):
        self.path, self.mine, self.beat, self.stale, self.say, self.leave = run_dir / FILE, mine, beat, stale, say, leave
        self._descriptor = -1
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beats, daemon=True, name="lease")

    # ---- taking it -------------------------------------------------------------------------------------------------------------

    def take(self) -> None:
        """Waits where it has to. Raises UserError."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while not self._create():
                holder = self.read()
                if holder is not None and not self.mine.later_than(holder):
                    self._await_end(holder)
                if not self.path.exists():
                    continue
                self._replace()
                if holder is not None and self.mine.later_than(holder):
                    self._await_leaving(holder)
                if self._own():
                    break
        except OSError as error:
            raise UserError("run.dir", self.path.parent, f"cannot be written: {error.strerror}") from None
        self._thread.start()

    def read(self) -> Holder | None:
        """Who holds it now; None where nobody does, or the file is damaged."""
        try:
            return Holder(**json.loads(self.path.read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def _await_end(self, holder: Holder) -> None:
        """Returns when `holder` is over. Raises UserError when it, or whoever came after it, is alive."""
        if time.time() - holder.time > FAR + self.stale and not holder.here():
            return
        begin, told = time.monotonic(), False
        while not holder.ended() and (waited := time.monotonic() - begin) < self.stale:
            now = self.read()
            if now is None:
                return
            beats = (now.machine, now.pid, now.beat) != (holder.machine, holder.pid, holder.beat)
            if beats and not now.ended() or now.here() and waited > self.beat:  # killed a moment ago, it may still be there
                raise UserError("run.dir", self.path.parent, f"{now} is at work in it; wait for its end, stop it, or name another directory")
            if not told and waited > 2 * self.beat:
                self.say(f"{holder} has left {self.path.parent} in use; waiting {self.stale:.0f} s for a sign of life")
                told = True
            time.sleep(min(0.2, self.beat / 2))

    def _await_leaving(self, holder: Holder) -> None:
        """The earlier life finds out at its next heartbeat, and ends itself; one that is dead already does not need to."""
        if holder.ended() or time.time() - holder.time > FAR:
            return
        self.say(f"an earlier life of this job may still be at work in {self.path.parent}: {holder}; it is told to leave")
        end = time.monotonic() + 3 * self.beat
        while not holder.ended() and time.monotonic() < end:
            time.sleep(min(0.2, self.beat / 2))

    # ---- writing ---------------------------------------------------------------------------------------------------------------

    def _draft(self) -> Path:
        draft = self.path.with_name(f".{FILE}.{socket.gethostname()}.{os.getpid()}")
        self._close()
        self._descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self._write()
        return draft

    def _create(self) -> bool:
        draft = self._draft()
        try:
            os.link(draft, self.path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            if self.path.exists():
                return False
            os.replace(draft, self.path)
            return self._own()
        finally:
            draft.unlink(missing_ok=True)
        return True

    def _replace(self) -> None:
        os.replace(self._draft(), self.path)
        time.sleep(0.2)  # of two who do this at once the second one has it

    def _write(self) -> None:
        self.mine = replace(self.mine, beat=self.mine.beat + 1, time=time.time())
        os.pwrite(self._descriptor, f"{json.dumps(asdict(self.mine)):<{WIDTH - 1}}\n".encode(), 0)
        os.fsync(self._descriptor)

    def _own(self) -> bool:
        """Whether the file is the one that we write to. One that somebody removed was nobody's."""
        try:
            there, mine = os.stat(self.path), os.fstat(self._descriptor)
        except FileNotFoundError:
            return True
        return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)

    def _beats(self) -> None:
        while not self._released.wait(self.beat):
            try:
                if self._own():
                    self._write()
                    continue
            except OSError:  # a file system that is full or away for a moment; whoever takes it for our death takes the lease too
                continue
            self.leave(f"{self.read() or 'another life of this job'} has taken over {self.path.parent}; this one ({self.mine}) ends")
            return

    def release(self) -> None:
        """Gives it back."""
        self._released.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(self.beat)
        with contextlib.suppress(OSError):
            if self._own():
                self.path.unlink(missing_ok=True)
        self._close()

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _leave(reason: str) -> None:
    from megatron_ext.parallel import launch

    if not launch.report_failure(1, f"error: {reason}"):
        print(f"error: {reason}", file=sys.stderr, flush=True)
    os._exit(1)
