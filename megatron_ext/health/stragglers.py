"""Ranks that are slower than those that do the same work, from the time that their steps take outside collectives.

Whoever waits in a collective is not slow: in a job that waits for one slow rank all steps are equally long, and only
    compute = seconds of the step - seconds waited in collectives
tells them apart. Compared are medians over a window of steps (a step that was slow once, by a checkpoint or a garbage collection, does not
count), and each rank with the median of its *peers*: the other ranks of the same pipeline stage. Stages differ by nature (the last one has the
vocabulary). Of two ranks the other one is the median.

    factor = median of own compute / median over the peers of theirs

A rank is named when its factor is above the limit and its lead over the peers is at least LEAST of a step: less than that costs the job nothing.

Gathered once a window, by one small collective of all ranks. On CUDA one step in SAMPLE is timed (CUDA events, collectives.py), on the CPU each.
"""
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch.distributed as dist

from megatron_ext.health.collectives import Collectives

LEAST = 0.05
SAMPLE = 10


@dataclass(frozen=True)
class Straggler:
    """A slow rank. seconds: its median compute of a step; peers: the median over its peers."""

    rank: int
    host: str
    factor: float
    seconds: float
    peers: float

    def __str__(self) -> str:
        return (f"rank {self.rank} ({self.host}) computes {self.factor:.2f} times as long as its peers: "
                f"{self.seconds * 1000:.0f} ms a step outside collectives, they {self.peers * 1000:.0f} ms")


@dataclass(frozen=True)
class Pace:
    """A rank's window. compute, step: medians in seconds of a step outside collectives and altogether."""

    host: str
    compute: float
    step: float


def find(paces: Sequence[Pace], peers: Sequence[Sequence[int]], *, factor: float) -> list[Straggler]:
    """The stragglers, the slowest first.

    Args:
        paces: of each rank.
        peers: ranks that do the same work; a rank alone has nothing to be compared with.
        factor: above which a rank is slow.
    """
    found = []
    for group in peers:
        for rank in group:
            others = [paces[other].compute for other in group if other != rank]
            usual = median(others) if others else 0.0
            own = paces[rank]
            if usual > 0 and own.compute > factor * usual and own.compute - usual >= LEAST * own.step:
                found.append(Straggler(rank, own.host, own.compute / usual, own.compute, usual))
    return sorted(found, key=lambda straggler: -straggler.factor)


def gather(pace: Pace) -> list[Pace]:
    """Every rank's. Collective over all ranks of the job."""
    paces = [pace] * dist.get_world_size()
    if len(paces) > 1:
        dist.all_gather_object(paces, pace)
    return paces


class Stragglers:
    """Watches the steps of this rank: `begin()`, the step, `end(seconds)`.

    Args:
        collectives: the installed ones of the watchdog.
        peers: see `find`.
        factor: above which a rank is slow; None = off.
        window: steps between two looks, the same on all ranks.
        cuda: whether collectives run on a GPU's streams.
        gather: how the ranks' figures come together.
    """

    def __init__(self, collectives: Collectives, peers: Sequence[Sequence[int]], *, factor: float | None, window: int, cuda: bool = False,
                 gather: Callable[[Pace], list[Pace]] = gather):
        self._collectives, self._peers, self._factor, self._window, self._cuda, self._gather = collectives, peers, factor, window, cuda, gather
        self._steps, self._sampling, self._waited = 0, False, 0.0
        self._times: list[tuple[float, float]] = []

    def begin(self) -> None:
        """Right before a step."""
        if self._factor is None:
            return
        self._sampling = not self._cuda or self._steps % self._window % SAMPLE == min(SAMPLE, self._window) - 1
        if self._cuda and self._sampling:
            self._collectives.sample()
        self._waited = self._collectives.waited

    def end(self, seconds: float) -> list[Straggler]:
        """Right after the step, which took `seconds`; the device is synchronised. Collective in the last step of each window.

        Returns: the stragglers of the window, the same on all ranks; none in other steps.
        """
        if self._factor is None:
            return []
        self._steps += 1
        if self._sampling:
            waited = self._collectives.sampled() if self._cuda else self._collectives.waited - self._waited
            self._times.append((max(0.0, seconds - waited), seconds))
        if self._steps % self._window:
            return []
        computes, steps = zip(*self._times)
        self._times.clear()
        return find(self._gather(Pace(socket.gethostname(), median(computes), median(steps))), self._peers, factor=self._factor)


def same_work(grid) -> list[tuple[int, ...]]:
    """Peers in a layout: `grid` is its [PP, DP, CP, TP] ranks (`Layout.grid`)."""
    return [tuple(int(rank) for rank in stage.reshape(-1)) for stage in grid]
