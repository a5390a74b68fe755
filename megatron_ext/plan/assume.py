"""What `plan` takes where nothing is said. A plan of the default run (sequences of 256 tokens in fp32, a batch of 32) would be of no use to anybody."""
from collections.abc import Sequence

from megatron_ext.config.compose import compose
from megatron_ext.config.schema import Config

LONGEST = 8192  # tokens of a sequence that nobody asked for


def assumed(words: Sequence[str]) -> tuple[str, ...]:
    """Overrides that `plan` adds to those typed: bf16, sequences as long as the model takes (at most LONGEST), sequence parallelism with tensor
    parallelism, micro-batches of one, and a batch that fills the pipeline eight times over."""
    named = {word.lstrip("+").partition("=")[0] for word in words}
    config = compose(words)
    found = []
    if not named & {"precision", "precision.dtype"} and config.precision.dtype == "fp32":
        found.append("precision.dtype=bf16")
    if "data.sequence_length" not in named:
        found.append(f"data.sequence_length={min(config.model.max_sequence_length, LONGEST)}")
    if "parallel.sp" not in named and config.parallel.tp > 1 and not config.parallel.sp:
        found.append("parallel.sp=true")
    if "train.micro_batch_size" not in named:
        found.append("train.micro_batch_size=1")
    if "train.global_batch_size" not in named:
        micro = 1 if "train.micro_batch_size" not in named else config.train.micro_batch_size
        found.append(f"train.global_batch_size={_batch(config, micro)}")
    if "optim.warmup_steps" not in named:
        found.append("optim.warmup_steps=0")
    return tuple(found)


def _batch(config: Config, micro: int) -> int:
    parallel, ranks = config.parallel, config.launch.ranks
    return max(1, ranks // (parallel.tp * parallel.pp * parallel.cp)) * micro * 8 * parallel.pp
