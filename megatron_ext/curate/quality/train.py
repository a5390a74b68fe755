"""Fits an n-gram model to a trusted corpus (`python -m megatron_ext.curate.quality train`), and measures texts with one (`... score`)."""
import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_ext.curate.quality import kneser_ney, units
from megatron_ext.curate.quality.config import LanguageModelConfig
from megatron_ext.curate.quality.judge import Judge
from megatron_ext.curate.quality.language_model import PASSAGE, NgramModel
from megatron_ext.data.read import BadRecords, find_files, read_documents
from megatron_ext.errors import UserError

FEWEST = 100  # held-out passages that limits can be taken from; a corpus whose held-out share has fewer is measured in folds
FOLDS = 5
MOST = 5000  # passages of one measurement
QUANTILES = (1, 5, 25, 50, 75, 95, 99)
COLUMNS = ("perplexity", "word_order", "unknown")


@dataclass(frozen=True)
class TrainSettings:
    """`train input=PATH output=FILE`.

    Attributes:
        input: text, JSONL or Parquet files (also compressed), or a folder of them, which someone trusts.
        output: the model to write, .npz.
        units, order: see units.py; docs/curate_quality.md has the measurements that the defaults come from.
        least: raw counts below which n-grams of order 1, 2, ... are left out: 1,1,2 halves a model of order 5 or 6.
        held_out: share of the documents (at least one) that the model is not fitted on; what it makes of them is the yardstick for others.
            Where they are few (FEWEST passages), the corpus is cut into folds instead, each measured by a model of the others, and the
            model that is written has them all.
    """

    input: str
    output: str
    units: str = "characters"
    order: int = 6
    least: tuple[int, ...] = ()
    held_out: float = 0.05
    text_key: str = "text"
    max_bad_lines: int = 100


@dataclass(frozen=True)
class ScoreSettings:
    """`score model=FILE input=PATH [output=FILE]`: quantiles over the documents, to choose limits by, and what each limit of the model's
    own would drop. `output`: a JSONL file to write, of each document its perplexity, word_order, unknown (share) and reason."""

    model: str
    input: str
    output: str | None = None
    text_key: str = "text"
    max_bad_lines: int = 100


def fit(
    texts: Iterable[str], *, kind: str = "characters", order: int = 6, least: tuple[int, ...] = (), held_out: float = 0.05
) -> NgramModel:
    """A model of these documents; the same documents in any order give the same model.

    Raises:
        UserError: fewer than two documents with text, or values that cannot be.
    """
    if not 1 <= order <= 12:
        raise UserError("order", order, "must be 1 to 12")
    if not 0 < held_out < 1:
        raise UserError("held_out", held_out, "must be between 0 and 1")
    if list(least) != sorted(least) or any(count < 0 for count in least):
        raise UserError("least", ",".join(map(str, least)), "must not fall from one order to the next, nor be negative")
    hashed = sorted((hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest(), text) for text in texts if text.strip())
    if len(hashed) < 2:
        raise UserError("input", f"{len(hashed)} documents with text", "a model needs at least 2, one of them to measure on")
    aside = min(max(1, math.floor(held_out * len(hashed))), len(hashed) - 1)
    documents = [text for _, text in hashed]
    passages = [cut(" ".join(text.split())) for text in documents[:aside]]
    folds = 1
    if sum(map(len, passages)) >= FEWEST:
        model = _fit(documents[aside:], kind, order, least)
        found = [_measured(model, passages)]
    else:
        passages += [cut(" ".join(text.split())) for text in documents[aside:]]
        model, aside = _fit(documents, kind, order, least), len(documents)
        folds = min(FOLDS, len(documents))
        found = [
            _measured(_fit([text for at, text in enumerate(documents) if at % folds != fold], kind, order, least), passages[fold::folds])
            for fold in range(folds)
        ]
    true, mixed = (np.concatenate([one[which] for one in found]) for which in (0, 1))
    held = {
        "documents": aside, "folds": folds, **summary(true), "shuffled": summary(mixed), "apart": _apart(mixed[:, 1], true[:, 1]),
        "least_word_order": float(np.percentile(mixed[:, 3], 99)),
    }
    digest = hashlib.sha256(b"".join(digest for digest, _ in hashed)).hexdigest()
    return NgramModel(model.vocabulary, model.orders, {**model.about, "sha256": digest, "held_out": held})


