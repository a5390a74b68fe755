"""Everything that cannot work, refused in seconds, before anything is allocated. No torch.

One rule, one function: it yields a `UserError` for each mistake it sees. `validate` collects them all, so that a person mends a
configuration in one go. Rules that look at one value alone are tables in `ranges.py`.
"""
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_ext.config import geometry
from megatron_ext.config.cluster import CLUSTER
from megatron_ext.config.collecting import COLLECT
from megatron_ext.config.curating import CURATE
from megatron_ext.config.families import family_fits_layout, family_fits_stage, family_has_its_keys, spans_fit
from megatron_ext.config.layouts import LAYOUT, MODEL, Rule, ranks_fit
from megatron_ext.config.observing import figures_can_be_published
from megatron_ext.config.overrides import options_of
from megatron_ext.config.precision import attention_serves, fp8_fits
from megatron_ext.config.ranges import check_values
from megatron_ext.config.recovery import parse_range
from megatron_ext.config.rlhf import RLHF
from megatron_ext.config.schema import Config
from megatron_ext.config.stages import PACKED
from megatron_ext.config.stopping import STOPPING
from megatron_ext.errors import UserError


class ConfigErrors(UserError):
    """Several mistakes at once: `.errors`. Its key, value and reason are those of the first."""

    def __init__(self, errors: Iterable[UserError]):
        self.errors = tuple(errors)
        super().__init__(self.errors[0].key, self.errors[0].value, self.errors[0].reason)

    def __str__(self) -> str:
        return "\nerror: ".join(str(error) for error in self.errors)

    def __reduce__(self):
        return type(self), (self.errors,)


def validate(config: Config, verb: str = "train") -> None:
    """Raises UserError (one mistake) or ConfigErrors (several).

    Args:
        verb: what the configuration is for (`collect augment`: a verb with its action). `prepare` trains nothing; `search` (of `plan`) has no layout yet; `generate` and `evaluate` take their model from a checkpoint,
            so that `check_layout` is called again once it is known.
    """
    errors = problems(config, verb)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ConfigErrors(errors)


def problems(config: Config, verb: str = "train") -> list[UserError]:
    """All mistakes. Values that make no sense alone are not looked at together: 0 layers divide into anything."""
    errors = list(check_values(config))
    if errors:
        return errors
    rules: tuple[Rule, ...] = COMMON
    if verb in ("train", "check", "run", "submit"):
        rules += (family_has_its_keys, *MODEL, family_fits_layout, *LAYOUT, family_fits_stage, spans_fit, *TRAIN) + (CLUSTER if verb == "submit" else ())
    elif verb == "plan":
        rules += (family_has_its_keys, *MODEL, family_fits_layout, *LAYOUT, spans_fit, stage_is_known, fp8_fits, batch_divides, sequence_parallel_fits,
                  sequence_fits_positions)
    elif verb == "search":  # what no layout would mend is told, the rest is for the search
        rules += (family_has_its_keys, *MODEL, family_fits_layout, spans_fit)
    elif verb in ("generate", "evaluate"):
        rules += READ
    elif verb == "convert":
        rules += CONVERT
    elif verb == "prepare":
        rules += CURATE
    elif verb.startswith("collect "):
        rules += COLLECT[verb.partition(" ")[2]]
    return [error for rule in rules for error in rule(config)]


def check_layout(config: Config) -> None:
    """The rules of a model in a layout alone: for a model that came out of a checkpoint. Raises UserError."""
    errors = [error for rule in (*MODEL, family_fits_layout, *LAYOUT) for error in rule(config)]
    if errors:
        raise errors[0] if len(errors) == 1 else ConfigErrors(errors)


# ---- training --------------------------------------------------------------------------------------------------------------------

def stage_is_known(config: Config) -> Iterator[UserError]:
    if config.stage.name not in options_of("stage"):
        yield UserError("stage.name", config.stage.name, f"unknown; conf/stage has {', '.join(options_of('stage'))}")


