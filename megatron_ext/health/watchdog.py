"""A hung job ends within a bounded time, and says which rank everyone waits for, in which collective of which group.

The main thread of a rank counts (`beat`, and each collective that begins or ends) and does nothing else for this. A thread of the rank looks at the
counts every `interval` seconds and writes them into run.dir/health/ (heartbeat.py). Only where the main thread has not got on for half of the
time limit does it read what others say: the lowest living rank leads. When no living rank has got on for as long as it may
(diagnosis.py), the leader tells the diagnosis, once, and all living ranks keep their stacks (evidence.py) and leave with exit code 1, from that
thread: their main threads are blocked. Stopped ranks cannot leave; the parent of the ranks kills them (parallel/job.py, torchrun, srun -K).

How long a rank may be still: `timeout` in a phase of short steps, several times as much in phases that are long by nature (ALLOWANCES), and in any
phase three times the longest stillness that it has lived through, so that a run of slow steps is left alone once its first ones
were. Every beat and every collective ends a stillness.

A process that the whole job was stopped with (Slurm's suspension, a laptop's sleep) has not been waiting: time counts by ticks of this thread.
"""
import faulthandler
import os
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from megatron_ext.config.schema import Config
from megatron_ext.health import evidence, heartbeat
from megatron_ext.health.collectives import Collectives
from megatron_ext.health.diagnosis import SILENT_SHARE, Diagnosis, Seen, judge
from megatron_ext.health.heartbeat import DUMP, DUMPED, LEAVE, Heartbeat
from megatron_ext.observe.events import Events
from megatron_ext.parallel.launch import report_failure

# Multiples of `timeout` that a rank may be still in a phase, between two beats or collectives. Phases not named here: LONG.
ALLOWANCES = {"step": 1.0, "data": 2.0, "evaluation": 2.0, "rollout": 4.0, "checkpoint": 4.0}
LONG = 6.0  # start (preparation, loading, process groups), compile (the first step), and all else
GROWTH = 3.0  # times the longest stillness of a phase
TICKS = 20  # looks in one time limit
SLOWEST = 15.0  # seconds between two looks at most: a thousand ranks then write 70 records a second
QUICK = 2.0  # the same once a hang is likely
GRACE = 10.0  # seconds that ranks get to keep their evidence


def hang_limit(config: Config) -> float | None:
    """Seconds of `health.hang_timeout`, well below the time after which a collective would fail of itself, without a word about who is to blame."""
    limit = config.health.hang_timeout
    return None if limit is None else min(limit, config.launch.timeout / 2)


