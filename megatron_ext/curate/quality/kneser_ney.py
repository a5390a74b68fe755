"""Modified Kneser-Ney: the probabilities of an n-gram model from counts.

With h = u v a history (u its oldest unit), and a(h w) the count of an n-gram of the highest order, or of a lower order the number of
different units seen before it (n-grams that begin a document have nothing before them and keep their count),

    p(w | h) = max(a(h w) - D(a(h w)), 0) / sum_w' a(h w')  +  g(h) p(w | v),      p(w) = max(a(w) - D, 0) / sum a  +  g / (V - 1)

g(h) is what discounting took away, so that each distribution sums to 1; V - 1 are all units with UNKNOWN and END, without START. The
discounts of each order are, with n_r the number of n-grams of that order with a = r and Y = n1 / (n1 + 2 n2),

    D(1) = 1 - 2 Y n2 / n1,   D(2) = 2 - 3 Y n3 / n2,   D(3 and more) = 3 - 4 Y n4 / n3

Where these n_r are 0 or give a discount outside [0, r] (few or artificial texts), they are 0.5, 1, 1.5: KenLM's --discount_fallback.

Source: Chen and Goodman, "An empirical study of smoothing techniques for language modeling" (1999), section 3; Heafield et al., "Scalable
modified Kneser-Ney language model estimation" (ACL 2013), which is KenLM. This is written anew with numpy, since KenLM's package on PyPI
can only query models: its trainer, lmplz, has to be compiled with Boost (docs/curate_quality.md).

N-grams are kept as numbers: that of order n is (place of its history among those of order n - 1) * V + its last unit, so that 63 bits hold
any order.
"""
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ext.curate.quality.units import END, START

FALLBACK = (0.5, 1.0, 1.5)


@dataclass(frozen=True)
class Order:
    """N-grams of one order, sorted by key.

    Attributes:
        keys: int64 [n-grams].
        log_p: float32, natural logarithm of p(w | h), interpolated with all shorter histories.
        log_backoff: float32, natural logarithm of g of this n-gram as a history; 0 where nothing was seen after it.
    """

    keys: np.ndarray
    log_p: np.ndarray
    log_backoff: np.ndarray


@dataclass(frozen=True)
class _Counted:
    """Raw counts of one order. `at`: the n-gram that ends at each place of the corpus, -1 where none does; `first`: a place where each
    ends."""

    keys: np.ndarray
    counts: np.ndarray
    at: np.ndarray
    first: np.ndarray


def estimate(
    documents: Sequence[np.ndarray], *, vocab_size: int, order: int, least: Sequence[int] = ()
) -> tuple[list[Order], list[tuple[float, ...]]]:
    """Fits the model.

    Args:
        documents: int64 [units] each, without START and END.
        vocab_size: V, with UNKNOWN, START and END; V times the n-grams of an order must stay below 2^63.
        order: the longest n-gram, at least 1.
        least: raw counts below which n-grams of order 1, 2, ... are left out of the model (the last one holds for longer orders too); must
            not fall. What they had is given back to the shorter history. Order 1 is never pruned.

    Returns:
        The orders from 1 up, and each one's three discounts. Memory while it works: about 40 bytes a unit of text and order.
    """
    framed = [np.concatenate(([START], document, [END])) for document in documents]
    words = np.concatenate(framed)
    place = np.concatenate([np.arange(len(document)) for document in framed])
    counted = _count(words, place, vocab_size, order)
    orders, discounts, below = [], [], None
    keep = np.ones(vocab_size, dtype=bool)
    renumbered = np.arange(vocab_size)
    for n, (this, longer) in enumerate(zip(counted, [*counted[1:], None]), 1):
        adjusted = this.counts if longer is None else _continuations(this, longer, place, n)
        history = np.zeros(len(this.keys), dtype=np.int64) if n == 1 else this.keys // vocab_size
        if n == 1:
            adjusted = np.where(this.keys == START, 0, adjusted)
        discount = _discounts(adjusted)
        discounts.append(discount)
        histories = 1 if n == 1 else len(counted[n - 2].keys)
        totals = np.bincount(history, weights=adjusted, minlength=histories)
        safe = np.where(totals > 0, totals, 1)
        reduced = adjusted - np.asarray((0.0, *discount))[np.minimum(adjusted, 3)]
        before, keep = keep, this.counts >= (least[min(n, len(least)) - 1] if least and n > 1 else 0)
        # what pruned n-grams had goes back to the shorter history too, as in KenLM; their own p is not used, since no kept n-gram ends in one
        given = 1 - np.bincount(history, weights=reduced * keep, minlength=histories) / safe
        if n == 1:
            keys, p = this.keys, reduced / safe[0] + given[0] / (vocab_size - 1)
            p[START] = 0
        else:
            keys = renumbered[history] * vocab_size + this.keys % vocab_size
            p = reduced / safe[history] + given[history] * below[counted[n - 2].at[this.first]]
            _set_backoff(orders[-1], np.where(totals > 0, given, 1.0)[before])
        renumbered = np.cumsum(keep) - 1
        with np.errstate(divide="ignore"):
            orders.append(Order(keys[keep], np.log(p[keep]).astype(np.float32), np.zeros(int(keep.sum()), dtype=np.float32)))
        below = p
    return orders, discounts


def _count(words: np.ndarray, place: np.ndarray, vocab_size: int, order: int) -> list[_Counted]:
    counts = np.bincount(words, minlength=vocab_size)
    found = [_Counted(np.arange(vocab_size), counts, words, np.zeros(vocab_size, dtype=np.int64))]  # `first` of order 1 is never asked for
    for n in range(2, order + 1):
        ends = np.flatnonzero(place >= n - 1)
        keys, first, back, counts = np.unique(
            found[-1].at[ends - 1] * vocab_size + words[ends], return_index=True, return_inverse=True, return_counts=True
        )
        at = np.full(len(words), -1, dtype=np.int64)
        at[ends] = back
        found.append(_Counted(keys, counts, at, ends[first]))
    return found


def _continuations(this: _Counted, longer: _Counted, place: np.ndarray, n: int) -> np.ndarray:
    """How many different units stand before each n-gram; its count where it begins documents."""
    kinds = np.bincount(this.at[longer.first], minlength=len(this.keys))
    begins = this.at[place == n - 1]
    return kinds + np.bincount(begins[begins >= 0], minlength=len(this.keys))


def _discounts(adjusted: np.ndarray) -> tuple[float, float, float]:
    once, twice, thrice, four = (int((adjusted == times).sum()) for times in (1, 2, 3, 4))
    if min(once, twice, thrice) == 0:
        return FALLBACK
    y = once / (once + 2 * twice)
    found = (1 - 2 * y * twice / once, 2 - 3 * y * thrice / twice, 3 - 4 * y * four / thrice)
    return found if all(0 <= one <= times for times, one in enumerate(found, 1)) else FALLBACK


def _set_backoff(order: Order, values: np.ndarray) -> None:
    # pruned to nothing: rounding may leave a hair above 1 or below 0
    order.log_backoff[:] = np.log(np.clip(values, 1e-30, 1.0))
