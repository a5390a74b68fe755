"""`plan scaling`: what a bigger run's loss will be, from small runs, before it is paid for. No torch.

    plan scaling scaling.runs=[outputs/scaling] model=tiny model.hidden_size=256 train.tokens=20000000

The small runs are run directories (their configuration, what they were trained on, their last validation loss). The bigger run is the configuration
that the command line composes. `laws.py` has the mathematics; conf/sweep/scaling.yaml makes such small runs.

A run is a point: its parameters in matrix products (N: all but tables that are only looked up), its tokens (D), and its operations (C, as for MFU,
attention and logits included). Losses are compared only between runs that saw the same words: tokenizer, data and sequence length must agree.
"""
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from megatron_ext.cli.options import Options
from megatron_ext.config import sizes
from megatron_ext.config.build import from_dict
from megatron_ext.config.schema import Config, ModelConfig
from megatron_ext.errors import UserError
from megatron_ext.observe.flops import token_flops
from megatron_ext.plan import laws
from megatron_ext.plan.laws import Law, Points

KEY = "scaling.runs"
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML has it


@dataclass(frozen=True)
class SmallRun:
    """A finished run.

    Attributes:
        size, tokens, compute: N, D, C as above. loss: the validation after the last step, nats a token.
        same: what must agree between runs whose losses are compared.
        vocab_size: words.
    """

    name: str
    size: float
    tokens: float
    compute: float
    loss: float
    same: dict
    vocab_size: int


@dataclass(frozen=True)
class Prediction:
    """Of the bigger run. low, high: between which its loss ends with probability `level`. flat, line: what two simpler rules say: the loss of the
    largest small run, and the line through the last two, in log loss over log compute."""

    size: float
    tokens: float
    compute: float
    loss: float
    low: float
    high: float
    level: float
    flat: float
    line: float


def run(config: Config, options: Options) -> int:
    """Fits, predicts, writes the page and its plot, and prints: text, or with --json one object.

    Raises:
        UserError: no runs, runs that cannot be compared or are too few, a directory that cannot be written.
    """
    from megatron_ext.plan import scaling_page

    runs = read_runs(config.scaling.runs)
    law = fit(config, runs)
    found = predict(config, runs, law)
    output = Path(config.scaling.output or Path(config.scaling.runs[0]) / "prediction")
    fields = scaling_page.fields(runs, law, found)
    try:
        page = scaling_page.write(output, config, runs, law, found)
        (output / "scaling.json").write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError("scaling.output", output, f"cannot be written ({error.strerror})") from None
    print(json.dumps(fields | {"page": str(page)}) if options.json else f"{scaling_page.text(runs, law, found)}\n{page}")
    return 0


# ---- runs ------------------------------------------------------------------------------------------------------------------------------


def point(model: ModelConfig, *, vocab_size: int, sequence_length: int, tokens: float) -> tuple[float, float]:
    """(N, C) of a training over `tokens`."""
    looked_up = (0 if model.tied_embeddings else vocab_size * sizes.embedding_size(model)) \
        + (sizes.position_rows(model) * model.hidden_size if model.position_embedding == "learned" else 0)
    flops = token_flops(model, sequence_length=sequence_length, vocab_size=vocab_size).training
    return float(sizes.parameters(model, vocab_size) - looked_up), flops * tokens


def read_runs(places: tuple[str, ...]) -> list[SmallRun]:
    """Runs of these directories, each a run or a folder of runs, by compute.

    Raises:
        UserError: none, one that has not ended with a validation, runs that cannot be compared.
    """
    if not places:
        raise UserError(KEY, "[]", "name the run directories, or a folder of them: scaling.runs=[outputs/scaling]")
    directories: list[Path] = []
    for place in map(Path, places):
        inside = [place] if _is_run(place) else sorted(file.parent for file in place.glob("**/metrics.jsonl") if _is_run(file.parent))
        if not inside:
            raise UserError(KEY, place, "is no run directory and holds none (config.yaml, metrics.jsonl, events.jsonl)")
        directories += inside
    runs = sorted((read_run(directory) for directory in dict.fromkeys(directories)), key=lambda run: run.compute)
    for one in runs[1:]:
        for name, value in one.same.items():
            if value != runs[0].same[name]:
                raise UserError(KEY, one.name, f"cannot be compared with {runs[0].name}: {name} {value}, there {runs[0].same[name]}; leave one of them out")
    return runs


