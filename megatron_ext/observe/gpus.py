"""The GPUs of all ranks at once: smallest, mean and largest of each figure, the rank that is worst off, and the energy that a token costs.

Each rank reads its own GPU (gpu.py) and packs the figures into one row of numbers; one small all-gather, every `log.gpu_every` steps, brings
the rows together (ten numbers a rank). What a device does not tell is NaN in its row, and left out of the summary.

Energy a token, in joules: what all GPUs have used between two readings over the tokens of the whole job between them. Counted by the devices
themselves where they can (NVML's total energy, Volta and later), else power (the mean of both readings) times seconds.
"""
import math
from collections.abc import Mapping, Sequence

from .gpu import THROTTLE

FIELDS = ("gpu_utilisation", "gpu_memory_used", "gpu_memory_total", "gpu_power", "gpu_power_limit", "gpu_temperature", "gpu_clock",
          "gpu_memory_clock", "gpu_throttle", "gpu_energy")
# Of which figures a rank can be the worst: it waits, is about to run out of memory, is hot, or slow.
WORST = {"gpu_utilisation": min, "gpu_memory_used": max, "gpu_temperature": max, "gpu_clock": min}
SHOWN = 8  # throttled ranks that are named; a rack that lost its cooling need not fill the line

Row = Sequence[float]


def pack(figures: Mapping[str, float | str]) -> list[float]:
    """The figures of one rank (`GpuMonitor.read`) as numbers in the order of FIELDS; NaN for what is missing."""
    row = []
    for name in FIELDS:
        value = figures.get(name, math.nan)
        if name == "gpu_throttle" and isinstance(value, str):
            value = sum(bit for bit, reason in THROTTLE.items() if reason in value.split(", "))
        row.append(float(value))
    return row


def unpack(row: Row) -> dict[str, float | str]:
    """The inverse of `pack`; what is missing is left out."""
    figures: dict[str, float | str] = {name: value for name, value in zip(FIELDS, row, strict=True) if not math.isnan(value)}
    if "gpu_throttle" in figures:
        figures["gpu_throttle"] = reasons(int(figures["gpu_throttle"]))
    return figures


def reasons(bits: int) -> str:
    """NVML's bits in words; "" = not throttled."""
    return ", ".join(name for bit, name in THROTTLE.items() if bits & bit)


def summary(rows: Sequence[Row]) -> dict[str, float | str]:
    """What metrics.jsonl gets. rows: of rank 0, 1, ...

    Of one rank its figures alone. Of several, for each figure: NAME (the mean), NAME_min, NAME_max, and for those of WORST NAME_worst (a rank);
    `gpu_throttled` (ranks) and `gpu_throttle` (which, and why). Energy counters are not shown: `Energy` makes something of them.
    """
    if len(rows) == 1:
        return {name: value for name, value in unpack(rows[0]).items() if name != "gpu_energy"}
    out: dict[str, float | str] = {}
    for index, name in enumerate(FIELDS):
        told = {rank: row[index] for rank, row in enumerate(rows) if not math.isnan(row[index])}
        if not told or name == "gpu_energy":
            continue
        if name == "gpu_throttle":
            slow = {rank: reasons(int(bits)) for rank, bits in told.items() if reasons(int(bits))}
            out["gpu_throttled"] = len(slow)
            out[name] = "; ".join(f"rank {rank}: {why}" for rank, why in list(slow.items())[:SHOWN]) + ("; ..." if len(slow) > SHOWN else "")
            continue
        out |= {name: math.fsum(told.values()) / len(told), f"{name}_min": min(told.values()), f"{name}_max": max(told.values())}
        if name in WORST:
            out[f"{name}_worst"] = WORST[name](told, key=told.get)
    return out


class Energy:
    """Joules a token between one reading and the next."""

    def __init__(self):
        self._before: tuple[Sequence[Row], int, float] | None = None

    def read(self, rows: Sequence[Row], *, tokens: int, now: float) -> float | None:
        """None at the first reading, where no token was trained on in between, and where a rank tells neither energy nor power.

        Args:
            tokens: of the whole job since its start. now: seconds, of any clock that does not stand still.
        """
        before, self._before = self._before, (rows, tokens, now)
        if before is None or tokens <= before[1] or len(before[0]) != len(rows):
            return None
        joules = math.fsum(_used(old, new, now - before[2]) for old, new in zip(before[0], rows, strict=True))
        return None if math.isnan(joules) else joules / (tokens - before[1])


def _used(old: Row, new: Row, seconds: float) -> float:
    energy, power = FIELDS.index("gpu_energy"), FIELDS.index("gpu_power")
    counted = new[energy] - old[energy]
    if counted >= 0:  # a driver that was loaded anew counts from 0 again
        return counted
    return (old[power] + new[power]) / 2 * seconds
