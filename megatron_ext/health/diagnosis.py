"""From what all ranks say of themselves to whether the job hangs, whom it waits for, and in which collective. Pure Python, no clock, no files.

A job hangs when no living rank has got on for as long as its phase allows. Then each rank is one of
    silent   its heartbeats have ended: the process is stopped or gone, or a library holds Python's lock for ever
    left     it has ended its work
    idle     it lives and is inside no collective: it is stuck in Python, in a kernel, in a file
    waiting  it is inside a collective

A waiting rank awaits the members of its group that have not come to that collective yet (fewer calls on the group than its own number). Blame
follows these arrows to ranks that are not waiting: silent ones before all others, for an idle one may be held up by them unseen, then
those that left, then idle ones. Where all wait, they wait for each other: collectives in different orders; or, where all are in the same, nobody
is late and what carries it has failed.
"""
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_ext.health.heartbeat import Heartbeat, Waiting, spans

SILENT_SHARE = 0.25  # of the time limit: how long heartbeats must be missing in a phase of short steps; in others the whole limit
PROCESS_STATES = {
    "T": "the process is stopped (SIGSTOP)", "t": "the process is stopped by a debugger", "Z": "the process has died", "X": "the process has died",
    "D": "the process is in uninterruptible I/O",
}


@dataclass(frozen=True)
class Seen:
    """A rank as the leader sees it: its last record (None: never one in this life), and for how many seconds `beat` has not changed."""

    rank: int
    record: Heartbeat | None
    silent: float


@dataclass(frozen=True)
class Suspect:
    """host, pid: None where the rank has never said."""

    rank: int
    host: str | None
    pid: int | None
    cause: str

    def __str__(self) -> str:
        where = f" ({self.host}, pid {self.pid})" if self.host else ""
        return f"rank {self.rank}{where}: {self.cause}"


@dataclass(frozen=True)
class Diagnosis:
    """A hang.

    Attributes:
        kind: silent | left | idle | order | transport (see above; the last two name nobody, or those that went elsewhere).
        suspects: whom the others wait for.
        waiting: what most of them wait in, or None where no rank is inside a collective.
        waiters: the ranks in it.
        step: the furthest step that a rank has told of. seconds: for how long nobody has got on.
        text: all of it, for people.
    """

    kind: str
    suspects: tuple[Suspect, ...]
    waiting: Waiting | None
    waiters: tuple[int, ...]
    step: int
    seconds: float
    text: str

    def event(self) -> dict:
        """For events.jsonl."""
        waiting = self.waiting
        return {
            "cause": self.kind, "step": self.step, "seconds": round(self.seconds, 1),
            "suspects": [{"rank": each.rank, "host": each.host, "pid": each.pid, "cause": each.cause} for each in self.suspects],
            "collective": waiting.collective if waiting else None, "group": waiting.label if waiting else None,
            "group_ranks": spans(waiting.ranks) if waiting else None, "number": waiting.number if waiting else None, "waiters": spans(self.waiters),
        }


def judge(
    seen: Sequence[Seen], *, timeout: float, interval: float, process_state: Callable[[Heartbeat], str | None] = lambda record: None,
) -> Diagnosis | None:
    """The diagnosis, or None while the job may still get on.

    Args:
        timeout, interval: seconds of the time limit and between two heartbeats.
        process_state: the state letter of a process (/proc/PID/stat) where it can be asked; "gone" where it has ended.
    """
    silent, left, living = [], [], []
    for each in seen:
        if each.record is not None and each.record.closed:
            left.append(each)
        elif each.silent >= _silence(each.record, timeout):
            silent.append(each)
        elif each.record is None or each.silent > 4 * interval:
            return None  # it is not known yet whether this one lives
        else:
            living.append(each)
    if not silent and not living:
        return None
    for each in living:
        if each.record.still < (timeout if silent else each.record.allowed):
            return None
    return _diagnose(silent, left, living, process_state)


def _silence(record: Heartbeat | None, timeout: float) -> float:
    """Seconds without a heartbeat that mean that there will be none."""
    return timeout * SILENT_SHARE if record is not None and record.quick else timeout


