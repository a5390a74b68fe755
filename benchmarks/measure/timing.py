"""Times of calls, and the copy bandwidth that shares are taken of.

GPU: CUDA events around one call, L2 emptied before it. A call of 30 us would be over before Python has queued the next kernel, so the device
is kept busy (`torch.cuda._sleep`) while the host queues: what is measured is the device's time, as in a training step whose host runs ahead.
CPU: `perf_counter`, the calls of all competitors in turns (A B C, B C A, ...), so that a busy machine slows all alike; ratios are the median
over the turns of the ratio within a turn.
"""
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

FLUSH_BYTES = 256 << 20  # over the L2 cache of every GPU (H100: 50 MB, B200: 126 MB)
CYCLES_PER_SECOND = 2e9  # at least the SM clock of today's GPUs: the sleep gets longer than asked at lower clocks, never shorter


@dataclass(frozen=True)
class Budget:
    """How long one competitor is timed: about `seconds`, in at least `least` and at most `most` turns."""

    seconds: float
    least: int
    most: int


FULL = Budget(seconds=1.0, least=7, most=200)
QUICK = Budget(seconds=0.1, least=3, most=20)


def percentile(values: Sequence[float], share: float) -> float:
    """Linear between the nearest ranks, as numpy's default: percentile([1, 2, 3, 4], 0.5) == 2.5."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def ratio_in_turns(times: Sequence[float], base: Sequence[float]) -> float:
    """Median over the turns of time / base, where both were timed in the same turns; else the ratio of the medians."""
    if len(times) != len(base):
        return statistics.median(times) / statistics.median(base)
    return statistics.median(t / b for t, b in zip(times, base, strict=True))


@dataclass
class Turns:
    """Seconds a call of each, one entry a turn; what went wrong with those that have none; what `while_busy` said."""

    times: dict[str, list[float]]
    failures: dict[str, Exception]
    while_busy: object


def seconds_in_turns(calls: Mapping[str, Callable[[], object]], device: torch.device, budget: Budget,
                     while_busy: Callable[[], object] = lambda: None) -> Turns:
    """Times each call. They should have run before (compiled). `while_busy` is called once while the device still works (clocks under load)."""
    timed = _device_seconds if device.type == "cuda" else _host_seconds
    plans: dict[str, tuple[float, float]] = {}
    failures: dict[str, Exception] = {}
    for name, call in calls.items():
        try:
            plans[name] = _plan(call, device)
        except Exception as error:  # noqa: BLE001 one competitor's failure is its own row
            failures[name] = error
    longest = max((first for first, _ in plans.values()), default=1.0)
    turns = max(budget.least, min(budget.most, int(budget.seconds / max(longest, 1e-4))))
    times: dict[str, list] = {name: [] for name in plans}
    for turn in range(turns):
        names = list(times)
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            try:
                times[name].append(timed(calls[name], plans[name]))
            except Exception as error:  # noqa: BLE001
                failures[name] = error
                del times[name]
    said = while_busy()
    if device.type == "cuda":
        torch.cuda.synchronize()
        times = {name: [begin.elapsed_time(end) / 1e3 for begin, end in pairs] for name, pairs in times.items()}
    return Turns(times, failures, said)


def _plan(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """(seconds of one call, what its timing needs: calls a turn on CPU, seconds that the host takes to queue it on CUDA)."""
    for _ in range(3):
        begin = time.perf_counter()
        call()
        queued = time.perf_counter() - begin
        if device.type == "cuda":
            torch.cuda.synchronize()
        once = time.perf_counter() - begin
        if once > 0.5:  # a long call is warm after the first
            break
    if device.type == "cuda":
        return once + queued, queued
    return max(once, 1e-3), max(1, round(1e-3 / max(once, 1e-7)))  # a turn of at least a millisecond: the clock costs nothing beside it


def _host_seconds(call: Callable[[], object], plan: tuple[float, float]) -> float:
    repeats = int(plan[1])
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


_flush: dict[torch.device, torch.Tensor] = {}


def _device_seconds(call: Callable[[], object], plan: tuple[float, float]):
    device = torch.device("cuda", torch.cuda.current_device())
    if device not in _flush:
        _flush[device] = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(int(min(1.5 * plan[1] + 2e-5, 0.05) * CYCLES_PER_SECOND))
    _flush[device].zero_()
    begin.record()
    call()
    end.record()
    return begin, end


def release() -> None:
    """Gives the flush buffer back: before a peak is measured or a large case starts."""
    _flush.clear()


class Copy:
    """torch's copy of a tensor far larger than the caches: what shares are taken of. It is timed in the same turns as those it judges."""

    def __init__(self, device: torch.device, megabytes: int | None = None):
        size = (megabytes or (512 if device.type == "cuda" else 128)) << 20
        self.source = torch.ones(size // 4, dtype=torch.float32, device=device)
        self.target = torch.empty_like(self.source)
        self.bytes = 2 * size  # read and written

    def __call__(self) -> torch.Tensor:
        return self.target.copy_(self.source)

    def bandwidth(self, times: Sequence[float]) -> float:
        """Bytes a second, from the median of its times."""
        return bandwidth(self.bytes, statistics.median(times))


def bandwidth(moved: float, seconds: float) -> float:
    """Bytes a second."""
    return moved / seconds
