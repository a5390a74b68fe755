"""The baseline that a trained model has to beat: an interpolated trigram with absolute discounting, in bits per byte.

With c the counts on the training tokens, N1+(h) the number of different tokens seen after the history h, and V the vocabulary,

    p3(w|u,v) = max(c(u,v,w) - D3, 0) / c(u,v) + D3 N1+(u,v) / c(u,v) * p2(w|v)
    p2(w|v)   = max(c(v,w)   - D2, 0) / c(v)   + D2 N1+(v)   / c(v)   * p1(w)
    p1(w)     = max(c(w)     - D1, 0) / N      + D1 N1+      / N      * 1 / V

and a history that was never seen hands on to the next shorter one. The discount of each order is Dn = n1 / (n1 + 2 n2), with nr the number of
n-grams that occur r times. What a history gives away by discounting, D N1+ / c, is exactly what it passes down, so each distribution sums to 1.

Source: Ney, Essen and Kneser, "On structuring probabilistic dependences in stochastic language modelling" (Computer Speech and Language 8, 1994);
Chen and Goodman, "An empirical study of smoothing techniques for language modeling" (1999), section 2.6. Counts of the lower orders are plain (not
Kneser-Ney's continuation counts).

The first tokens of a document have end-of-document tokens as their history. Every token is predicted, the end of each document too, so bits per byte
compares with a model's loss whatever its tokenizer.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ext.data.index import TokenFile
from megatron_ext.data.prepared import Prepared
from megatron_ext.errors import UserError


@dataclass(frozen=True)
class _Order:
    """Counts of one order: n-grams as numbers in base V, sorted."""

    grams: np.ndarray  # int64
    counts: np.ndarray  # int64
    histories: np.ndarray  # int64: grams // V, each once
    totals: np.ndarray  # int64: c(history)
    kinds: np.ndarray  # int64: N1+(history)
    discount: float

    @classmethod
    def of(cls, grams: np.ndarray, vocab_size: int) -> "_Order":
        keys, counts = np.unique(grams, return_counts=True)
        histories, starts = np.unique(keys // vocab_size, return_index=True)
        once, twice = int(np.sum(counts == 1)), int(np.sum(counts == 2))
        return cls(
            grams=keys, counts=counts, histories=histories,
            totals=np.add.reduceat(counts, starts),
            kinds=np.diff(np.append(starts, len(keys))),
            # nothing occurs once (tiny or artificial data): half, so that unseen tokens keep some probability
            discount=once / (once + 2 * twice) if 0 < once and 0 < twice else 0.5,
        )

    def interpolate(self, grams: np.ndarray, lower: np.ndarray, vocab_size: int) -> np.ndarray:
        """p of each n-gram given that of the next shorter one."""
        counts = _look_up(self.grams, self.counts, grams)
        history = grams // vocab_size
        totals = _look_up(self.histories, self.totals, history)
        kinds = _look_up(self.histories, self.kinds, history)
        seen = totals > 0
        total = np.where(seen, totals, 1)
        return np.where(seen, (np.maximum(counts - self.discount, 0) + self.discount * kinds * lower) / total, lower)


class Trigram:
    """The fitted model.

    Args:
        tokens: training tokens, integers [T]: documents end to end, each with its end-of-document token.
        lengths: tokens of each document, [D], summing to T.
        vocab_size: V; V^3 must fit 63 bits.
        eod: id of the end-of-document token.

    Raises:
        UserError: no tokens, or a vocabulary above 2^21.
    """

    def __init__(self, tokens: np.ndarray, lengths: np.ndarray, *, vocab_size: int, eod: int):
        if len(tokens) == 0:
            raise UserError("data", "trigram", "no training tokens to count")
        if vocab_size > 2**21:
            raise UserError("data.vocab_size", vocab_size, "the trigram baseline counts vocabularies of at most 2,097,152")
        self.vocab_size, self.eod = vocab_size, eod
        self._orders = [_Order.of(grams, vocab_size) for grams in self._grams(tokens, lengths)]

    @property
    def discounts(self) -> tuple[float, float, float]:
        """D1, D2, D3."""
        return tuple(order.discount for order in self._orders)

    def probabilities(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """p of each token given the two before it in its document, float64 [T]."""
        probability = np.full(len(tokens), 1 / self.vocab_size)
        for order, grams in zip(self._orders, self._grams(tokens, lengths)):
            probability = order.interpolate(grams, probability, self.vocab_size)
        return probability

    def bits(self, tokens: np.ndarray, lengths: np.ndarray) -> float:
        """-log2 of the probability of all tokens together."""
        return float(-np.log2(self.probabilities(tokens, lengths)).sum())

    def _grams(self, tokens: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
        words = tokens.astype(np.int64)
        places = np.arange(len(words)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        before = [np.where(places >= back, np.roll(words, back), self.eod) for back in (1, 2)]
        base = self.vocab_size
        return [words, before[0] * base + words, (before[1] * base + before[0]) * base + words]


def trigram_baseline(directory: str | Path, *, split: str = "validation") -> dict[str, float | int | str]:
    """Fits the trigram on the training split of a prepared directory and measures it on another one.

    Returns:
        `bits_per_byte`, `bits_per_token`, the `discounts`, and the sizes, for the report.

    Raises:
        UserError: the directory or the split holds nothing.
    """
    prepared = Prepared.load(directory)
    for name in ("train", split):
        if prepared.splits[name].documents == 0:
            raise UserError("data.path", directory, f"its {name} split has no documents")
    model = Trigram(*_tokens(prepared, "train"), vocab_size=prepared.vocab_size, eod=prepared.eod)
    tokens, lengths = _tokens(prepared, split)
    bits = model.bits(tokens, lengths)
    return {
        "split": split,
        "bits_per_byte": bits / prepared.splits[split].bytes,
        "bits_per_token": bits / len(tokens),
        "tokens": len(tokens),
        "bytes": prepared.splits[split].bytes,
        "fitted_on_tokens": prepared.splits["train"].tokens,
        "vocab_size": prepared.vocab_size,
        "discounts": list(model.discounts),
    }


def _tokens(prepared: Prepared, split: str) -> tuple[np.ndarray, np.ndarray]:
    file = TokenFile(prepared.splits[split].prefix, key="data.path")
    return np.concatenate([file.read(document) for document in range(file.documents)]), file.lengths


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """values[i] where keys[i] (sorted) is wanted, else 0."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)