def batch_divides(config: Config) -> Iterator[UserError]:
    parallel, train, ranks = config.parallel, config.train, config.launch.ranks
    model_ranks = parallel.tp * parallel.pp * parallel.cp
    if ranks % model_ranks or config.stage.name in PACKED:
        return  # ranks_fit has said so; packed micro-batches need not divide
    data_ranks = ranks // model_ranks
    slots = train.micro_batch_size * data_ranks
    if train.global_batch_size % slots:
        below = train.global_batch_size // slots * slots
        right = f"{below} or {below + slots}" if below else str(slots)
        yield UserError("train.global_batch_size", train.global_batch_size,
                        f"must be a multiple of train.micro_batch_size x data ranks = {train.micro_batch_size} x {data_ranks} = {slots}: "
                        f"{right}")
    elif parallel.vpp is not None and parallel.pp > 1 and train.global_batch_size // slots % parallel.pp:
        yield UserError("train.global_batch_size", train.global_batch_size,
                        f"gives {train.global_batch_size // slots} micro-batches a rank; interleaved pipelines need a multiple of "
                        f"parallel.pp={parallel.pp}, so a multiple of {slots * parallel.pp} samples")


def sequence_parallel_fits(config: Config) -> Iterator[UserError]:
    parallel, length = config.parallel, config.data.sequence_length
    if parallel.sp and parallel.tp == 1:
        yield UserError("parallel.sp", "true", "splits norms over the tensor-parallel ranks: needs parallel.tp greater than 1")
    elif parallel.sp and config.stage.name not in PACKED and length % (parallel.tp * parallel.cp):
        split = f"parallel.tp x cp = {parallel.tp} x {parallel.cp}" if parallel.cp > 1 else f"parallel.tp={parallel.tp}"
        yield UserError("data.sequence_length", length, f"must be a multiple of {split} with parallel.sp=true")


def sequence_fits_positions(config: Config) -> Iterator[UserError]:
    model, length = config.model, config.data.sequence_length
    if model.position_embedding == "learned" and length > model.max_sequence_length:
        yield UserError("data.sequence_length", length, f"is longer than the table of model.max_sequence_length={model.max_sequence_length} "
                                                        "learned positions")


def schedule_fits(config: Config) -> Iterator[UserError]:
    optim, steps = config.optim, geometry.steps_of(config)
    if optim.warmup_steps >= steps:
        yield UserError("optim.warmup_steps", optim.warmup_steps, f"must be below the {steps} steps of the run")
    if optim.min_lr > optim.lr:
        yield UserError("optim.min_lr", optim.min_lr, f"must be at most optim.lr={optim.lr:g}")
    if optim.decay_steps is None or optim.schedule == "constant":
        return
    if optim.schedule == "wsd" and optim.decay_steps + optim.warmup_steps > steps:
        yield UserError("optim.decay_steps", optim.decay_steps, f"and optim.warmup_steps={optim.warmup_steps} are more than the {steps} steps")
    if optim.schedule in ("cosine", "linear") and optim.decay_steps <= optim.warmup_steps:
        yield UserError("optim.decay_steps", optim.decay_steps, f"is where the decay ends: must be above optim.warmup_steps="
                                                                f"{optim.warmup_steps}")


def checkpoint_fits(config: Config) -> Iterator[UserError]:
    if config.checkpoint.format == "dp_reshardable" and not config.parallel.distributed_optimizer:
        yield UserError("checkpoint.format", "dp_reshardable", "is a format of the distributed optimizer; set "
                                                               "parallel.distributed_optimizer=true or checkpoint.format=fully_reshardable")


def tokenizer_exists(config: Config) -> Iterator[UserError]:
    if config.data.tokenizer is not None and not Path(config.data.tokenizer).is_file():
        yield UserError("data.tokenizer", config.data.tokenizer, "is not a file; name a tokenizer.json of the tokenizers library")


# ---- every verb ------------------------------------------------------------------------------------------------------------------

