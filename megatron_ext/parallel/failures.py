"""The first failure of a job whose ranks somebody else started (srun, torchrun): told once, first, and it ends every rank. No torch.

Such ranks share nothing but `run.dir` before they have met, and nothing else that is sure once one of them has failed. So the first one that
fails for a reason of its own links a file into a folder of this life of the job, which only one can do, prints what it has to say, and leaves:

    run.dir/failures/JOB.RESTARTS/first.STEP.json    who, when, and the traceback
    run.dir/failures/JOB.RESTARTS/code               the job's exit code, for the batch script

The others look for that file (each second; less often where many look) and leave with the same code after one line. A rank that merely lost its
peer waits a moment for the peer's word. Where none comes, the peer was killed or its node is gone, and that is what is told.

The exit code of srun cannot say any of this: with --kill-on-bad-exit it is 143 whatever the first rank's was, and torchrun's is always 1
(`torchrun.py`: that of its node).
"""
import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_ext.observe.allocation import process_start
from megatron_ext.parallel import slurm
from megatron_ext.parallel.signals import UNFINISHED

KILLED = 137  # that of a job of which a rank died without a word: 128 + SIGKILL
FOLDER = "failures"  # in run.dir
GRACE = 3.0  # seconds that a rank which lost its peer waits for the peer's word: shared file systems show new files late
SLACK = 3.0  # seconds between the starts of two ranks of a job
# Seconds: srun --kill-on-bad-exit ends the step with the first rank that leaves. What that has said beyond 1 KiB comes 40 ms later (Slurm 22.05), or not at all:
# without a pause the last lines of the first traceback were lost in 24 of 73 runs, with it in none of 40.
FORWARD = 1.0
_LOST = {"DistBackendError", "DistNetworkError", "DistStoreError"}  # torch's, by name
_LOST_TEXT = re.compile(r"Connection (closed|reset|refused)|Broken pipe|Timed out waiting|Socket closed|NCCL (error|communicator)|remote process",
                        re.IGNORECASE)


def is_lost_peer(error: BaseException) -> bool:
    """Whether `error` says no more than that another rank has gone."""
    if "EADDRINUSE" in str(error):
        return False
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, ConnectionError) or bool(names & _LOST) or type(error) is RuntimeError and bool(_LOST_TEXT.search(str(error)))


@dataclass(frozen=True)
class First:
    """What the first rank to fail has left. time: seconds since the epoch. lost: it only knows that a peer has gone."""

    rank: int
    host: str
    time: float
    code: int
    lost: bool
    text: str


