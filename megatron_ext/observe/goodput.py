"""Goodput: the share of the allocated time that went into steps which the model kept. The ledger's reader; the writer is ledger.py.

Each second from the first submission to the last line is in exactly one class:

    queue        waiting for nodes: nothing is allocated. Also from the clean end of a life to the submission (or start) of the next one
    start-up     from the start of the allocation to the first step, in the first life
    restart      the same in later lives; and from the last line of a life that died to the submission (or start) of the next one
    compile      a phase of the loop, as are data wait, checkpoint (what the loop stands still for) and evaluation
    step         of steps that were kept
    lost work    of steps that a later life (or a rewind) did again, or that a dead life did not complete

    goodput = step / (all - queue)      MTTF = time in lives / lives that failed

A life failed where it has no clean close and another one follows, or where its close says so. The last life of a ledger without a close is running,
or was killed: nobody can tell, and it counts as no failure. Where a failure costs the work since the last save, and a save costs its write time C,
least is lost with a save every

    sqrt(2 MTTF C)      Young 1974 (doi 10.1145/361147.361115), Daly 2006 (doi 10.1016/j.future.2004.11.016); for C much smaller than MTTF

C is the whole time of a save, though training goes on while it is written in the background: a file system that is slow is not asked more often.
"""
import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .events import read_events
from .ledger import MICRO, NAME, PHASES, Ledger
from .lines import read_lines

__all__ = ["CLASSES", "Goodput", "Ledger", "Life", "Span", "read_goodput", "steps_between_saves"]

QUEUE, START, COMPILE, DATA, STEP, CHECKPOINT, EVALUATION, RESTART, LOST = CLASSES = (
    "queue", "start-up", "compile", "data wait", "step", "checkpoint", "evaluation", "restart", "lost work")
_CLASS_OF = dict(zip(PHASES, (START, COMPILE, DATA, STEP, CHECKPOINT, EVALUATION), strict=True))
RECENT = 20  # saves whose median is the write time


@dataclass
class Span:
    """A stretch of time. `start`: seconds since 1970. `micro`: microseconds in each class, in no order. life: index in `Goodput.lives`."""

    start: float
    micro: dict[str, int]
    life: int


@dataclass
class Life:
    """One life. Times in seconds since 1970.

    Attributes:
        started: of its allocation, or of the ledger where that is not known. ended: its last line.
        clean: True or False by its close, or False where it has none and another life follows; None: running, or killed.
        first, last: steps that it completed; None where it completed none.
        micro: microseconds in each class, the way to this life (queue, restart) included.
    """

    number: int
    started: float
    ended: float
    restart: bool
    clean: bool | None = None
    reason: str = ""
    first: int | None = None
    last: int | None = None
    micro: dict[str, int] = field(default_factory=dict)

    @property
    def seconds(self) -> dict[str, float]:
        """Of each class, all nine of them."""
        return {name: self.micro.get(name, 0) / MICRO for name in CLASSES}


@dataclass(frozen=True)
class Goodput:
    """What a ledger adds up to. Times in seconds.

    Attributes:
        steps: that were kept. write_seconds: of a save, median of the last ones; None where none was recorded.
    """

    lives: tuple[Life, ...]
    spans: tuple[Span, ...]
    steps: int
    write_seconds: float | None

    @property
    def seconds(self) -> dict[str, float]:
        """Of each class, all nine of them."""
        return {name: sum(life.micro.get(name, 0) for life in self.lives) / MICRO for name in CLASSES}

    @property
    def wall(self) -> float:
        """All lives and the gaps between them."""
        return sum(sum(life.micro.values()) for life in self.lives) / MICRO

    @property
    def allocated(self) -> float:
        return self.wall - self.seconds[QUEUE]

    @property
    def goodput(self) -> float | None:
        """Share of 1; None where nothing was allocated yet."""
        return self.seconds[STEP] / self.allocated if self.allocated > 0 else None

    @property
    def step_seconds(self) -> float | None:
        """Mean time of a step that was kept."""
        return self.seconds[STEP] / self.steps if self.steps else None

    @property
    def failures(self) -> int:
        return sum(life.clean is False for life in self.lives)

    @property
    def uptime(self) -> float:
        """Time in lives, start-up included."""
        return sum(life.ended - life.started for life in self.lives)

    @property
    def mttf(self) -> float | None:
        """Mean time to failure; None where there was none."""
        return self.uptime / self.failures if self.failures else None

    @property
    def interval(self) -> float | None:
        """sqrt(2 MTTF C), seconds between saves; None where one of the two is not known."""
        return math.sqrt(2 * self.mttf * self.write_seconds) if self.mttf and self.write_seconds else None


