"""How tensors of a Hugging Face model become one of ours, and back: forms, of which a family's table names one for each of its lines.

A form is a pair of inverse rearrangements, so that what was imported is exported bit by bit. They give views where they can.
"""
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.config import sizes
from megatron_ext.config.schema import ModelConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Heads:
    """a query heads of width d in g groups."""

    heads: int
    groups: int
    width: int

    @classmethod
    def of(cls, model: ModelConfig) -> "Heads":
        return cls(model.num_attention_heads, sizes.query_groups(model), sizes.head_dim(model))


class Same:
    """The tensor as it is."""

    def shapes(self, ours: Shape, heads: Heads) -> list[Shape]:
        """What the Hugging Face tensors look like where ours is of a shape."""
        return [ours]

    def join(self, parts: Sequence[Tensor], heads: Heads) -> Tensor:
        """Ours, of theirs."""
        return parts[0]

    def split(self, whole: Tensor, heads: Heads) -> list[Tensor]:
        """Theirs, of ours."""
        return [whole]


class Transposed(Same):
    """A weight [in, out], as GPT-2's Conv1D keeps it."""

    def shapes(self, ours, heads):
        return [ours[::-1]]

    def join(self, parts, heads):
        return parts[0].t()

    def split(self, whole, heads):
        return [whole.t()]


class Halves(Same):
    """Gate and up-projection, one above the other."""

    def shapes(self, ours, heads):
        return [(ours[0] // 2, *ours[1:])] * 2

    def join(self, parts, heads):
        return torch.cat(list(parts))

    def split(self, whole, heads):
        return list(whole.chunk(2))


class Apart(Same):
    """Queries, keys and values, a tensor each."""

    def shapes(self, ours, heads):
        return [(count * heads.width, *ours[1:]) for count in (heads.heads, heads.groups, heads.groups)]

    def join(self, parts, heads):
        return torch.cat([part.unflatten(0, (heads.groups, -1)) for part in parts], dim=1).flatten(0, 1)

    def split(self, whole, heads):
        each = heads.heads // heads.groups * heads.width
        return [part.flatten(0, 1) for part in whole.unflatten(0, (heads.groups, -1)).split([each, heads.width, heads.width], dim=1)]


class KeysValues(Halves):
    """Keys and values of cross-attention, a tensor each; ours has them head by head."""

    def join(self, parts, heads):
        return torch.cat([part.unflatten(0, (heads.heads, -1)) for part in parts], dim=1).flatten(0, 1)

    def split(self, whole, heads):
        return [part.flatten(0, 1) for part in whole.unflatten(0, (heads.heads, 2, -1)).unbind(1)]


class Blocks(Apart):
    """Queries, keys and values of all heads in one tensor, one block above the other."""

    def shapes(self, ours, heads):
        return [ours]

    def join(self, parts, heads):
        return super().join(parts[0].split([count * heads.width for count in (heads.heads, heads.groups, heads.groups)]), heads)

    def split(self, whole, heads):
        return [torch.cat(super().split(whole, heads))]


class TransposedBlocks(Blocks):
    """The same, [in, out]."""

    def shapes(self, ours, heads):
        return [ours[::-1]]

    def join(self, parts, heads):
        return super().join([parts[0].t()], heads)

    def split(self, whole, heads):
        return [super().split(whole, heads)[0].t()]


SAME, TRANSPOSED, HALVES, APART, BLOCKS, TRANSPOSED_BLOCKS, KEYS_VALUES = (
    Same(), Transposed(), Halves(), Apart(), Blocks(), TransposedBlocks(), KeysValues())