class Failures:
    """One rank's view of the folder.

    Args:
        folder: of this life of the job.
        name: of the file of the first failure.
        since: what is older (seconds since the epoch) is of an earlier job.
        linger: seconds between the last word and the end of this rank.
    """

    def __init__(self, folder: Path, *, rank: int, ranks: int, name: str = "first.json", since: float = 0.0, linger: float = 0.0):
        self.folder, self.rank, self.ranks, self.since, self.linger = folder, rank, ranks, since, linger
        self.path = folder / name
        self.who = f"rank {rank} of {ranks} ({socket.gethostname()})"
        self._speaking = threading.Lock()  # the main thread or the watcher: one of them ends this rank

    @classmethod
    def of(cls, run_dir: Path, environment: Mapping[str, str]) -> "Failures":
        """In a rank that srun or torchrun started (RANK and WORLD_SIZE are set)."""
        rank, ranks = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        life = slurm.life(environment)
        if life is not None:
            return cls(run_dir / FOLDER / life, rank=rank, ranks=ranks, name=f"first.{environment.get('SLURM_STEP_ID', 'batch')}.json", linger=FORWARD)
        # Nothing names this start of torchrun for sure: an old failure is told from a new one by its time.
        start = (environment.get("TORCHELASTIC_RUN_ID", "none"), environment.get("TORCHELASTIC_RESTART_COUNT", "0"))
        name = re.sub(r"[^\w.-]", "_", ".".join(("torchrun", *start)))
        return cls(run_dir / FOLDER / name, rank=rank, ranks=ranks, since=(process_start(os.getpid()) or time.time()) - SLACK)

    def first(self) -> First | None:
        """The job's first failure, where there is one."""
        try:
            found = First(**json.loads(self.path.read_text("utf-8")))
        except (OSError, ValueError, TypeError):  # none, or one that cannot be read now
            return None
        return found if found.time >= self.since else None

    def end(self, code: int, text: str, *, lost: bool = False) -> int:
        """Tells of this rank's failure as its place among the others asks for, and returns the code to leave with, once what was told is on its way."""
        code = self._tell(code, text, lost)
        time.sleep(self.linger)
        return code

    def _tell(self, code: int, text: str, lost: bool) -> int:
        with self._speaking:
            first = self._awaited(GRACE) if lost else self.first()
            if first is None:
                mine = First(self.rank, socket.gethostname(), time.time(), KILLED if lost else code, lost, text)
                try:
                    won = self._claim(mine)
                except OSError:  # nobody can be told: everybody speaks
                    won = True
                if won:
                    print(self._told(mine), file=sys.stderr, flush=True)
                    return mine.code
                first = self.first() or mine
            if lost:
                print(self._left(first), file=sys.stderr, flush=True)
            elif (code, text) != (first.code, first.text):  # what all ranks find alike is said once
                print(f"{self.who} failed too: {text.rstrip().splitlines()[-1]}", file=sys.stderr, flush=True)
            return first.code

    def unfinished(self) -> None:
        """For the batch script: this life has saved, and the run is not at its end."""
        if self.rank:
            return
        with contextlib.suppress(OSError):
            self._make()
            self._write_code(UNFINISHED)

    def watch(self, interval: float | None = None) -> None:
        """From now on this rank ends when another one has failed, whatever it waits for. interval: seconds; None: by the number of ranks."""
        pause = interval or max(1.0, self.ranks / 200)
        threading.Thread(target=self._watch, args=(pause,), daemon=True, name="failures").start()

    def _watch(self, pause: float) -> None:
        while True:
            time.sleep(pause)
            first = self.first()
            if first is None or first.rank == self.rank:
                continue
            time.sleep(pause)  # it may be about to say so itself
            with self._speaking:
                print(self._left(first), file=sys.stderr, flush=True)
                sys.stdout.flush()
                os._exit(first.code)

    def _told(self, first: First) -> str:
        text = first.text.rstrip()
        if first.code == 2:
            return f"error: {text}"
        if first.lost:
            return f"error: {self.who} lost a peer, and no rank says why: one was killed, or its node is gone. What it saw: {text.splitlines()[-1]}"
        if text.startswith("hang:"):  # whoever leads tells of it, and is not to blame
            return f"error: {text}"
        return f"error: {self.who} failed first:\n{text}" if self.ranks > 1 else text

    def _left(self, first: First) -> str:
        return f"{self.who} ended: " + (f"a peer was lost (rank {first.rank} tells)" if first.lost else f"rank {first.rank} failed")

    def _awaited(self, seconds: float) -> First | None:
        end = time.monotonic() + seconds
        while (first := self.first()) is None and time.monotonic() < end:
            time.sleep(0.1)
        return first

    def _make(self) -> None:
        run_dir = self.folder.parent.parent
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        run_dir.mkdir(mode=0o700, exist_ok=True)  # its owner's alone, until a run says otherwise (private.py)
        self.folder.mkdir(parents=True, exist_ok=True)

    def _claim(self, mine: First) -> bool:
        """Whether `mine` became the first failure."""
        self._make()
        draft = self.folder / f".{self.path.name}.{self.rank}"
        draft.write_text(json.dumps(asdict(mine)), encoding="utf-8")
        if self.path.exists() and self.first() is None:  # of an earlier job
            self.path.unlink(missing_ok=True)
        try:
            os.link(draft, self.path)  # whole or not at all, and only once
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            if self.path.exists():
                return False
            os.replace(draft, self.path)
        finally:
            draft.unlink(missing_ok=True)
        self._write_code(mine.code)
        return True

    def _write_code(self, code: int) -> None:
        draft = self.folder / f".code.{self.rank}"
        draft.write_text(f"{code}\n", encoding="utf-8")
        os.replace(draft, self.folder / "code")