def steps_between_saves(goodput: Goodput, step_seconds: float | None) -> int:
    """Steps from one save to the next that cost least, 1 at least; 0 where it cannot be told yet (no save or no step was timed).

    Before the first failure the time in lives stands for the MTTF, as if one came now: saves are close together while little is known, and
    further apart the longer nothing happens. A save never follows the one before sooner than that one takes to write.

    Args:
        step_seconds: of a step, such as `goodput.step_seconds`.
    """
    if not step_seconds or goodput.write_seconds is None:
        return 0
    interval = math.sqrt(2 * (goodput.mttf or goodput.uptime) * goodput.write_seconds)
    return max(1, round(max(interval, goodput.write_seconds) / step_seconds))


def read_goodput(run_dir: Path) -> Goodput:
    """Reads goodput.jsonl and the saves of events.jsonl. A ledger that is missing or torn gives what there is; one that grows is read as it stands."""
    book = _Book()
    for line in read_lines(Path(run_dir) / NAME):
        try:
            book.add(line)
        except (KeyError, TypeError, ValueError, OverflowError):  # not a line of ours
            continue
    saves = [event["seconds"] for event in read_events(Path(run_dir) / "events.jsonl")
             if event.get("kind") == "save" and isinstance(event.get("seconds"), (int, float))]
    return Goodput(tuple(book.lives), tuple(book.spans), sum(piece.last - piece.first + 1 for piece in book.pieces),
                   statistics.median(saves[-RECENT:]) if saves else None)


@dataclass
class _Piece:
    """Steps `first` to `last` that are kept, and where their seconds stand: (span, microseconds)."""

    first: int
    last: int
    parts: list[tuple[Span, int]]


