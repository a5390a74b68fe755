"""Which domain a text is of. Serves alone: numpy and this package, no datatrove, no scikit-learn.

    model = Classifier.load("domains.npz")
    model.classify("임신한 근로자의 출산전후휴가 급여를 신청합니다").domain        # "welfare", or "none"

One logistic regression a domain against everything else, so that probabilities need not sum to 1: a bill about schools is of law and of
education, and a recipe is of none. The domain is the one of the highest probability where that reaches the threshold, which was chosen on
held-out examples at training.

The file is numpy's .npz without pickle: `weights` float32 [domains, 2^bits], `bias` float32 [domains],
`scale` float32 [2^bits], `about` (JSON: domains, bits,
threshold, what was measured).
"""
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_ext.curate import arrays
from megatron_ext.curate.taxonomy.features import features

FORMAT = "megatron_ext.taxonomy/2"
NONE = "none"


@dataclass(frozen=True)
class Answer:
    """Of one text.

    Attributes:
        domain: a name, or NONE.
        score: the highest probability of any domain, 0 to 1.
        domains: all that reach the threshold, the likeliest first.
        probabilities: of each domain.
    """

    domain: str
    score: float
    domains: tuple[str, ...]
    probabilities: dict[str, float]


@dataclass(frozen=True)
class Classifier:
    """A fitted model. `about` is what the trainer noted; `threshold` is the probability that a domain needs."""

    domains: tuple[str, ...]
    weights: np.ndarray
    bias: np.ndarray
    scale: np.ndarray
    threshold: float
    about: dict

    @property
    def bits(self) -> int:
        return self.weights.shape[1].bit_length() - 1

    def probabilities(self, text: str) -> np.ndarray:
        """float64 [domains]; an empty text has 0 everywhere."""
        indices, values = features(text, bits=self.bits, scale=self.scale)
        if not len(indices):
            return np.zeros(len(self.domains))
        return 1 / (1 + np.exp(-(values @ self._by_feature[indices] + self.bias).astype(np.float64)))

    @cached_property
    def _by_feature(self) -> np.ndarray:
        """float32 [2^bits, domains]: what one feature needs lies together."""
        return np.ascontiguousarray(self.weights.T)

    def classify(self, text: str, *, threshold: float | None = None) -> Answer:
        """The domain of a text.

        Args:
            threshold: instead of the model's own.
        """
        least = self.threshold if threshold is None else threshold
        found = self.probabilities(text)
        order = np.argsort(-found, kind="stable")
        above = tuple(self.domains[number] for number in order if found[number] >= least)
        return Answer(above[0] if above else NONE, float(found.max()), above, dict(zip(self.domains, found.tolist())))

    def save(self, path: str | Path) -> None:
        arrays.save(path, {**self.about, "domains": list(self.domains), "threshold": self.threshold},
                    {"weights": self.weights, "bias": self.bias, "scale": self.scale}, format=FORMAT, compressed=True)

    @classmethod
    def load(cls, path: str | Path, *, key: str = "curate.taxonomy.path") -> "Classifier":
        """Raises UserError: not there, or not a model of this format."""
        with arrays.opened(path, format=FORMAT, key=key, kind="domain model", command="python -m megatron_ext.curate.taxonomy train") as (about, file):
            weights, bias, scale = file["weights"], file["bias"], file["scale"]
            domains, threshold = tuple(map(str, about["domains"])), float(about["threshold"])
            if weights.shape[0] != len(domains) or bias.shape != (len(domains),) or weights.shape[1:] != scale.shape or len(scale).bit_count() != 1:
                raise ValueError("sizes do not fit")
            return cls(domains, weights, bias, scale, threshold, about)