def _is_run(directory: Path) -> bool:
    return all((directory / name).is_file() for name in ("config.yaml", "metrics.jsonl", "events.jsonl"))


def read_run(directory: Path) -> SmallRun:
    """Raises UserError: a file that is damaged, a run that has not ended or was not validated at its end."""
    try:
        config = from_dict(yaml.load((directory / "config.yaml").read_text(encoding="utf-8"), Loader=LOADER))
        steps, events = ([json.loads(line) for line in (directory / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
                         for name in ("metrics", "events"))
        start = next(event for event in reversed(events) if event["kind"] == "start")
        words, data = int(start["vocab_size"]), start["data"]
        last = steps[-1]
        tokens, loss = float(last["tokens"]), last.get("validation_loss")
        same = {"tokenizer": data["tokenizer"][:12], "data": ",".join(source[:12] for source in data["sources"]), "sequence length": data["sequence_length"],
                "validation.samples": config.validation.samples}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration, yaml.YAMLError, UserError) as error:
        raise UserError(KEY, directory, f"cannot be read ({type(error).__name__}: {error})") from None
    if not any(event["kind"] == "stop" and event.get("criterion") in ("steps", "tokens") for event in events):
        raise UserError(KEY, directory, "has not ended: its learning rate has not come down, and its loss with it; train it to its end "
                                        "(checkpoint.load=auto), or leave it out")
    if not isinstance(loss, float) or not math.isfinite(loss):
        raise UserError(KEY, directory, f"has no validation loss after its last step ({last.get('step')}); train with validation.at_end=true")
    size, compute = point(config.model, vocab_size=words, sequence_length=data["sequence_length"], tokens=tokens)
    return SmallRun(directory.name, size, tokens, compute, loss, same, words)


def points(runs: list[SmallRun]) -> Points:
    return Points(*(np.array([getattr(run, name) for run in runs], dtype=np.float64) for name in ("size", "tokens", "compute", "loss")))


# ---- the bigger run ----------------------------------------------------------------------------------------------------------------------


def fit(config: Config, runs: list[SmallRun]) -> Law:
    """The law of `scaling.law`. Raises UserError for runs that do not tell it."""
    settings, given = config.scaling, points(runs)
    kind = laws.choose(given) if settings.law == "auto" else settings.law
    try:
        return laws.fit(given, kind, noise=settings.noise, resamples=settings.resamples)
    except ValueError as error:
        raise UserError(KEY, ",".join(settings.runs), f"do not tell a law: {error}; add runs of other model sizes and train.tokens (conf/sweep/scaling.yaml makes nine)") from None


def predict(config: Config, runs: list[SmallRun], law: Law) -> Prediction:
    """What the run that `config` describes will end at."""
    tokens = float(config.train.tokens or config.train.steps * config.train.global_batch_size * config.data.sequence_length)
    size, compute = point(config.model, vocab_size=runs[0].vocab_size, sequence_length=runs[0].same["sequence length"], tokens=tokens)
    at = Points(*(np.array([value]) for value in (size, tokens, compute, 1.0)))
    low, high = law.interval(at, level=config.scaling.level)
    return Prediction(size, tokens, compute, float(law.loss(at)[0]), float(low[0]), float(high[0]), config.scaling.level, runs[-1].loss,
                      line(runs, compute))


def line(runs: list[SmallRun], compute: float) -> float:
    """Through the two runs of most compute, in log loss over log compute."""
    (one, other) = [run for number, run in enumerate(runs) if number == len(runs) - 1 or run.compute < runs[-1].compute][-2:]
    slope = math.log(other.loss / one.loss) / math.log(other.compute / one.compute)
    return other.loss * (compute / other.compute) ** slope