def _fit(texts: list[str], kind: str, order: int, least: tuple[int, ...]) -> NgramModel:
    vocabulary = units.build(kind, texts)
    documents = [vocabulary.encode(text) for text in texts]
    orders, discounts = kneser_ney.estimate(documents, vocab_size=vocabulary.size, order=order, least=least)
    return NgramModel(vocabulary, tuple(orders), {
        "documents": len(texts), "units": sum(map(len, documents)), "characters": sum(map(len, texts)), "least": list(least),
        "ngrams": [len(one.keys) for one in orders], "discounts": [list(one) for one in discounts],
    })


def _measured(model: NgramModel, passages: list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Of the passages as they are, and with their words shuffled (not in an order that word_order compares with): `rows`, and word_order as
    it would be of PASSAGE characters where chance alone decides."""
    every = [passage for one in passages for passage in one][:MOST]
    mixed = []
    for number, passage in enumerate(every):
        words = passage.split()
        random.Random(number).shuffle(words)
        mixed.append(" ".join(words))
    scale = np.sqrt([min(len(passage), PASSAGE) / PASSAGE for passage in every])
    true, shuffled = rows(model, every), rows(model, mixed)
    return tuple(np.column_stack([one, one[:, 1] * scale]) for one in (true, shuffled))


def _apart(low: np.ndarray, high: np.ndarray) -> float:
    """AUC: how often one of `high` is above one of `low`; ties count half."""
    both = np.sort(low)
    return float((np.searchsorted(both, high, "left") + np.searchsorted(both, high, "right")).mean() / 2 / len(both))


def cut(text: str, size: int = PASSAGE) -> list[str]:
    """A text in passages of `size` characters, cut between words; what is left at the end counts from a quarter of that, or where it is
    all there is."""
    found, start = [], 0
    while start < len(text):
        end = len(text) if len(text) - start <= size else (text.rfind(" ", start + size // 2, start + size) + 1 or start + size)
        found.append(text[start:end])
        start = end
    return found[:-1] if len(found) > 1 and len(found[-1]) < size // 4 else found


def rows(model: NgramModel, texts: Iterable[str]) -> np.ndarray:
    """float64 [texts, 3]: perplexity, word_order (bits a unit), share of unknown units."""
    found = [(score.perplexity, model.word_order(text, score), score.unknown) for text in texts for score in (model.score(text),)]
    if not found:
        raise UserError("input", "no documents with text", "there is nothing to measure")
    return np.asarray(found)


def summary(found: np.ndarray) -> dict:
    """`passages`, and of the columns of `rows` the quantiles {"50": ...}."""
    return {"passages": len(found), **{
        name: {str(q): float(np.percentile(found[:, at], q)) for q in QUANTILES} for at, name in enumerate(COLUMNS)
    }}


def train(settings: TrainSettings) -> None:
    model = fit(_read(settings), kind=settings.units, order=settings.order, least=settings.least, held_out=settings.held_out)
    Path(settings.output).parent.mkdir(parents=True, exist_ok=True)
    model.save(settings.output)
    about, held = model.about, model.about["held_out"]
    print(f"wrote {settings.output} ({Path(settings.output).stat().st_size / 1e6:.1f} MB): order {model.order} over {settings.units}, "
          f"{about['documents']} documents, {about['units']:,} units, {sum(about['ngrams']):,} n-grams; of {held['passages']} held-out "
          f"passages ({held['documents']} documents, {held['folds']} folds): perplexity {held['perplexity']['50']:.1f} (median), 95th "
          f"percentile {held['perplexity']['95']:.1f}; told from their words shuffled by word order with AUC {held['apart']:.3f}")


def score(settings: ScoreSettings) -> None:
    """Prints quantiles over the documents, and how many a step `quality` with this model and its own limits keeps and drops, by reason."""
    judge = Judge(NgramModel.load(settings.model, key="model"), LanguageModelConfig(min_characters=1))
    found = [judge.look(text, always=True) for text in _read(settings) if text]
    if not found:
        raise UserError("input", settings.input, "has no documents with text")
    if settings.output:
        Path(settings.output).parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps({"document": number, **asdict(one)}) for number, one in enumerate(found))
        Path(settings.output).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    table = np.asarray([(one.perplexity, one.word_order, one.unknown) for one in found])
    verdicts = Counter(one.reason or "kept" for one in found)
    print(json.dumps({**summary(table), "max_perplexity": judge.max_perplexity, "verdicts": dict(sorted(verdicts.items()))}, indent=1))


def _read(settings: TrainSettings | ScoreSettings) -> list[str]:
    files, _ = find_files(Path(settings.input))
    return list(read_documents(files, text_key=settings.text_key, bad=BadRecords(settings.max_bad_lines)))
