"""Fits the domain classifier to labelled examples (`python -m megatron_ext.curate.taxonomy train`) and measures it on others (`...
evaluate`).

For each domain a logistic regression with an L2 penalty, convex, so that the result does not depend on a start: scikit-learn's L-BFGS
(extra `curate` has it). Examples of both sides weigh alike.

The threshold comes from cross-validation in FOLDS folds of groups: every example is judged by a model that did not see its group. Where
examples of "none" are among them, it is the one with the highest mean of (the share of ours that get their domain) and (the share of
"none" that get none); else the one that 95 % of ours reach.
"""
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ext.curate.taxonomy.classifier import NONE, Classifier
from megatron_ext.curate.taxonomy.examples import SEED, Example, read
from megatron_ext.curate.taxonomy.features import features
from megatron_ext.errors import UserError

FOLDS = 5
LEAST = 5  # examples of a domain, below which nothing can be said about it


@dataclass(frozen=True)
class TrainSettings:
    """`train output=FILE [input=PATH,PATH]`.

    Attributes:
        input: files of labelled examples; the label "none" is for texts of none of the domains. Empty: the sentences and lists of words that
            this package brings.
        output: the model to write, .npz.
        bits: 2^bits hashed features. 18 are 1 MB a domain.
        c: the inverse of the penalty; larger follows the examples more closely.
    """

    output: str
    input: tuple[str, ...] = ()
    bits: int = 18
    c: float = 3.0


@dataclass(frozen=True)
class EvaluateSettings:
    """`evaluate model=FILE input=PATH,PATH`: labelled examples that the model has not seen."""

    model: str
    input: tuple[str, ...]


def fit(examples: Sequence[Example], *, bits: int = 18, c: float = 3.0) -> Classifier:
    """A classifier of these examples, with what cross-validation measured in `about["cross_validation"]`.

    Raises:
        UserError: values that cannot be, fewer than two domains, too few examples of one, or no scikit-learn.
    """
    if not 8 <= bits <= 24:
        raise UserError("bits", bits, "must be 8 to 24")
    if not c > 0:
        raise UserError("c", c, "must be above 0")
    labels = np.asarray([example.label for example in examples])
    domains = tuple(sorted(set(labels.tolist()) - {NONE}))
    if len(domains) < 2:
        raise UserError("input", ",".join(domains) or "no domain", f"at least two domains are needed; {NONE} does not count")
    for domain in domains:
        if (labels == domain).sum() < LEAST:
            raise UserError("input", domain, f"has {(labels == domain).sum()} examples; at least {LEAST} are needed")
    scale = _scale(examples, bits)
    matrix = _matrix(examples, bits, scale)
    folds = np.asarray([-1 if example.aid else example.fold(FOLDS) for example in examples])  # -1: never held out
    out = np.zeros((len(examples), len(domains)))
    for fold in range(FOLDS):
        inside = folds != fold
        if inside.all():
            continue
        weights, bias = _weights(matrix[inside], labels[inside], domains, c)
        out[~inside] = 1 / (1 + np.exp(-(matrix[~inside] @ weights.T + bias)))
    out, held = out[folds >= 0], labels[folds >= 0]
    threshold = _threshold(out, held, domains)
    weights, bias = _weights(matrix, labels, domains, c)
    about = {"examples": len(held), "words": len(labels) - len(held), "c": c, "cross_validation": _measured(out, held, domains, threshold)}
    return Classifier(domains, weights.astype(np.float32), bias.astype(np.float32), scale, threshold, about)


def measure(model: Classifier, examples: Sequence[Example]) -> dict:
    """What `model` makes of labelled examples: `accuracy` (ours: the right domain; none: none), `accuracy_without_none` (the likeliest
    domain, no threshold, ours alone), `domains` (precision, recall, examples), `confusion`."""
    out = np.stack([model.probabilities(example.text) for example in examples])
    return _measured(out, np.asarray([example.label for example in examples]), model.domains, model.threshold)


def _scale(examples: Sequence[Example], bits: int) -> np.ndarray:
    """1 + ln((1 + n) / (1 + examples that have the feature)): rare n-grams say more than those of every ending. From texts alone, without
    labels."""
    counts = np.zeros(2**bits, dtype=np.int64)
    for example in examples:
        counts[features(example.text, bits=bits)[0]] += 1
    return (1 + np.log((1 + len(examples)) / (1 + counts))).astype(np.float32)


