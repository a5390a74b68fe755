"""The goodput ledger's writer: which of a life's seconds went where, in `run.dir`/goodput.jsonl. The reader is goodput.py.

A life is one run of the training program; a run that is stopped, killed and resumed has several, and all of them append to the same file:

    {"kind": "begin", "life": 2, "time": t, "submitted": ..., "started": ..., "restart": true}
    {"kind": "time", "life": 2, "from": t, "to": t + 5, "seconds": {"step": 4.6, "data": 0.4}, "first": 31, "last": 39, "tail": 0.2}
    {"kind": "rewind", "life": 2, "time": t, "step": 30}
    {"kind": "close", "life": 2, "time": t, "reason": "...", "clean": true}

`seconds` add up to `to` - `from` exactly: time is counted in whole microseconds. `first` and `last` are the steps that were completed in them, `tail` is
the part of `step` that came after the last one. A line is written every few seconds and before each checkpoint is, so that a SIGKILL loses
those few seconds and never the time of a step that a checkpoint holds. Times are seconds since 1970 (UTC).
"""
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from .lines import LineFile

NAME = "goodput.jsonl"
PHASES = ("start", "compile", "data", "step", "checkpoint", "evaluation")
MICRO = 1_000_000


class Ledger:
    """The ledger of one life. Not for several threads.

    Args:
        path: the file; None = nothing is recorded (ranks other than the first).
        clock: seconds since 1970. A clock that is set back stands still until it has caught up.
        every: seconds between two lines, at most this much is lost by a SIGKILL.
    """

    def __init__(self, path: Path | None, *, clock: Callable[[], float] = time.time, every: float = 5.0):
        self._file = None if path is None else LineFile(path)
        self._clock, self._every = clock, round(every * MICRO)
        self._waiting: list[dict] = []  # lines that a full disk did not take, or of a life that is not yet `accepted`
        self._accepted = True
        self._life: int | None = None

    def begin(self, *, life: int, submitted: float | None = None, started: float | None = None, restart: bool = False, held: bool = False) -> None:
        """Starts the life's clock, in the class of start-up, or of restart.

        Args:
            life: its number, from 1. restart: whether an earlier life went before.
            held: nothing is written until the life is `accepted`.
            submitted, started: when the job was handed in and when it got its nodes (allocation.py), where that is known.
        """
        if self._file is None:
            return
        self._life, self._stack, self._accepted = life, ["start"], not held
        self._from = self._step_end = self._at = round(self._clock() * MICRO)
        self._done: dict[str, int] = {}  # microseconds of each phase up to the end of the last completed step
        self._open: dict[str, int] = {}  # and after it
        self._first: int | None = None
        self._last = 0
        self._write({"kind": "begin", "life": life, "time": self._at / MICRO, "submitted": submitted, "started": started, "restart": restart})

    def accepted(self) -> None:
        """The life has begun in earnest: what was held back is written."""
        if self._life is not None:
            self._accepted = True
            self._flush()

    def refused(self) -> None:
        """The life ended before it began, for bad input: it leaves no trace."""
        if self._life is not None and not self._accepted:
            self._waiting.clear()
            self._file.close()
            self._life = None

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is done inside is of this phase; a phase inside another one pauses it. Outside of all is start-up until the first step, then step.

        Raises ValueError for a name that is none of PHASES.
        """
        if name not in PHASES:
            raise ValueError(f"phase {name!r}: must be one of {', '.join(PHASES)}")
        if self._life is None:
            yield
            return
        self._tick()
        if name == "checkpoint":  # the steps that it holds are on the disk before it is
            self._flush()
        self._stack.append(name)
        try:
            yield
        finally:
            if self._life is not None:
                self._tick()
                self._stack.pop()
                if name == "checkpoint" or self._at - self._from >= self._every:
                    self._flush()

    def step(self, number: int) -> None:
        """Step `number` (the first is 1) is complete."""
        if self._life is None:
            return
        self._tick()
        if self._first is not None and number != self._last + 1:
            self._flush(until=self._step_end)
        for name, spent in self._open.items():
            self._done[name] = self._done.get(name, 0) + spent
        self._open, self._step_end, self._last = {}, self._at, number
        self._first = number if self._first is None else self._first
        self._stack[0] = "step"
        if self._at - self._from >= self._every:
            self._flush()

    def rewind(self, step: int) -> None:
        """Training goes on from the state after `step`: what was done beyond it, in this life or in earlier ones, is lost work."""
        if self._life is None:
            return
        self._tick()
        self._flush()
        self._write({"kind": "rewind", "life": self._life, "time": self._at / MICRO, "step": step})

    def close(self, reason: str, *, clean: bool = True) -> None:
        """Ends the life. clean: False where it failed (an exception, a hang), which counts as a failure in the mean time to failure."""
        if self._life is None:
            return
        self._accepted = True
        self._tick()
        self._flush()
        self._write({"kind": "close", "life": self._life, "time": self._at / MICRO, "reason": reason, "clean": clean})
        self._file.close()
        self._life = None

    def _tick(self) -> None:
        now = max(self._at, round(self._clock() * MICRO))
        name = self._stack[-1]
        self._open[name] = self._open.get(name, 0) + now - self._at
        self._at = now

    def _flush(self, until: int | None = None) -> None:
        """Writes what was counted, with `until` only up to there: the end of the last completed step."""
        tail = self._open if until is None else {}
        end = self._at if until is None else until
        if end > self._from or self._first is not None:
            seconds = {name: self._done.get(name, 0) + tail.get(name, 0) for name in PHASES}
            line: dict[str, object] = {"kind": "time", "life": self._life, "from": self._from / MICRO, "to": end / MICRO,
                                       "seconds": {name: spent / MICRO for name, spent in seconds.items() if spent}}
            if self._first is not None:
                line |= {"first": self._first, "last": self._last}
                if tail.get("step"):
                    line["tail"] = tail["step"] / MICRO
            self._write(line)
        self._from, self._done, self._first = end, {}, None
        if until is None:
            self._open = {}

    def _write(self, line: dict) -> None:
        self._waiting.append(line)
        while self._accepted and self._waiting and self._file.append(self._waiting[0]):
            del self._waiting[0]