class _Book:
    """Adds a ledger up, line by line. `pieces` are the steps that are kept, in rising order: what starts again at a step takes those after it off."""

    def __init__(self):
        self.lives: list[Life] = []
        self.spans: list[Span] = []
        self.pieces: list[_Piece] = []
        self._end: int | None = None  # of the last life so far, microseconds since 1970
        self._tail: list[tuple[Span, int]] = []  # step time that no completed step has taken yet

    def add(self, line: Mapping) -> None:
        kind = line.get("kind")
        if kind == "begin":
            self._begin(line)
        elif not self.lives or line.get("life") != self.lives[-1].number:  # a life that was given up for dead: its time has been shared out
            return
        elif kind == "time":
            self._time(line)
        elif kind == "rewind":
            self._undo(int(line["step"]) + 1)
            self._lose(self._tail)
        elif kind == "close":
            self._close(line)

    def _begin(self, line: Mapping) -> None:
        began, number = _micro(line["time"]), int(line["life"])
        if self.lives:
            before = self.lives[-1]
            if before.clean is None:
                before.clean = False
                self._lose(self._tail)
            began = max(began, self._end)  # another node's clock may be behind
            lowest = self._end
        else:
            lowest = -math.inf
        restart = line.get("restart") is True
        started = _between(lowest, line.get("started"), began)
        submitted = _between(lowest, line.get("submitted"), began if started is None else started)
        life = Life(number, (began if started is None else started) / MICRO, began / MICRO, restart)
        waited = self._ways(self.lives[-1].clean if self.lives else None, submitted, started, began, restart)
        self.lives.append(life)
        for start, end, name in waited:
            self._span(start, {name: end - start})
        self._end = began

    def _ways(self, clean: bool | None, submitted: int | None, started: int | None, began: int, restart: bool) -> Iterator[tuple[int, int, str]]:
        """(start, end, class) of what lies before the first line of a life. clean: how the life before ended, None = there was none."""
        known = [moment for moment in (submitted, started, began) if moment is not None]
        if clean is not None:
            yield self._end, known[0], QUEUE if clean else RESTART
        if submitted is not None:
            yield submitted, known[1], QUEUE
        if started is not None:
            yield started, began, RESTART if restart else START

    def _time(self, line: Mapping) -> None:
        start, life = _micro(line["from"]), self.lives[-1]
        spent = {_CLASS_OF[name]: _micro(seconds) for name, seconds in line["seconds"].items()}
        steps = (int(line["first"]), int(line["last"])) if "first" in line else None
        tail = min(_micro(line.get("tail", 0.0)), spent.get(STEP, 0)) if steps else spent.get(STEP, 0)
        if any(micro < 0 for micro in spent.values()) or tail < 0 or steps and steps[0] > steps[1]:
            raise ValueError("a time or a step that cannot be")
        if life.restart and START in spent:
            spent[RESTART] = spent.pop(START)
        span = self._span(max(start, self._end), spent)
        self._end = max(start, self._end) + sum(spent.values())
        life.ended = self._end / MICRO
        if steps:
            self._undo(steps[0])
            self.pieces.append(_Piece(*steps, [*self._tail, (span, spent.get(STEP, 0) - tail)]))
            self._tail = []
            life.first, life.last = steps[0] if life.first is None else life.first, steps[1]
        if tail:
            self._tail.append((span, tail))

    def _close(self, line: Mapping) -> None:
        life = self.lives[-1]
        life.clean, life.reason = line.get("clean") is True, str(line.get("reason", ""))
        if life.clean and life.last is not None and self.pieces:  # what the loop did after its last step belongs to it
            self.pieces[-1].parts += self._tail
            self._tail = []
        self._lose(self._tail)

    def _span(self, start: int, micro: dict[str, int]) -> Span:
        span = Span(start / MICRO, micro, len(self.lives) - 1)
        if any(micro.values()):
            self.spans.append(span)
        for name, spent in micro.items():
            self._count(span, name, spent)
        return span

    def _undo(self, first: int) -> None:
        """Steps from `first` on are done again."""
        while self.pieces and self.pieces[-1].last >= first:
            piece = self.pieces.pop()
            if piece.first >= first:
                self._lose(piece.parts)
                continue
            share = (first - piece.first) / (piece.last - piece.first + 1)  # a line ends at every checkpoint, so this is rare
            kept = [(span, round(micro * share)) for span, micro in piece.parts]
            self._lose([(span, micro - stays) for (span, micro), (_, stays) in zip(piece.parts, kept, strict=True)])
            self.pieces.append(_Piece(piece.first, first - 1, kept))

    def _lose(self, parts: list[tuple[Span, int]]) -> None:
        for span, micro in parts:
            span.micro[STEP] = span.micro.get(STEP, 0) - micro
            span.micro[LOST] = span.micro.get(LOST, 0) + micro
            self._count(span, STEP, -micro)
            self._count(span, LOST, micro)
        parts.clear()

    def _count(self, span: Span, name: str, micro: int) -> None:
        total = self.lives[span.life].micro
        total[name] = total.get(name, 0) + micro


def _micro(seconds: object) -> int:
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise TypeError("not a number")
    return round(seconds * MICRO)


def _between(lowest: float, moment: object, highest: int) -> int | None:
    """`moment` in microseconds, moved into the range; None where it is not known."""
    if moment is None:
        return None
    return min(max(lowest, _micro(moment)), highest)
