"""Means, deviations and seconds, as metrics.jsonl gets them."""
import time

import torch

from megatron_ext.platform import Platform


class Clock:
    """Seconds of the parts of an iteration."""

    def __init__(self, platform: Platform):
        self._platform, self._last, self._laps = platform, time.perf_counter(), {}

    def lap(self, name: str) -> None:
        self._platform.synchronize()
        now = time.perf_counter()
        self._laps[name], self._last = now - self._last, now

    def numbers(self) -> dict[str, float]:
        whole = sum(self._laps.values())
        return {f"seconds_{name}": seconds for name, seconds in self._laps.items()} | \
               {f"share_{name}": seconds / whole for name, seconds in self._laps.items()}


def mean(x: torch.Tensor) -> float:
    return float(x.mean(dtype=torch.float64)) if x.numel() else 0.0


def std(x: torch.Tensor) -> float:
    return float(x.double().std()) if x.numel() > 1 else 0.0
