"""From scored rollouts to gradients: which episodes make a minibatch, and the passes of policy and critic over them.

The first pass cuts minibatches and micro-batches exactly as the scoring of old logprobs did, so that the ratio of its first step is 1 to
the bit. Counts are of the whole minibatch over all ranks.
"""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.config.schema import Config
from megatron_ext.data.order import permutation
from megatron_ext.data.samples import Samples
from megatron_ext.models.truncated import Kept
from megatron_ext.train.engine import Engine, StepResult
from megatron_ext.train.objective import Objective
from rlhf.experience import Assembler, Plan, Sequence_, plan
from rlhf.policy_losses import token_weights


@dataclass(frozen=True)
class Minibatch:
    """An optimizer step's episodes, and how they are cut for one engine. number: tells its micro-batches from others'."""

    number: int
    episodes: tuple[int, ...]
    plan: Plan


def passes(count: int, config: Config, *, iteration: int, reshuffle: bool = True) -> list[list[tuple[int, ...]]]:
    """Episodes of each minibatch of each pass: [epochs][minibatches]. With `reshuffle` a new cut each pass, else a new order of the same."""
    settings, found = config.ppo, []
    size = count // settings.minibatches
    for epoch in range(settings.epochs):
        order = permutation(count, config.train.seed, iteration * settings.epochs + (epoch if reshuffle else 0), "episodes")
        parts = [tuple(sorted(order[start : start + size].tolist())) for start in range(0, size * settings.minibatches, size)]
        if epoch and not reshuffle:
            parts = [parts[int(i)] for i in permutation(len(parts), config.train.seed, iteration * settings.epochs + epoch, "minibatches")]
        found.append(parts)
    return found


class Trainer:
    """Cuts minibatches for one engine, and runs objectives over them.

    Args:
        offsets: [episodes + 1], of the response tokens.
        extra: sequences that are no episodes (of the PTX mix); their numbers follow the episodes'. parts: how many steps share them out.
    """

    def __init__(self, engine: Engine, config: Config, sequences: Sequence[Sequence_], offsets: Sequence[int], extra: Sequence[Sequence_] = (), *,
                 parts: int = 1):
        self.engine, self.config, self.offsets = engine, config, offsets
        self._sequences = [*sequences, *extra]
        self._lengths = [len(sequence.tokens) for sequence in self._sequences]
        self._assembler = Assembler(engine, self._sequences)
        size = len(extra) // parts
        self._parts = [range(start, start + size) for start in range(len(sequences), len(self._sequences), size)] if extra else []
        self._extra = [self._plan(part) for part in self._parts]
        if extra:  # scoring pads as training will, so that both see the same numbers
            self._assembler.least = max(self._assembler.length(micro) for planned in self._extra for micro in planned.micro_batches)

    def cut(self, number: int, episodes: Sequence[int]) -> Minibatch:
        return Minibatch(number, tuple(episodes), self._plan(episodes))

    def _plan(self, chosen: Sequence[int]) -> Plan:
        dp = self.engine.groups.dp
        return plan(self._lengths, chosen, budget=self.config.rollout.batch_tokens, dp_rank=dp.rank(), dp_size=dp.size())

    def places(self, part: Sequence[int]) -> Tensor:
        """int64: where the response tokens of a micro-batch's sequences lie among all."""
        found = [torch.arange(self.offsets[number], self.offsets[number + 1]) for number in part]
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)

    def _fields(self, minibatch: Minibatch, tokens: Mapping[str, Tensor]) -> list[dict]:
        """Each micro-batch's part of `tokens`, and its `number`."""
        fields = []
        for micro, part in enumerate(minibatch.plan.micro_batches):
            places = self.places(part)
            fields.append({name: flat[places] for name, flat in tokens.items()} | {"number": (minibatch.number, micro)})
        return fields

    def collect(self, minibatch: Minibatch, objective: Objective, tokens: Mapping[str, Tensor] | None = None) -> list:
        """`engine.collect` over the minibatch's micro-batches. tokens: [response tokens of all episodes] each, by the field's name."""
        return self.engine.collect(self._assembler.batches(minibatch.plan, self._fields(minibatch, tokens or {})), objective)

    def step(self, minibatch: Minibatch, objective: Objective, tokens: Mapping[str, Tensor], *, lr: float, step: int, over: str = "tokens",
             ptx: float = 0.0, part: int = 0) -> StepResult:
        """One optimizer step.

        Args:
            tokens: fp32 [response tokens of all episodes] each, by the field's name.
            over: tokens | sequences, see `policy_losses.token_weights`.
            ptx: coefficient of the extra sequences' loss. part: whose turn it is.
        """
        fields = self._fields(minibatch, tokens)
        for found, episodes in zip(fields, minibatch.plan.micro_batches):
            cu = np.cumsum([0, *(self.offsets[number + 1] - self.offsets[number] for number in episodes)])
            weights, count = token_weights(torch.tensor(cu, dtype=torch.int32), over)
            found |= {"weights": weights, "count": count}
        planned = minibatch.plan
        if ptx:
            whole = self._count(minibatch.episodes, over)
            labels = sum(self._sequences[number].response for number in self._parts[part])
            fields += [{"ptx": ptx * whole / labels}] * len(self._extra[part].micro_batches)
            planned = Plan(planned.micro_batches + self._extra[part].micro_batches)
        return self.engine.step(self._assembler.batches(planned, fields), lr=lr, step=step, objective=objective)

    def _count(self, episodes: Sequence[int], over: str) -> int:
        """What the objective counts over all ranks."""
        lengths = [self.offsets[number + 1] - self.offsets[number] for number in episodes]
        return sum(lengths) if over == "tokens" else sum(length > 0 for length in lengths)


def ptx_sequences(samples: Samples, *, first: int, count: int) -> list[Sequence_]:
    """Samples of plain text as sequences whose every token is predicted."""
    return [Sequence_(samples[number].tokens, 1) for number in range(first, first + count)]


def kept_elsewhere(keep: Mapping[tuple[int, int], Kept], source: Trainer, target: Trainer, minibatches: Sequence[Sequence[int]]) -> Mapping:
    """`keep` of the micro-batches of one engine, as those of another engine are cut: a reference in another layout is asked about the same
    words. Collective over the ranks of `source`. All bits are then on every rank, words / 8 bytes a token."""
    if source.engine.layout == target.engine.layout:
        return keep
    whole = torch.zeros(source.offsets[-1], -(-source.engine.vocab_size // 8), dtype=torch.uint8, device=source.engine.platform.device)
    if source.engine.groups.tp.rank() == 0:
        for number, episodes in enumerate(minibatches):
            for micro, part in enumerate(source.cut(number, episodes).plan.micro_batches):
                if (number, micro) in keep:  # on the last pipeline stage
                    whole[source.places(part)] = keep[number, micro].bits
    dist.all_reduce(whole, group=source.engine.groups.intra_dist_opt)  # every other rank adds zero
    return {
        (number, micro): Kept(None, whole[target.places(part)]) for number, episodes in enumerate(minibatches)
        for micro, part in enumerate(target.cut(number, episodes).plan.micro_batches)
    }
