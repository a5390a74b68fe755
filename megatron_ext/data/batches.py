"""Samples to the micro-batches of one data-parallel rank."""
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from kernels.context_parallel import zigzag_split
from megatron_ext.data.samples import Masking, Sample, Samples


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the CPU: b samples of s tokens.

    Attributes:
        tokens: int64 [b, s], the inputs.
        labels: int64 [b, s], the token that follows each, or what else the objective wants said there.
        loss_mask: float32, as the labels, 1 where the loss counts. With `mask_eod_loss` it is 0 where the *input* is an end-of-document token: what begins
            the next document cannot be known (megatron-core's `eod_mask_loss`). That a document ends is still learned.
        position_ids: int64 [b, s], from 0; with `reset_positions` from 0 in each document (one that began in an earlier sample: from 0 too).
        documents: int32 [b, s], the number of each token's document in its sample, when attention is reset; else None.
        fields: what an objective reads beside these, by name.
        inputs: what the model reads beside these, by the name that it has in its call.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    documents: torch.Tensor | None
    fields: Mapping[str, torch.Tensor] = field(default_factory=dict)
    inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> "Batch":
        """The same on `device` (copies run beside the computation where memory is pinned)."""
        if device.type == "cpu":
            return self

        def there(part):
            return part.to(device, non_blocking=True) if isinstance(part, torch.Tensor) else part

        named = {group: {name: there(part) for name, part in getattr(self, group).items()} for group in ("fields", "inputs")}
        return Batch(**{name: there(part) for name, part in vars(self).items() if name not in named}, **named)

    def context_part(self, rank: int, size: int) -> "Batch":
        """What context-parallel rank `rank` of `size` holds of every sequence: the chunks `rank` and `2 size - 1 - rank` of 2 size, so that
        all ranks have as much causal attention to do. `documents` stay whole: what a token may see is decided over the whole sequence."""
        if size == 1:
            return self
        split = {name: zigzag_split(getattr(self, name), 1, rank, size) for name in ("tokens", "labels", "loss_mask", "position_ids")}
        return replace(self, **split)


def micro_batches(samples: Samples, first: int, *, global_batch: int, micro_batch: int, dp_rank: int, dp_size: int) -> list[Batch]:
    """The micro-batches of data rank `dp_rank` for the global batch of samples [first, first + global_batch).

    Micro-batch m of rank r holds samples first + (m * dp_size + r) * micro_batch + [0, micro_batch), so the ranks together hold each sample of
    the global batch once, whatever their number.

    Raises:
        ValueError: global_batch is not a multiple of micro_batch * dp_size.
    """
    count, rest = divmod(global_batch, micro_batch * dp_size)
    if rest or count < 1:
        raise ValueError(f"global batch {global_batch} is not a multiple of micro batch {micro_batch} x {dp_size} data ranks")
    starts = [first + (m * dp_size + dp_rank) * micro_batch for m in range(count)]
    return [collate([samples[k] for k in range(start, start + micro_batch)], eod=samples.eod, masking=samples.masking) for start in starts]


def collate(samples: list[Sample], *, eod: int, masking: Masking) -> Batch:
    """Stacks samples of equal length into one micro-batch."""
    tokens, documents = np.stack([sample.tokens for sample in samples]), np.stack([sample.documents for sample in samples])
    if samples[0].labels is None:
        inputs, labels, documents = tokens[:, :-1], tokens[:, 1:], documents[:, :-1]
    else:
        inputs, labels = tokens, np.stack([sample.labels for sample in samples])
    mask = np.stack([np.ones(labels.shape[1], dtype=np.float32) if sample.loss_mask is None else sample.loss_mask for sample in samples])
    if masking.mask_eod_loss:
        mask[inputs == eod] = 0.0
    return Batch(
        tokens=torch.from_numpy(np.ascontiguousarray(inputs)),
        labels=torch.from_numpy(np.ascontiguousarray(labels)),
        loss_mask=torch.from_numpy(mask),
        position_ids=torch.from_numpy(positions(documents, reset=masking.reset_positions)),
        documents=torch.from_numpy(np.ascontiguousarray(documents)) if masking.reset_attention else None,
        inputs={name: torch.from_numpy(np.stack([sample.inputs[name] for sample in samples])) for name in samples[0].inputs},
    )


def positions(documents: np.ndarray, *, reset: bool) -> np.ndarray:
    """Position ids int64 [b, s]; with `reset`, each token's distance to the first one of its document in the sample."""
    steps = np.broadcast_to(np.arange(documents.shape[1], dtype=np.int64), documents.shape)
    if not reset:
        return steps.copy()
    begins = np.zeros(documents.shape, dtype=np.int64)
    begins[:, 1:] = np.where(documents[:, 1:] != documents[:, :-1], steps[:, 1:], 0)
    return steps - np.maximum.accumulate(begins, axis=1)
