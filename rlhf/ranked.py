"""Rankings as the reward stage and dpo use them: tokenised, in an endless order, and cut into micro-batches."""
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_ext.data.batches import Batch
from megatron_ext.data.order import permutation
from megatron_ext.train.engine import Engine
from megatron_ext.train.objective import Objective
from rlhf.experience import Assembler, Plan, Sequence_, gather, plan


@dataclass(frozen=True)
class Ranked:
    """K responses to a prompt.

    Attributes:
        sequences: prompt and response of each. ranks: 0 is best, equal ranks are a tie.
        margin: by which the better one's reward has to lead, None = the stage's. demonstrations: which of them a person (or the source) gave.
    """

    sequences: tuple[Sequence_, ...]
    ranks: tuple[int, ...]
    margin: float | None = None
    demonstrations: tuple[int, ...] = ()

    @property
    def pairs(self) -> "list[Ranked]":
        """Each decided pair as a ranking of two, the better one first."""
        order = [(i, j) for i in range(len(self.ranks)) for j in range(len(self.ranks)) if self.ranks[i] < self.ranks[j]]
        return [Ranked((self.sequences[i], self.sequences[j]), (0, 1), self.margin) for i, j in order]


def choose(items: Sequence[Ranked], *, first: int, count: int, seed: int) -> list[Ranked]:
    """Items first .. first + count of an endless order that takes each once an epoch."""
    orders: dict[int, np.ndarray] = {}
    found = []
    for number in range(first, first + count):
        epoch, place = divmod(number, len(items))
        if epoch not in orders:
            orders[epoch] = permutation(len(items), seed, epoch, "rankings")
        found.append(items[int(orders[epoch][place])])
    return found


class Cut:
    """Rankings as micro-batches of one engine: the responses of a prompt lie in one of them, each passes the model once."""

    def __init__(self, engine: Engine, items: Sequence[Ranked], *, budget: int, margin: float = 0.0):
        self.engine, self._items, self._margin = engine, items, margin
        self.sequences = [sequence for item in items for sequence in item.sequences]
        self._owner = [number for number, item in enumerate(items) for _ in item.sequences]
        self._ranks = [rank for item in items for rank in item.ranks]
        dp = engine.groups.dp
        self.plan: Plan = plan([len(sequence.tokens) for sequence in self.sequences], range(len(self.sequences)), budget=budget, dp_rank=dp.rank(),
                               dp_size=dp.size(), groups=self._owner)
        self._assembler = Assembler(engine, self.sequences)

    def batches(self, **more: Sequence[float]) -> list[Batch]:
        """more: numbers of each sequence, as further fields fp32 [sequences of the micro-batch]."""
        fields = []
        for part in self.plan.micro_batches:
            owners = [self._owner[number] for number in part]
            begins = [place for place, owner in enumerate(owners) if place == 0 or owner != owners[place - 1]]
            margins = [self._items[owners[place]].margin for place in begins]
            fields.append({
                "prompts": torch.tensor([*begins, len(part)] if part else [0], dtype=torch.int32),
                "ranks": torch.tensor([self._ranks[number] for number in part], dtype=torch.int64),
                "margins": torch.tensor([self._margin if margin is None else margin for margin in margins], dtype=torch.float32),
                **{name: torch.tensor([float(column[number]) for number in part], dtype=torch.float32) for name, column in more.items()},
            })
        return self._assembler.batches(self.plan, fields)

    def scores(self, objective: Objective) -> Tensor:
        """fp32 [sequences] on the CPU, on every rank: what the objective scores of each. Collective."""
        found = self.engine.collect(self.batches(), objective)
        return gather(self.engine, self.plan, found, range(len(self.sequences) + 1))