class Watchdog:
    """The watch over one rank's main thread, which makes and closes it.

    Args:
        run_dir: shared by all ranks.
        timeout: seconds without progress that are a hang; None = no watch (collectives are still counted, for stragglers.py).
        groups: people's name of a process group -> its global ranks ("tp": (0, 1)), those that this rank belongs to.
    """

    def __init__(self, run_dir: Path, *, rank: int, ranks: int, timeout: float | None, groups: Mapping[str, Sequence[int]]):
        self.directory, self.rank, self.ranks, self.timeout = Path(run_dir) / "health", rank, ranks, timeout
        self.collectives = Collectives(groups)
        self.interval = min(SLOWEST, (timeout or 0.0) / TICKS)
        self._step, self._phase, self._beats = 0, "start", 0
        self._own = Heartbeat(rank, socket.gethostname(), os.getpid(), life="", born=evidence.born(os.getpid()))
        self._counted, self._still, self._longest = 0, 0.0, {}
        self._seen: dict[int, Seen] = {}
        self._end, self._thread, self._stacks, self._told = threading.Event(), None, None, False

    # ---------------------------------------------------------------- the main thread

    def start(self) -> None:
        """Once all ranks have met. Not collective, but to be called at the same place of the program on all of them."""
        self.collectives.install()
        if self.timeout is None:
            return
        self._own = replace(self._own, life=_life(self.directory))
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._stacks = os.open(self._stacks_path(), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
            self._write()
        except OSError as error:
            warnings.warn(f"{self.directory}: {error.strerror}; a hang of this rank will not be seen", RuntimeWarning, stacklevel=2)
            return
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, step: int, phase: str) -> None:
        """The rank gets on. Two assignments and an addition: as often as one likes.

        Args:
            step: done so far.
            phase: start | compile | data | step | evaluation | rollout | checkpoint, from here to the next beat.
        """
        self._step, self._phase = step, phase
        self._beats += 1

    @contextmanager
    def phase(self, name: str):
        """A phase inside another one, which goes on afterwards."""
        before = self._phase
        self.beat(self._step, name)
        try:
            yield
        finally:
            self.beat(self._step, before)

    def close(self) -> None:
        """This rank's work has ended, well or not."""
        self.collectives.uninstall()
        if self._thread is not None:
            self._end.set()
            self._thread.join(timeout=self.interval + 1.0)  # a file system that hangs must not hold the end up
            self._thread = None
            with suppress(OSError):
                self._write(closed=True)
        if self._stacks is not None:
            faulthandler.cancel_dump_traceback_later()
            with suppress(OSError):
                if os.fstat(self._stacks).st_size == 0:
                    self._stacks_path().unlink()
            os.close(self._stacks)
            self._stacks = None

    def _stacks_path(self) -> Path:
        return self.directory / f"rank_{self.rank}.stacks"

    # ---------------------------------------------------------------- the thread

    def _watch(self) -> None:
        last, warned = time.monotonic(), False
        while not self._end.wait(self.interval if self._still < self.timeout / 2 else min(self.interval, QUICK)):
            now = time.monotonic()
            # A longer gap: this process has not been running.
            elapsed, last = min(now - last, 2 * self.interval), now
            try:
                self._look(elapsed)
            except Exception as error:  # noqa: BLE001 the watch must outlive a bad disk
                if not warned:
                    warnings.warn(f"watchdog: {type(error).__name__}: {error}; it goes on watching", RuntimeWarning, stacklevel=1)
                warned = True

    def _look(self, elapsed: float) -> None:
        # Where this very thread cannot run (native code holds Python's lock), faulthandler's own, which needs no lock, keeps the stacks.
        faulthandler.dump_traceback_later(0.75 * self.timeout, file=self._stacks)
        counted, phase = self._beats + self.collectives.moves, self._phase
        if counted != self._counted:
            self._longest[self._own.phase] = max(self._longest.get(self._own.phase, 0.0), self._still)
            self._counted, self._still = counted, 0.0
        else:
            self._still += elapsed
        self._own = replace(self._own, step=self._step, phase=phase)
        self._write()
        if self._still < self.timeout / 2:
            self._seen.clear()
            return
        self._follow_or_lead(elapsed)

    def _allowed(self) -> float:
        phase = self._own.phase
        return max(self.timeout * ALLOWANCES.get(phase, LONG), GROWTH * self._longest.get(phase, 0.0))

    def _write(self, *, closed: bool = False, stage: str | None = None) -> None:
        late = self.timeout is not None and self._still >= self.timeout / 4
        waiting = self.collectives.waiting()
        if waiting is None and late and (content := evidence.flight()) is not None and b'"nccl:' in content:
            waiting = evidence.in_flight(content, self.collectives)  # the host is not in it: the device is
        self._own = replace(
            self._own, beat=self._own.beat + 1, still=round(self._still, 3), allowed=round(self._allowed(), 3), waiting=waiting,
            issued=self.collectives.issued(), place=evidence.place() if late else None, quick=ALLOWANCES.get(self._own.phase, LONG) <= 1,
            closed=closed, stage=self._own.stage if stage is None else stage,
        )
        heartbeat.write(self.directory, self._own)

    # ---------------------------------------------------------------- a hang

    def _observe(self, ranks: Sequence[int], elapsed: float) -> list[Seen]:
        for rank in ranks:
            record = self._own if rank == self.rank else heartbeat.read(self.directory, rank)
            before = self._seen.get(rank)
            if record is None or record.life != self._own.life:  # none yet, or torn
                record = before.record if before is not None else None
            same = before is not None and (record.beat if record else None) == (before.record.beat if before.record else None)
            self._seen[rank] = Seen(rank, record, before.silent + elapsed if same and rank != self.rank else 0.0)
        return [self._seen[rank] for rank in ranks]

    def _follow_or_lead(self, elapsed: float) -> None:
        """Looks at ever more of the lower ranks until one of them lives: a thousand ranks must not read a thousand files each."""
        width, silence = 1, self.timeout * SILENT_SHARE
        while True:
            lower = range(min(width, self.rank))
            for each in self._observe([rank for rank in lower if rank >= width // 4], elapsed):
                if each.record is not None and each.record.stage in (DUMP, LEAVE):
                    self._follow(each.rank)
            if any(self._seen[rank].silent < silence and not self._has_left(rank) for rank in lower):
                return  # that one leads
            if len(lower) == self.rank:
                break
            width *= 4
        seen = self._observe(range(self.rank, self.ranks), elapsed)
        diagnosis = judge(
            [*(self._seen[rank] for rank in range(self.rank)), *seen], timeout=self.timeout, interval=self.interval,
            process_state=lambda record: evidence.process_state(record, self._own.host),
        )
        if diagnosis is not None:
            self._lead(diagnosis)

    def _has_left(self, rank: int) -> bool:
        record = self._seen[rank].record
        return record is not None and record.closed

    def _lead(self, diagnosis: Diagnosis) -> None:
        text = f"{diagnosis.text}\nwhat each rank was doing: {self.directory}/rank_*.stacks"
        self._last_resort(text)
        self._write(stage=DUMP)
        evidence.keep(self.directory, self.rank)
        for suspect in diagnosis.suspects if diagnosis.kind == "silent" else ():
            if (record := self._seen[suspect.rank].record) is not None:
                evidence.keep_of(self.directory, record, self._own.host)
        self._wait_for(lambda: all(self._has_kept(rank) for rank in range(self.ranks)))
        events = Events(self.directory.parent / "events.jsonl")
        events.write("hang", **diagnosis.event())
        events.close()
        self._tell(text)  # not earlier: where srun started the ranks, each leaves as soon as it has read this
        self._write(stage=LEAVE)
        os._exit(1)

    def _tell(self, text: str) -> None:
        if not self._told and not report_failure(1, text):
            os.write(2, f"error: {text}\n".encode())
        self._told = True

    def _has_kept(self, rank: int) -> bool:
        if rank == self.rank or self._has_left(rank) or self._seen[rank].silent >= self.timeout * SILENT_SHARE:
            return True  # nothing is to be expected of it
        record = heartbeat.read(self.directory, rank)
        return record is not None and record.stage == DUMPED

    def _follow(self, leader: int) -> None:
        self._last_resort()
        evidence.keep(self.directory, self.rank)
        self._write(stage=DUMPED)

        def told() -> bool:
            record = heartbeat.read(self.directory, leader)
            return record is not None and record.stage == LEAVE

        self._wait_for(told)
        os._exit(1)

    def _wait_for(self, reached) -> None:
        deadline = time.monotonic() + GRACE
        while not reached() and time.monotonic() < deadline:
            time.sleep(0.1)

    def _last_resort(self, text: str | None = None) -> None:
        """Whatever a disk does to the evidence, this rank leaves, and the leader with a word."""
        def leave() -> None:
            if text is not None:
                self._tell(text)
            os._exit(1)

        faulthandler.cancel_dump_traceback_later()
        timer = threading.Timer(3 * GRACE, leave)
        timer.daemon = True
        timer.start()


def _life(directory: Path) -> str:
    """A word that is the same on all ranks of this life of the job and was never used before: the first to come chooses it."""
    own = uuid.uuid4().hex
    if not dist.is_initialized():
        return own
    store = dist.distributed_c10d._get_default_store()
    return store.compare_set(f"megatron_ext/{directory}", "", own).decode()
