"""The loss of a model on a split: every sequence once, whatever the layout."""
import math
from dataclasses import dataclass, replace

import torch

from megatron_ext.data.batches import Batch, collate
from megatron_ext.data.samples import Samples

MICRO_BATCHES = 16  # a call of the pipeline schedule; bounds the memory that waiting batches take


@dataclass(frozen=True)
class SplitLoss:
    """`loss`: mean over `tokens`, nats."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinity where that is larger than a float holds."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    def bits_per_byte(self, bytes_per_token: float | None) -> float | None:
        """Bits of loss for each byte of text; None where nobody knows how many bytes a token stands for."""
        return self.loss / math.log(2) / bytes_per_token if bytes_per_token else None


def evaluate_split(engine, samples: Samples, *, count: int, micro_batch: int) -> SplitLoss:
    """Mean loss over the first `count` sequences, without dropout. Collective over the engine's ranks; the same on all of them.

    Sequences are dealt to micro-batches and data ranks; where they do not come out even, filler rows are masked.
    """
    dp_rank, dp_size = engine.groups.dp.rank(), engine.groups.dp.size()
    width = micro_batch * dp_size
    rounds = math.ceil(count / width)
    unit = engine.layout.pp if engine.layout.vpp else 1  # the interleaved schedule wants a multiple of the stages
    rounds, at_once = math.ceil(rounds / unit) * unit, math.ceil(MICRO_BATCHES / unit) * unit
    total, tokens = 0.0, 0
    for start in range(0, rounds, at_once):
        batches = [
            _batch(samples, (m * dp_size + dp_rank) * micro_batch, micro_batch, count) for m in range(start, min(start + at_once, rounds))
        ]
        part, seen = engine.evaluate(batches)
        total, tokens = total + part, tokens + seen
    return SplitLoss(total / max(tokens, 1), tokens)


def _batch(samples: Samples, first: int, size: int, count: int) -> Batch:
    rows = [samples[k if k < count else 0] for k in range(first, first + size)]
    batch = collate(rows, eod=samples.eod, masking=samples.masking)
    real = torch.tensor([k < count for k in range(first, first + size)], dtype=batch.loss_mask.dtype)
    return replace(batch, loss_mask=batch.loss_mask * real[:, None])
