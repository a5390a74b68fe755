"""What responses are worth: reward models (one, or an ensemble) and reward functions, weighted and added.

    score = model_weight x mean of the models + sum of weight x function,  clipped to [-rewards.clip, rewards.clip];
    a response that does not end by itself gets `rewards.missing_eos` instead, where that is set.
"""
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.config.schema import Config
from rlhf.experience import Assembler, gather, plan
from rlhf.objectives import Rewards
from rlhf.roles import Role
from rlhf.rollout import Rollouts


@dataclass(frozen=True)
class Judgement:
    """Attributes:
        scores: fp32 [n].
        numbers: means of the parts (`reward_model`, `reward_<function>`), `reward_disagreement` of an ensemble, `failed_rewards`.
        failures: (function, reason, how many) for the events.
    """

    scores: Tensor
    numbers: dict[str, float]
    failures: list[tuple[str, str, int]] = field(default_factory=list)


class Judge:
    """The rewards of a run.

    Args:
        models: reward models. functions: what `rlhf.rewards` made of the configuration, on rank 0; elsewhere None.
    """

    def __init__(self, config: Config, models: Sequence[Role], functions):
        self._config, self._models, self._functions = config, models, functions

    def __call__(self, rollouts: Rollouts) -> Judgement:
        """Collective over all ranks; the same on all of them."""
        settings, count = self._config.rewards, len(rollouts.completions)
        scores, numbers, failures = torch.zeros(count), {}, []
        if self._models:
            found = torch.stack([scalar_scores(role, self._config, rollouts) for role in self._models])
            scores += settings.model_weight * found.mean(0)
            numbers["reward_model"] = float(found.mean(dtype=torch.float64))
            if len(found) > 1:
                numbers["reward_disagreement"] = float(found.std(0).mean(dtype=torch.float64))
        if settings.functions:
            values, failures = self._ask(rollouts)
            weights = settings.weights or (1.0,) * len(settings.functions)
            for (name, column), weight in zip(values.items(), weights, strict=True):
                column = torch.tensor(column, dtype=torch.float32)
                scores += weight * column
                numbers[f"reward_{name}"] = float(column.mean(dtype=torch.float64))
            numbers["failed_rewards"] = sum(times for *_, times in failures)
        if settings.clip is not None:
            scores = scores.clamp(-settings.clip, settings.clip)
        if settings.missing_eos is not None:
            scores = torch.where(torch.tensor(rollouts.ended), scores, torch.tensor(settings.missing_eos))
        return Judgement(scores, numbers, failures)

    def _ask(self, rollouts: Rollouts) -> tuple[dict[str, list[float]], list[tuple[str, str, int]]]:
        """Functions run once, on rank 0: a function may draw random numbers, call a service, or take long."""
        box: list = [None]
        if dist.get_rank() == 0:
            try:
                box[0] = self._functions(
                    [question.text for question in rollouts.questions], [one.text or "" for one in rollouts.completions],
                    [question.record for question in rollouts.questions], [question.reference for question in rollouts.questions],
                )
            except Exception as error:  # noqa: BLE001 - the other ranks wait: they have to hear of it
                box[0] = error
        dist.broadcast_object_list(box, src=0)
        if isinstance(box[0], Exception):
            raise box[0]
        return box[0]


def scalar_scores(role: Role, config: Config, rollouts: Rollouts) -> Tensor:
    """fp32 [n] on the CPU: what a reward model says of each response's last token. Collective."""
    sequences = rollouts.sequences
    with role.awake() as engine:
        dp, lengths = engine.groups.dp, [len(sequence.tokens) for sequence in sequences]
        planned = plan(lengths, range(len(sequences)), budget=config.rollout.batch_tokens, dp_rank=dp.rank(), dp_size=dp.size())
        found = engine.collect(Assembler(engine, sequences).batches(planned), Rewards())
        return gather(engine, planned, found, range(len(sequences) + 1))
