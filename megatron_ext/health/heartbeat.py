"""What a rank says of itself while it lives: one record in run.dir/health/rank_N.json, written over and over by the rank's watchdog.

Files and not the job's TCPStore: the store is served by rank 0 (or by an agent on its node), so that just the stop of rank 0 would take
away the means of naming it. All nodes share run.dir anyway, for the checkpoints.

A record is overwritten in place, by one write of SIZE bytes: a full disk takes it (the block is there already), and a reader finds the old
one, the new one, or, while a slow file system is between the two, none. Each write opens and closes the file: that is what NFS needs to show it to
other nodes. No clock is compared between ranks: a reader counts, on its own clock, for how long `beat` has not changed.
"""
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

SIZE = 4096  # bytes of a record, padded with blanks
SEEN, DUMP, DUMPED, LEAVE = "", "dump", "dumped", "leave"  # stages of the end of a hung job: the leader says dump and leave, the others dumped


@dataclass(frozen=True)
class Waiting:
    """The collective that a rank is inside.

    Attributes:
        collective: torch.distributed's name of it.
        group: torch's name of the group, the same on all members. label: the name that people know it by ("tp").
        ranks: global ranks of the group.
        number: calls on this group up to this one (the first is 1); 0 = not known.
        peer: the global rank at the other end of a send or receive.
    """

    collective: str
    group: str
    label: str
    ranks: tuple[int, ...]
    number: int = 0
    peer: int | None = None

    def __str__(self) -> str:
        end = "" if self.peer is None else f" {'to' if self.collective == 'send' else 'from'} rank {self.peer}"
        number = f" number {self.number}" if self.number else ""
        if not self.ranks:
            return f"{self.collective} of a group that is not known"
        return f"{self.collective}{number}{end} of group {self.label} (ranks {spans(self.ranks)})"


@dataclass(frozen=True)
class Heartbeat:
    """One record.

    Attributes:
        life: the same on all ranks of one life of the job, so that a record of an earlier one is known as such.
        born: start of the process in clock ticks since boot (/proc), which tells it from a later one with the same pid; 0 = not known.
        beat: grows by one with each record.
        still: seconds for which the main thread has not got on. allowed: seconds that it may be still in this phase.
        waiting: the collective that it is inside, or None.
        issued: calls on each group so far, by torch's name of it.
        place: where its main thread stands, told once it has been still for long.
        quick: whether the phase is one of short steps.
        closed: it has ended its work, or its part in the watch.
    """

    rank: int
    host: str
    pid: int
    life: str
    born: int = 0
    beat: int = 0
    step: int = 0
    phase: str = "start"
    still: float = 0.0
    allowed: float = 0.0
    waiting: Waiting | None = None
    issued: dict[str, int] = field(default_factory=dict)
    place: str | None = None
    quick: bool = False
    stage: str = SEEN
    closed: bool = False


def path_of(directory: Path, rank: int) -> Path:
    return Path(directory) / f"rank_{rank}.json"


def write(directory: Path, beat: Heartbeat) -> None:
    """Raises OSError."""
    data = _encode(beat)
    if len(data) > SIZE:  # very many groups
        data = _encode(replace(beat, issued={}, place=(beat.place or "")[:200]))
    fd = os.open(path_of(directory, beat.rank), os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.pwrite(fd, data[:SIZE].ljust(SIZE), 0)
    finally:
        os.close(fd)


def read(directory: Path, rank: int) -> Heartbeat | None:
    """The rank's record; None where there is none, or none that is whole."""
    try:
        content = json.loads(path_of(directory, rank).read_bytes())
        waiting = content.pop("waiting")
        if waiting is not None:
            waiting = Waiting(**{**waiting, "ranks": parse_spans(waiting["ranks"])})
        return Heartbeat(**content, waiting=waiting)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _encode(beat: Heartbeat) -> bytes:
    content = asdict(beat)
    if beat.waiting is not None:
        content["waiting"]["ranks"] = spans(beat.waiting.ranks)
    return json.dumps(content).encode()


def spans(ranks: Iterable[int]) -> str:
    """Ranks in few words, also for a thousand: (0, 1, 2, 3) -> "0-3", (0, 8, 16, 24) -> "0-24:8", (1, 5) -> "1,5"."""
    ranks, found = sorted(ranks), []
    while ranks:
        step = ranks[1] - ranks[0] if len(ranks) > 1 else 0
        length = 1
        while length < len(ranks) and ranks[length] - ranks[length - 1] == step:
            length += 1
        if length < 3 and not (length == 2 and step == 1):
            length, step = 1, 0
        run, ranks = ranks[:length], ranks[length:]
        found.append(str(run[0]) if length == 1 else f"{run[0]}-{run[-1]}" + (f":{step}" if step > 1 else ""))
    return ",".join(found)


def parse_spans(text: str) -> tuple[int, ...]:
    """The inverse of `spans`. Raises ValueError."""
    ranks: list[int] = []
    for part in filter(None, text.split(",")):
        run, _, step = part.partition(":")
        first, _, last = run.partition("-")
        ranks += range(int(first), int(last or first) + 1, int(step or 1))
    return tuple(ranks)
