"""What a step minimises: the part of training that differs between pretraining, reward models and PPO.

Everything is a sum: over tokens, sequences or pairs. The engine divides the gradients by the count of the whole global batch, so that
nothing depends on how the batch is cut into micro-batches and data ranks; a mean of means would.
"""
from typing import Protocol

import torch
from torch import Tensor

from megatron_ext.config.schema import ModelConfig
from megatron_ext.data.batches import Batch
from megatron_ext.models.decoder import Decoder


class Objective(Protocol):
    """One per kind of training; holds settings, no state of the model.

    Attributes:
        names: of the numbers that `loss` reports beside the loss. Those that end in `_max` are largest values, the others sums.
    """

    names: tuple[str, ...]

    def needed(self, batch: Batch) -> Tensor | None:
        """int64 [n], rising: which of the batch x seq tokens (row after row) `score` reads; None = all."""

    def score(self, model: Decoder, hidden: Tensor, batch: Batch) -> object:
        """Tensors (one, or a tuple) from the last norm's output, [seq, batch, hidden] or of the tokens needed alone, [n, 1, hidden]. Called inside the
        model, on the last pipeline stage."""

    def loss(self, scores: object, batch: Batch) -> tuple[Tensor, Tensor | int, dict[str, Tensor]]:
        """(sum of losses, scalar fp32; how many the sum counts, a whole number; numbers by name)."""


class LanguageModelling:
    """Cross-entropy of the next token, where `batch.loss_mask` counts it."""

    names = ()

    def needed(self, batch: Batch) -> None:
        return None

    def score(self, model: Decoder, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return model.loss(hidden, batch.labels, batch.loss_mask)

    def loss(self, scores, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        return scores[0], batch.loss_mask.sum().to(torch.int), {}


class MaskedLanguageModelling(LanguageModelling):
    """Cross-entropy of the words that were masked (Devlin et al. 2018, arXiv 1810.04805, section 3.1): `batch.loss_mask` says which."""

    def needed(self, batch: Batch) -> Tensor:
        return batch.loss_mask.flatten().nonzero().flatten()


def objective_of(model: ModelConfig) -> LanguageModelling:
    """What a family is pretrained on."""
    return MaskedLanguageModelling() if model.family == "encoder" else LanguageModelling()  # the labels of spans are the decoder's next tokens
