"""A rank's memory, part by part, and whether it fits. No torch.

Parameters, gradients and optimizer state are exact (`buffers.py`); activations are formulas checked against a trace (`activations.py`). What nobody can count
beforehand (the CUDA context, NCCL's buffers, what the allocator cannot use) is `plan.margin` of the GPU's memory.
"""
from dataclasses import asdict, dataclass

from megatron_ext.config import sizes
from megatron_ext.config.geometry import Batch, Grid
from megatron_ext.config.schema import Config
from megatron_ext.config.stages import PACKED
from megatron_ext.plan.activations import Activations, activations
from megatron_ext.plan.buffers import State, state
from megatron_ext.plan.hardware import GIB


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank; `margin` is 0 where the GPU is not known."""

    rank: int
    pipeline_rank: int
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: float
    logits: float
    buffers: float
    margin: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.buffers + self.margin

    def as_dict(self) -> dict[str, object]:
        return asdict(self) | {"total": self.total}


def rank_memory(config: Config, pipeline_rank: int, vocab: int, *, head: str = "vocabulary", train: bool = True) -> RankMemory:
    """The memory of the first rank of a pipeline stage (data rank 0, which owns as much as any other).

    Args:
        vocab: words that exist.
        train: False = weights alone, as a reward model or a reference holds.
    """
    rank = Grid.of(config).rank(pp=pipeline_rank)
    held: State = state(config, rank, vocab, head=head, train=train)
    count = micro_batches(config)
    found = activations(config, pipeline_rank, vocab, count, head=head)
    if not train:  # one layer at a time, and nothing is kept
        found = Activations(0.0, 0.0, found.layers / max(1, sizes.layers(config.model) // config.parallel.pp), found.buffers, 0.0, found.workspace, {})
    logits = found.edges if pipeline_rank == config.parallel.pp - 1 else 0.0
    return RankMemory(
        rank=rank, pipeline_rank=pipeline_rank, parameters=held.parameters, weights=held.weights, gradients=held.gradients, optimizer=held.optimizer,
        activations=max(0.0, found.traced - logits - found.buffers), logits=logits, buffers=found.buffers + found.workspace,
        margin=margin(config),
    )


def micro_batches(config: Config) -> int:
    """Of a step, on a data rank; where they are packed by tokens, enough to fill the pipeline."""
    return 2 * config.parallel.pp if config.stage.name in PACKED else max(1, Batch.of(config).accumulation)


def memory(config: Config, vocab: int) -> list[RankMemory]:
    """Of every pipeline stage that can be the fullest: the first, the second, the last."""
    pp = config.parallel.pp
    return [rank_memory(config, stage, vocab) for stage in sorted({0, min(1, pp - 1), pp - 1})]


def fullest(config: Config, vocab: int) -> RankMemory:
    """The stage that needs most."""
    return max(memory(config, vocab), key=lambda one: one.total)


def limit(config: Config) -> float | None:
    """Bytes that a GPU has; None where it is not known."""
    return None if config.hardware.memory is None else config.hardware.memory * GIB


def margin(config: Config) -> float:
    """Bytes that are left free; 0 where it is not known what a GPU has."""
    return config.plan.margin * (limit(config) or 0.0)


def fits(config: Config, vocab: int) -> bool:
    """Whether every rank fits; True where the GPU is not known."""
    most = limit(config)
    return most is None or fullest(config, vocab).total <= most
