"""Fits an n-gram model to a trusted corpus (`python -m megatron_ext.curate.quality train`), and measures texts with one (`... score`)."""
import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ext.curate.quality import kneser_ney, units
from megatron_ext.curate.quality.language_model import NgramModel
from megatron_ext.data.read import BadRecords, find_files, read_documents
from megatron_ext.errors import UserError

PASSAGE = 1000  # characters of the held-out passages whose perplexity is noted
QUANTILES = (1, 5, 25, 50, 75, 95, 99)


@dataclass(frozen=True)
class TrainSettings:
    """`train input=PATH output=FILE`.

    Attributes:
        input: text, JSONL or Parquet files (also compressed), or a folder of them, which someone trusts.
        output: the model to write, .npz.
        units, order: see units.py; docs/curate_quality.md has the measurements that the defaults come from.
        least: raw counts below which n-grams of order 1, 2, ... are left out: 1,1,2 halves a model of order 5 or 6.
        held_out: share of the documents (at least one) that the model is not fitted on; their perplexities are the yardstick for others.
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
    """`score model=FILE input=PATH`: quantiles over the documents, to choose limits by."""

    model: str
    input: str
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
    kept = [text for _, text in hashed[aside:]]
    vocabulary = units.build(kind, kept)
    documents = [vocabulary.encode(text) for text in kept]
    orders, discounts = kneser_ney.estimate(documents, vocab_size=vocabulary.size, order=order, least=least)
    about = {
        "documents": len(kept), "units": sum(map(len, documents)), "characters": sum(map(len, kept)),
        "sha256": hashlib.sha256(b"".join(digest for digest, _ in hashed)).hexdigest(), "least": list(least),
        "ngrams": [len(one.keys) for one in orders], "discounts": [list(one) for one in discounts],
    }
    model = NgramModel(vocabulary, tuple(orders), about)
    passages = [passage for _, text in hashed[:aside] for passage in cut(text)]
    return NgramModel(vocabulary, tuple(orders), {**about, "held_out": {"documents": aside, **quantiles(model, passages)}})


def cut(text: str, size: int = PASSAGE) -> list[str]:
    """A text in passages of `size` characters, cut between words; what is left at the end counts from a quarter of that, or where it is
    all there is."""
    found, start = [], 0
    while start < len(text):
        end = len(text) if len(text) - start <= size else (text.rfind(" ", start + size // 2, start + size) + 1 or start + size)
        found.append(text[start:end])
        start = end
    return found[:-1] if len(found) > 1 and len(found[-1]) < size // 4 else found


def quantiles(model: NgramModel, texts: Iterable[str]) -> dict:
    """`passages`, and of `perplexity`, `word_order` (bits a unit) and `unknown` the quantiles {"50": ...}."""
    found = [(score.perplexity, model.word_order(text, score), score.unknown) for text in texts for score in (model.score(text),)]
    if not found:
        raise UserError("input", "no documents with text", "there is nothing to measure")
    return {"passages": len(found), **{
        name: {str(q): float(np.percentile(values, q)) for q in QUANTILES}
        for name, values in zip(("perplexity", "word_order", "unknown"), zip(*found))
    }}


def train(settings: TrainSettings) -> None:
    model = fit(_read(settings), kind=settings.units, order=settings.order, least=settings.least, held_out=settings.held_out)
    Path(settings.output).parent.mkdir(parents=True, exist_ok=True)
    model.save(settings.output)
    about, held = model.about, model.about["held_out"]
    print(f"wrote {settings.output} ({Path(settings.output).stat().st_size / 1e6:.1f} MB): order {model.order} over {settings.units}, "
          f"{about['documents']} documents, {about['units']:,} units, {sum(about['ngrams']):,} n-grams; held-out perplexity "
          f"{held['perplexity']['50']:.1f} (median of {held['passages']} passages of {held['documents']} documents), 95th percentile "
          f"{held['perplexity']['95']:.1f}")


def score(settings: ScoreSettings) -> None:
    model = NgramModel.load(settings.model, key="model")
    print(json.dumps(quantiles(model, _read(settings)), indent=1))


def _read(settings: TrainSettings | ScoreSettings) -> list[str]:
    files, _ = find_files(Path(settings.input))
    return list(read_documents(files, text_key=settings.text_key, bad=BadRecords(settings.max_bad_lines)))
