"""Sequences of unequal lengths to micro-batches, and what models say of their tokens back to one place.

Sequences are packed, not padded: several lie in a row of tokens, each a document that sees no other. A plan deals them to data ranks and
micro-batches by tokens; whatever the plan, every rank gets every number back (`gather`), so that rewards, advantages and the order of
minibatches cannot depend on it.
"""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.data.batches import Batch
from megatron_ext.train.engine import Engine
from rlhf.data.packing import pack_by_tokens


@dataclass(frozen=True)
class Sequence_:
    """A prompt and what follows it.

    Attributes:
        tokens: int64 [p + r]. prompt: p, at least 1.
    """

    tokens: np.ndarray
    prompt: int

    @property
    def response(self) -> int:
        """r, tokens of the response."""
        return len(self.tokens) - self.prompt


@dataclass(frozen=True)
class Plan:
    """Which sequences (numbers) lie in which micro-batch of this data rank. A micro-batch may be empty: it keeps the ranks in step."""

    micro_batches: tuple[tuple[int, ...], ...]


def plan(lengths: Sequence[int], chosen: Sequence[int], *, budget: int, dp_rank: int, dp_size: int, groups: Sequence[int] | None = None) -> Plan:
    """Deals sequences to data ranks and micro-batches.

    Args:
        lengths: tokens of every sequence. chosen: numbers of those that take part, in order.
        budget: tokens of a micro-batch; a longer sequence has one of its own.
        groups: of each chosen one, where those of one group have to be in one micro-batch.
    """
    bins = pack_by_tokens([lengths[number] for number in chosen], budget, groups)
    weights = [sum(lengths[chosen[item]] for item in found) for found in bins]
    ranks: list[list[int]] = [[] for _ in range(dp_size)]
    loads = [0] * dp_size
    for number in sorted(range(len(bins)), key=lambda number: (-weights[number], number)):
        lightest = loads.index(min(loads))
        ranks[lightest].append(number)
        loads[lightest] += weights[number]
    mine = [tuple(chosen[item] for item in bins[number]) for number in sorted(ranks[dp_rank])]
    return Plan(tuple(mine) or ((),))


class Assembler:
    """Makes the batches of one engine.

    Args:
        engine: whose layout says what lengths fit.
        sequences: all of them, by number.
    """

    def __init__(self, engine: Engine, sequences: Sequence[Sequence_]):
        self._sequences = sequences
        self._unit = engine.layout.tp if engine.layout.sp else 1
        self._uniform = engine.layout.pp > 1  # stages exchange tensors of one shape
        self.least = 1  # tokens of a row at least, where all have to be the same

    def length(self, part: Sequence[int]) -> int:
        """Tokens of a micro-batch."""
        return self._unit * -(-max(sum(len(self._sequences[number].tokens) for number in part), 1) // self._unit)

    def batches(self, planned: Plan, fields: Sequence[Mapping[str, Tensor]] | None = None) -> list[Batch]:
        """One batch a micro-batch. fields: what each gets beside `select`, `last` and `cu_seqlens` (see `_one`)."""
        lengths = [self.length(part) for part in planned.micro_batches]
        if self._uniform:
            lengths = [max(*lengths, self.least)] * len(lengths)
        made = [self._one(part, length) for part, length in zip(planned.micro_batches, lengths)]
        if fields is None:
            return made
        return [Batch(**{**vars(batch), "fields": {**batch.fields, **more}}) for batch, more in zip(made, fields, strict=True)]

    def _one(self, part: Sequence[int], length: int) -> Batch:
        """fields: `select` int64 [response tokens], where each is predicted, row after row; `last` int64 [sequences], the last token of each;
        `cu_seqlens` int32 [sequences + 1] of the response tokens."""
        sequences = [self._sequences[number] for number in part]
        sizes = [len(sequence.tokens) for sequence in sequences]
        equal = not self._uniform and len(set(sizes)) == 1 and sum(sizes) == length and sizes[0] % self._unit == 0
        tokens, labels = np.zeros(length, dtype=np.int64), np.zeros(length, dtype=np.int64)
        mask, positions = np.zeros(length, dtype=np.float32), np.zeros(length, dtype=np.int64)
        documents = np.full(length, len(sequences), dtype=np.int32)  # what is behind the last sequence is a document of its own
        start, select, last, counts = 0, [], [], [0]
        for number, sequence in enumerate(sequences):
            size, stop = sizes[number], start + sizes[number]
            tokens[start:stop] = sequence.tokens
            labels[start : stop - 1] = sequence.tokens[1:]
            mask[start + sequence.prompt - 1 : stop - 1] = 1.0
            positions[start:stop] = np.arange(size)
            documents[start:stop] = number
            select.append(np.arange(start + sequence.prompt - 1, stop - 1))
            last.append(stop - 1)
            counts.append(counts[-1] + sequence.response)
            start = stop  # positions of what is behind the last one stay 0: there may be more of it than a table of positions has rows
        rows = len(sequences) if equal else 1  # sequences of one length need no packing: rows of a batch

        def shaped(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array.reshape(rows, -1))

        return Batch(
            tokens=shaped(tokens), labels=shaped(labels), loss_mask=shaped(mask), position_ids=shaped(positions),
            documents=None if equal else shaped(documents),
            fields={
                "select": torch.from_numpy(np.concatenate(select) if select else np.zeros(0, dtype=np.int64)),
                "last": torch.tensor(last, dtype=torch.int64), "cu_seqlens": torch.tensor(counts, dtype=torch.int32),
            },
        )


def gather(engine: Engine, planned: Plan, found: Sequence[Tensor], offsets: Sequence[int]) -> Tensor:
    """Numbers of sequences (or of their tokens) from the ranks that made them, on every rank of the layout.

    Args:
        found: for each micro-batch the numbers of its sequences, one after another, on the last pipeline stage; elsewhere empty.
        offsets: [sequences + 1], where each sequence's numbers lie in the answer.
    Returns:
        fp32 [offsets[-1]] on the CPU; 0 for sequences that nobody had.
    """
    whole = torch.zeros(int(offsets[-1]), dtype=torch.float32, device=engine.platform.device)
    if engine.groups.tp.rank() == 0:
        for part, numbers in zip(planned.micro_batches, found):
            places = [torch.arange(int(offsets[number]), int(offsets[number + 1])) for number in part]
            if places:
                whole[torch.cat(places).to(whole.device)] = numbers.float()
    dist.all_reduce(whole, group=engine.groups.intra_dist_opt)  # every other rank adds zero
    return whole.cpu()
