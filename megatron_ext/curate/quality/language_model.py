"""An n-gram language model: loads what `train` wrote, and says how surprising a text is.

    model = NgramModel.load("statutes.npz")
    model.score(text).perplexity

The logarithm of the probability of a unit after its history is that of the longest n-gram that was seen, with the back-off weights of the
longer histories that were seen without it added: the ARPA form of an interpolated model.

Two things are judged, each against what the trainer measured on text that its models had not seen (`about["held_out"]`): how far a text is
from the corpus (perplexity), and, of a text that is near enough for the model to know, whether its words stand in an order (word_order).

The file is numpy's .npz without pickle: keys, probabilities and back-off weights of each order, the vocabulary, and `about` (JSON: kind of
units, order, discounts, sizes, the hash of the text, quantiles of perplexity on held-out text).
"""
import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ext.curate import arrays
from megatron_ext.curate.quality.kneser_ney import Order
from megatron_ext.curate.quality.units import END, START, UNKNOWN, Vocabulary

FORMAT = "megatron_ext.ngram/2"
PASSAGE = 1000  # characters of the held-out passages that limits come from
SHUFFLED = 2000  # characters in random orders that the order of a short text is compared with


@dataclass(frozen=True)
class Score:
    """Of one text.

    Attributes:
        units: of the text, with END.
        log_p: natural logarithm of its probability.
        unknown: the share of units that the model never saw.
    """

    units: int
    log_p: float
    unknown: float

    @property
    def perplexity(self) -> float:
        return float(np.exp(-self.log_p / self.units))


@dataclass(frozen=True)
class NgramModel:
    """A fitted model. `about` is what the trainer noted."""

    vocabulary: Vocabulary
    orders: tuple[Order, ...]
    about: dict

    @property
    def order(self) -> int:
        return len(self.orders)

    def log_probabilities(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Natural logarithms, float64 [units + 1], of each unit of the text and of END after all that stands before; the units, int64."""
        words = np.concatenate(([START], self.vocabulary.encode(text), [END]))
        size = self.vocabulary.size
        # at: the n-gram of the current order that ends at each place, -1 where the model has none
        log_p, at = self.orders[0].log_p[words].astype(np.float64), words
        backoff = self.orders[0].log_backoff
        for order in self.orders[1:]:
            if not len(order.keys):  # all pruned
                break
            history = np.concatenate(([-1], at[:-1]))
            known = history >= 0
            keys = np.where(known, history * size + words, -1)
            places = np.minimum(np.searchsorted(order.keys, keys), len(order.keys) - 1)
            found = order.keys[places] == keys
            log_p = np.where(found, order.log_p[places], log_p + np.where(known, backoff[history], 0.0))
            at, backoff = np.where(found, places, -1), order.log_backoff
        return log_p[1:], words[1:]

    def score(self, text: str) -> Score:
        """An empty text has one unit, END."""
        log_p, words = self.log_probabilities(text)
        return Score(len(words), float(log_p.sum()), float((words == UNKNOWN).mean()))

    def word_order(self, text: str, score: Score | None = None) -> float:
        """Bits a unit that the order of the words is worth: how much less probable the same words are in a random order.

        Perplexity says first of all how far a text is from the corpus; this compares a text with itself. Texts whose words are in no order,
        whatever their subject, are near 0. A text as far from the corpus as talk is from statutes is near 0 too: `order_is_known`. The
        random orders follow from the text; of a short one, several are taken, SHUFFLED characters in all, since one alone says much about
        chance.

        Args:
            score: of the text, where that is known.
        """
        words, given = text.split(), score or self.score(text)
        draw = random.Random(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())
        mixed = []
        for _ in range(min(max(1, SHUFFLED // max(len(text), 1)), 8)):
            draw.shuffle(words)
            mixed.append(self.score(" ".join(words)).log_p)
        return (given.log_p - sum(mixed) / len(mixed)) / given.units / float(np.log(2))

    def order_is_known(self, score: Score) -> bool:
        """Whether a text is nearly as near the corpus as held-out passages with their words shuffled are (1.5 times the perplexity of 99 of
        100), so that the order of its words is worth something if it has one."""
        return score.perplexity <= 1.5 * self.about["held_out"]["shuffled"]["perplexity"]["99"]

    def least_word_order(self, characters: int) -> float:
        """Below this, the words of a text of this length stand in no order: 99 of 100 held-out passages with their words shuffled are
        below. Chance counts more in shorter texts, by the root of their length."""
        return self.about["held_out"]["least_word_order"] * max(1.0, PASSAGE / max(characters, 1)) ** 0.5

    def save(self, path: str | Path) -> None:
        names = ("keys", "log_p", "log_backoff")
        found = {f"{name}_{n}": getattr(order, name) for n, order in enumerate(self.orders, 1) for name in names}
        arrays.save(path, {**self.about, "order": self.order, "kind": self.vocabulary.kind}, self.vocabulary.arrays() | found, format=FORMAT)

    @classmethod
    def load(cls, path: str | Path, *, key: str = "curate.quality.language_model.path") -> "NgramModel":
        """Raises UserError: not there, or not a model of this format."""
        with arrays.opened(path, format=FORMAT, key=key, kind="n-gram model", command="python -m megatron_ext.curate.quality train") as (about, file):
            orders = tuple(Order(*(file[f"{name}_{n}"] for name in ("keys", "log_p", "log_backoff"))) for n in range(1, about["order"] + 1))
            return cls(Vocabulary.of_arrays(about["kind"], file["units"]), orders, about)
