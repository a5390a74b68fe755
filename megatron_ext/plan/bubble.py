"""Pipeline schedules on a simulated clock: what the bubble is, and how long a step takes when stages are not equal. No torch.

In 1F1B (Narayanan et al. 2021, arXiv 2104.04473) rank r of p runs min(m, p - r - 1) forward passes ahead, then one forward and one backward in turn.
Interleaved, with v chunks a rank, passes go through the chunks in groups of p micro-batches, and 2 (p - r - 1) + (v - 1) p run ahead. A pass starts when
its rank is free and its input has come. With equal passes the idle share is

    bubble / ideal time = (p - 1) / (m v).

The orders are megatron-core's: tests/test_plan_trace.py takes them from its schedules.
"""
from collections.abc import Callable
from dataclasses import dataclass

Pass = tuple[str, int, int]  # forward or backward ("F", "B"), chunk of the rank, micro-batch


def order(rank: int, pp: int, vpp: int | None, micro_batches: int) -> list[Pass]:
    """The passes of a pipeline rank, in the order in which it runs them."""
    v, total = vpp or 1, micro_batches * (vpp or 1)
    if vpp is not None and micro_batches % pp:
        raise ValueError(f"{micro_batches} micro-batches are no multiple of {pp} stages, which interleaving needs")

    def place(k: int) -> tuple[int, int]:
        if v == 1:
            return 0, k
        return k % (pp * v) // pp, k // (pp * v) * pp + k % pp

    ahead = min(total, pp - rank - 1 if v == 1 else 2 * (pp - rank - 1) + (v - 1) * pp)
    forward = [("F", *place(k)) for k in range(total)]
    backward = [("B", v - 1 - place(k)[0], place(k)[1]) for k in range(total)]
    found = forward[:ahead]
    for f, b in zip(forward[ahead:], backward):
        found += [f, b]
    return found + backward[total - ahead:]


@dataclass(frozen=True)
class Timeline:
    """A simulated step. seconds: until the last pass ends. busy: of each rank."""

    seconds: float
    busy: tuple[float, ...]

    @property
    def bubble(self) -> float:
        """Idle over busy time, of the busiest rank."""
        return self.seconds / max(self.busy) - 1


def simulate(pp: int, vpp: int | None, micro_batches: int, duration: Callable[[str, int], float], *, transfer: float = 0.0) -> Timeline:
    """Runs a step.

    Args:
        duration: of a pass ("F" or "B") through stage number s (chunk v of rank r is stage v pp + r), seconds.
        transfer: from a stage to the next, seconds.
    """
    stages = pp * (vpp or 1)
    queues = [order(rank, pp, vpp, micro_batches) for rank in range(pp)]
    ends: dict[tuple[str, int, int], float] = {}
    free, busy, at = [0.0] * pp, [0.0] * pp, [0] * pp
    while any(at[rank] < len(queues[rank]) for rank in range(pp)):
        moved = False
        for rank in range(pp):
            while at[rank] < len(queues[rank]):
                kind, chunk, micro = queues[rank][at[rank]]
                stage = chunk * pp + rank
                needed = [(kind, stage - 1, micro)] if kind == "F" and stage else []
                if kind == "B":
                    needed = [("B", stage + 1, micro)] if stage + 1 < stages else [("F", stage, micro)]
                if any(key not in ends for key in needed):
                    break
                away = transfer if needed and needed[0][1] != stage else 0.0
                start = max([free[rank], *(ends[key] + away for key in needed)])
                seconds = duration(kind, stage)
                ends[kind, stage, micro] = free[rank] = start + seconds
                busy[rank] += seconds
                at[rank] += 1
                moved = True
        if not moved:
            raise ValueError("the orders wait for each other")
    return Timeline(max(ends.values()), tuple(busy))
