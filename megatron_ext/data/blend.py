"""Weighted blends with random access: which data set global sample k comes from, and which of its samples that is.

Samples come in periods of B. In each period data set i has c_i samples, the largest-remainder rounding of B w_i / sum(w) with sum(c) = B, in an order
drawn from (seed, period). Sample k = p B + q is then sample p c_i + (how many of the first q are of i) of its set i: no history is needed, and a
longer run starts with the same samples. A data set that is exhausted goes on with its next epoch.
"""
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from megatron_ext.data.order import permutation
from megatron_ext.errors import UserError

PERIOD = 4096


class Blend:
    """The mixture of several data sets.

    Args:
        weights: of each data set, positive; only their proportions matter.
        names: of each, for messages.
        seed: of the order inside a period.
        period: B.

    Raises:
        UserError: a weight that is not positive and finite, or too small to have one sample a period.
    """

    def __init__(self, weights: Sequence[float], *, names: Sequence[str], seed: int, period: int = PERIOD):
        for name, weight in zip(names, weights, strict=True):
            if not (weight > 0 and np.isfinite(weight)):
                raise UserError("data.weights", weight, f"of {name}: weights are positive numbers; leave a data set out by leaving out its path")
        self.period, self._seed = period, seed
        self.counts = largest_remainder(weights, period)
        for name, weight, count in zip(names, weights, self.counts):
            if count == 0:
                raise UserError(
                    "data.weights", weight, f"of {name} is {weight / sum(weights):.2g} of all: less than one sample in {period}; raise it or leave the path out"
                )
        self._periods: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def locate(self, k: int) -> tuple[int, int]:
        """Global sample k >= 0 -> (data set, its sample)."""
        number, position = divmod(k, self.period)
        sets, ranks = self._order(number)
        chosen = int(sets[position])
        return chosen, number * int(self.counts[chosen]) + int(ranks[position])

    def place(self, chosen: int, sample: int) -> int:
        """The inverse of `locate`: where sample `sample` of a data set comes among the global ones."""
        number, rank = divmod(sample, int(self.counts[chosen]))
        return number * self.period + int(np.flatnonzero(self._order(number)[0] == chosen)[rank])

    def _order(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        if number not in self._periods:
            grouped = np.repeat(np.arange(len(self.counts), dtype=np.int32), self.counts)
            order = permutation(self.period, self._seed, number, "blend")
            sets = grouped[order]
            ranks = np.empty(self.period, dtype=np.int64)
            for chosen, count in enumerate(self.counts):
                ranks[sets == chosen] = np.arange(count)
            self._periods[number] = (sets, ranks)
            while len(self._periods) > 2:
                self._periods.popitem(last=False)
        return self._periods[number]


def largest_remainder(weights: Sequence[float], total: int) -> np.ndarray:
    """Whole numbers proportional to `weights` that sum to `total` (Hamilton's method; ties go to the first); int64."""
    shares = np.asarray(weights, dtype=np.float64) / np.sum(weights) * total
    counts = np.floor(shares).astype(np.int64)
    order = np.argsort(-(shares - counts), kind="stable")
    counts[order[: total - int(counts.sum())]] += 1
    return counts