def split_is_whole(config: Config) -> Iterator[UserError]:
    split = config.data.split
    shown = "[" + ",".join(f"{part:g}" for part in split) + "]"
    if len(split) != 3:
        yield UserError("data.split", shown, "must be three parts: train, validation, test, such as [0.96,0.02,0.02]")
    elif not all(0 <= part <= 1 for part in split) or abs(sum(split) - 1) > 1e-6:
        yield UserError("data.split", shown, f"parts must be from 0 to 1 and sum to 1, not {sum(split):g}")
    elif split[0] == 0:
        yield UserError("data.split", shown, "leaves nothing to train on; the first part must be greater than 0")


def weights_fit_paths(config: Config) -> Iterator[UserError]:
    data = config.data
    shown = "[" + ",".join(f"{weight:g}" for weight in data.weights) + "]"
    if data.path is not None and data.paths:
        yield UserError("data.path", data.path, "and data.paths are both given; put all directories into data.paths")
    if data.weights and len(data.weights) != len(data.paths):
        yield UserError("data.weights", shown, f"must have one weight for each of the {len(data.paths)} data.paths")
    elif data.weights and not all(0 < weight < float("inf") for weight in data.weights):
        yield UserError("data.weights", shown, "weights must be greater than 0")


def run_dir_is_no_file(config: Config) -> Iterator[UserError]:
    path = Path(config.run.dir)
    if not config.run.dir.strip():
        yield UserError("run.dir", config.run.dir, "is empty; name a directory, such as outputs/run")
    elif next((part for part in (path, *path.parents) if part.exists() and not part.is_dir()), None):
        yield UserError("run.dir", config.run.dir, "is a file, or lies below one; name a directory")


def load_exists(config: Config) -> Iterator[UserError]:
    load, start = config.checkpoint.load, config.checkpoint.start
    if load not in (None, "auto") and not Path(load).is_dir():
        yield UserError("checkpoint.load", load, "is not there; name a checkpoint or run directory, or auto")
    if start is not None and not Path(start).is_dir():
        yield UserError("checkpoint.start", start, "is not there; name a checkpoint or run directory of an earlier stage")


# ---- generate, evaluate ----------------------------------------------------------------------------------------------------------

def load_is_given(config: Config) -> Iterator[UserError]:
    if config.checkpoint.load is None:
        yield UserError("checkpoint.load", "null", "name the checkpoint or run directory to read, such as checkpoint.load=outputs/run")


# ---- convert ---------------------------------------------------------------------------------------------------------------------

def one_side_is_given(config: Config) -> Iterator[UserError]:
    hf = config.hf
    given = {key: value for key, value in (("hf", hf), ("megatron", config.megatron), ("checkpoint.load", config.checkpoint.load)) if value is not None}
    if not given:
        yield UserError("hf", "null", "name what is converted: convert hf=DIR output=DIR reads a Hugging Face directory, convert checkpoint.load=DIR "
                                      "output=DIR writes one")
    elif len(given) > 1:
        yield UserError(*list(given.items())[-1], f"and {next(iter(given))} are both given: a command converts one thing")
    if config.output is None:
        yield UserError("output", "null", "name the directory to write")
    if config.adapter is not None and hf is not None and not Path(config.adapter).is_dir():
        yield UserError("adapter", config.adapter, "is not there; name a directory as PEFT saves it")
    elif config.adapter is not None and hf is None and (config.adapter != "only" or config.checkpoint.load is None):
        yield UserError("adapter", config.adapter, "with checkpoint.load it is adapter=only: the adapter of the checkpoint is written, without its model")


def skips_are_ranges(config: Config) -> Iterator[UserError]:
    for text in config.recovery.skip:
        try:
            parse_range(text)
        except UserError as error:
            yield error


COMMON: tuple[Rule, ...] = (split_is_whole, weights_fit_paths, run_dir_is_no_file, load_exists, tokenizer_exists)
TRAIN: tuple[Rule, ...] = (
    stage_is_known, fp8_fits, attention_serves, batch_divides, sequence_parallel_fits, sequence_fits_positions, schedule_fits, checkpoint_fits,
    figures_can_be_published, skips_are_ranges, *RLHF, *STOPPING,
)
READ: tuple[Rule, ...] = (load_is_given, ranks_fit)
CONVERT: tuple[Rule, ...] = (one_side_is_given,)