def _diagnose(silent: list[Seen], left: list[Seen], living: list[Seen], process_state) -> Diagnosis:
    waiting = {each.rank: each.record.waiting for each in living if each.record.waiting is not None}
    idle = {each.rank: each for each in living if each.record.waiting is None}
    calls = {each.rank: each.record.issued for each in living}
    awaited = {rank: _awaited(rank, inside, waiting, calls) for rank, inside in waiting.items()}
    wanted = set().union(*awaited.values())

    if silent:
        kind, suspects = "silent", [_suspect(each, _silent_cause(each, process_state)) for each in silent]
    elif gone := [each for each in left if each.rank in wanted]:
        kind, suspects = "left", [_suspect(each, "it has ended while others wait for it") for each in gone]
    elif idle:
        kind = "idle"
        suspects = [_suspect(each, _idle_cause(each)) for rank, each in idle.items() if rank in wanted or not wanted & idle.keys()]
    else:
        places = {rank: _place(rank, inside) for rank, inside in waiting.items()}
        common = Counter(places.values()).most_common(1)[0][0]
        elsewhere = [each for each in living if places[each.rank] != common]
        kind = "order" if elsewhere else "transport"
        suspects = [_suspect(each, f"it waits in {each.record.waiting}") for each in elsewhere if len(elsewhere) * 2 < len(living)]

    named = {each.rank for each in suspects}
    others = {rank: inside for rank, inside in waiting.items() if rank not in named}
    chosen = [inside for rank, inside in others.items() if named & awaited[rank]] or list(others.values())
    top = Counter(chosen).most_common(1)[0][0] if chosen else None
    waiters = tuple(sorted(rank for rank, inside in others.items() if inside == top))
    everyone = [each.record for each in (*silent, *left, *living) if each.record is not None]
    seconds = min((each.record.still for each in living), default=0.0)
    step = max((record.step for record in everyone), default=0)
    return Diagnosis(kind, tuple(suspects), top, waiters, step, seconds, _text(kind, suspects, top, waiters, waiting, step, seconds))


def _awaited(rank: int, inside: Waiting, waiting: dict[int, Waiting], calls: dict[int, dict[str, int]]) -> set[int]:
    """The ranks without which `rank` cannot get on."""
    if inside.peer is not None:
        return {inside.peer}

    def arrived(member: int) -> bool:
        if member not in calls:  # silent, or left: what it has begun it does not finish
            return False
        if inside.number:
            return calls[member].get(inside.group, 0) >= inside.number
        return member in waiting and waiting[member].group == inside.group

    return {member for member in inside.ranks if member != rank and not arrived(member)}


def _place(rank: int, inside: Waiting) -> tuple:
    if inside.peer is None:
        return inside.group, inside.collective, inside.number
    ends = (rank, inside.peer) if inside.collective == "send" else (inside.peer, rank)
    return inside.group, "p2p", *ends  # both ends of a transfer are the same place


def _suspect(each: Seen, cause: str) -> Suspect:
    record = each.record
    return Suspect(each.rank, record.host if record else None, record.pid if record else None, cause)


def _silent_cause(each: Seen, process_state) -> str:
    if each.record is None:
        return "it has not sent a single heartbeat: it hangs in its start, or its node cannot write to run.dir"
    state = process_state(each.record)
    if state == "gone":
        what = "the process is gone"
    elif state in PROCESS_STATES:
        what = PROCESS_STATES[state]
    elif state is not None:
        what = "its process runs, yet its threads do not: native code holds Python's lock, or the file system hangs"
    else:
        what = "the process is stopped, or its node is lost or cannot write to run.dir"
    return f"no heartbeat for {each.silent:.0f} s or more, {what}; last seen at step {each.record.step}, phase {each.record.phase}"


def _idle_cause(each: Seen) -> str:
    record = each.record
    place = f"; its main thread stands in {record.place}" if record.place else ""
    return f"inside no collective and not getting on for {record.still:.0f} s at step {record.step}, phase {record.phase}{place}"


def _text(
    kind: str, suspects: list[Suspect], top: Waiting | None, waiters: tuple[int, ...], waiting: dict[int, Waiting], step: int, seconds: float,
) -> str:
    lines = [f"hang: no rank has got on for {seconds:.0f} s (step {step})"]
    shown = suspects[:8]
    if kind == "order":
        lines.append("ranks wait for each other in different collectives:")
        places: dict[str, list[int]] = {}
        for rank, inside in waiting.items():
            places.setdefault(str(inside), []).append(rank)
        lines += [f"  {_ranks(ranks)} in {place}" for place, ranks in list(places.items())[:8]]
        return "\n".join(lines)
    if kind == "transport":
        lines.append(f"{_ranks(sorted(waiting))} have all come to {top}, and it does not end: the network or the collective library has failed")
        return "\n".join(lines)
    lines += [str(each) for each in shown]
    if len(suspects) > len(shown):
        lines.append(f"and ranks {spans(each.rank for each in suspects[len(shown):])} likewise")
    if waiters:
        lines.append(f"{_ranks(waiters)} {'waits' if len(waiters) == 1 else 'wait'} in {top}")
    return "\n".join(lines)


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {spans(ranks)}"