def _matrix(examples: Sequence[Example], bits: int, scale: np.ndarray):
    from scipy.sparse import csr_matrix

    found = [features(example.text, bits=bits, scale=scale) for example in examples]
    starts = np.cumsum([0, *(len(indices) for indices, _ in found)])
    indices, values = (np.concatenate([one[part] for one in found]) for part in (0, 1))
    return csr_matrix((values, indices, starts), shape=(len(found), 2**bits), dtype=np.float64)


def _weights(matrix, labels: np.ndarray, domains: Sequence[str], c: float) -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise UserError("taxonomy train", "scikit-learn", "is not installed: pip install 'megatron-ext[curate]'") from error
    weights, bias = np.zeros((len(domains), matrix.shape[1])), np.full(len(domains), -10.0)
    used = np.flatnonzero(np.bincount(matrix.indices, minlength=matrix.shape[1]))  # the others stay 0 whatever the examples say
    inside = matrix[:, used]
    for number, domain in enumerate(domains):
        mine = labels == domain
        if not mine.any() or mine.all():  # a fold without it
            continue
        model = LogisticRegression(C=c, class_weight="balanced", solver="lbfgs", max_iter=1000, tol=1e-5).fit(inside, mine)
        weights[number, used], bias[number] = model.coef_[0], model.intercept_[0]
    return weights, bias


def _threshold(out: np.ndarray, labels: np.ndarray, domains: Sequence[str]) -> float:
    own = np.asarray([out[row, domains.index(label)] if label != NONE else np.nan for row, label in enumerate(labels.tolist())])
    right = labels == np.asarray(domains)[out.argmax(axis=1)]
    best, none = out.max(axis=1), labels == NONE
    if not none.any():
        return float(np.clip(np.quantile(own, 0.05), 0.01, 0.99))
    tried = np.arange(0.01, 1.0, 0.01)
    gains = [(right & (best >= one))[~none].mean() + (best < one)[none].mean() for one in tried]
    top = np.flatnonzero(np.isclose(gains, max(gains)))
    return float(round(tried[top[len(top) // 2]], 2))  # the middle of a plateau


def _measured(out: np.ndarray, labels: np.ndarray, domains: Sequence[str], threshold: float) -> dict:
    names = np.asarray([*domains, NONE])
    likeliest = out.argmax(axis=1)
    said = names[np.where(out.max(axis=1) >= threshold, likeliest, len(domains))]
    ours = labels != NONE
    confusion: dict[str, dict[str, int]] = {}
    for truth, answer in zip(labels.tolist(), said.tolist()):
        row = confusion.setdefault(truth, {})
        row[answer] = row.get(answer, 0) + 1
    return {
        "examples": len(labels), "threshold": threshold, "accuracy": float((said == labels).mean()),
        "accuracy_without_none": float((names[likeliest] == labels)[ours].mean()) if ours.any() else None,
        "domains": {
            name: {
                "examples": int((labels == name).sum()), "recall": _share(said[labels == name] == name),
                "precision": _share(labels[said == name] == name),
            } for name in names.tolist()
        },
        "confusion": confusion,
    }


def _share(found: np.ndarray) -> float | None:
    return float(found.mean()) if len(found) else None


def train(settings: TrainSettings) -> None:
    model = fit(read(settings.input or SEED), bits=settings.bits, c=settings.c)
    Path(settings.output).parent.mkdir(parents=True, exist_ok=True)
    model.save(settings.output)
    held = model.about["cross_validation"]
    print(f"wrote {settings.output} ({Path(settings.output).stat().st_size / 1e6:.1f} MB): {len(model.domains)} domains, "
          f"{model.about['examples']} examples, threshold {model.threshold:.2f}; in {FOLDS}-fold cross-validation {held['accuracy']:.1%} "
          f"right with none, {held['accuracy_without_none']:.1%} among ours")


def evaluate(settings: EvaluateSettings) -> None:
    print(json.dumps(measure(Classifier.load(settings.model, key="model"), read(settings.input)), indent=1, ensure_ascii=False))
