"""The models of PPO and its kin, which lie on the same ranks: their memory together, and the time of an iteration. No torch.

Trained are the policy and, in ppo, the critic; the reference and the reward model hold weights alone, and what is `ppo.offload`ed waits in host memory.
Generation holds keys and values of `generate.batch_size` responses a data rank; a decoding step reads every weight once, so that it is bound by memory:
seconds a token = (weights + keys and values) / bandwidth.
"""
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from megatron_ext.config import sizes, stages
from megatron_ext.config.geometry import Grid, Iteration
from megatron_ext.config.placement import placed
from megatron_ext.config.schema import Config
from megatron_ext.plan.buffers import BYTES
from megatron_ext.plan.calibration import Calibration
from megatron_ext.plan.memory import RankMemory, margin, rank_memory
from megatron_ext.plan.timing import Clock

TRAINED = ("policy", "critic")


@dataclass(frozen=True)
class Member:
    """A model on the ranks: bytes that it holds all the time, and the most that it needs beside them while it is at work."""

    role: str
    trained: bool
    parameters: int
    held: float
    working: float

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def as_text(config: Config) -> Config:
    """The configuration with micro-batches as tokens: one sequence of rollout.batch_tokens, as packed micro-batches are."""
    return replace(config, data=replace(config.data, sequence_length=config.rollout.batch_tokens), train=replace(config.train, micro_batch_size=1))


def members(config: Config, vocab: int) -> list[Member]:
    """Every model of the stage, as large as the policy, on the pipeline stage where it needs most. `vocab`: words that exist."""
    found = []
    for role in stages.models(config):
        trained = role in TRAINED
        own = as_text(placed(config, role))
        head = "scalar" if role in ("reward", "critic") or config.stage.name == "reward" else "vocabulary"
        if not trained:
            own = replace(own, lora=replace(own.lora, rank=0))
        most: RankMemory = max((rank_memory(own, stage, vocab, head=head, train=trained) for stage in {0, own.parallel.pp - 1}), key=lambda one: one.total)
        working = most.activations + most.logits + most.buffers + (_cache(own) if role in ("policy", "rollout") and config.stage.name in stages.ONLINE else 0.0)
        held = most.weights + most.gradients + most.optimizer + (4 * most.parameters if role == "policy" and config.ppo.ema is not None else 0)
        found.append(Member(role, trained, most.parameters, float(held), working))
    return found


def _cache(config: Config) -> float:
    """Keys and values of a generation batch on this rank."""
    one, model = Iteration.of(config), config.model
    length = min(one.prompt_tokens + one.response_tokens, config.rollout.batch_tokens)
    width = 2 * sizes.head_dim(model) * sizes.query_groups(model) / config.parallel.tp
    return model.num_layers / config.parallel.pp * width * length * config.generate.batch_size * BYTES[config.precision.dtype]


def together(config: Config, vocab: int) -> tuple[float, str]:
    """`fullest_moment` of the stage's models."""
    return fullest_moment(config, members(config, vocab))


def fullest_moment(config: Config, found: Sequence[Member]) -> tuple[float, str]:
    """Bytes of the fullest moment on a rank, and what it is. One model works at a time; with `ppo.offload` only that one is there."""
    free = margin(config)
    if config.ppo.offload:
        worst = max(found, key=lambda one: one.held + one.working)
        return worst.held + worst.working + free, f"the {worst.role} alone, the others wait in host memory"
    worst = max(found, key=lambda one: one.working)
    return sum(one.held for one in found) + worst.working + free, f"{', '.join(one.role for one in found)} together, the {worst.role} at work"


@dataclass(frozen=True)
class IterationTime:
    """Seconds of an iteration: generation, scoring (old and reference log-probabilities, rewards, values), training."""

    generation: float
    scoring: float
    training: float

    @property
    def seconds(self) -> float:
        return self.generation + self.scoring + self.training


def iteration_time(config: Config, calibration: Calibration, vocab: int) -> IterationTime:
    """An iteration of ppo, grpo or rloo with responses of full length, all models as large as the policy."""
    one, grid = Iteration.of(config), Grid.of(config)
    clock = Clock(as_text(config), calibration, vocab)
    stage, head = clock.layer().times(sizes.layers(config.model) / config.parallel.pp), clock.head()
    forward, both = sum(stage.forward.values()) + sum(head.forward.values()), stage.total + head.total
    batches = math.ceil(one.tokens / grid.dp / config.rollout.batch_tokens)
    weights = sizes.parameters(config.model, vocab) / (config.parallel.tp * config.parallel.pp) * BYTES[config.precision.dtype]
    rounds = math.ceil(one.episodes / grid.dp / config.generate.batch_size)
    decoding = (weights + _cache(config) / 2) / clock.memory * one.response_tokens * rounds * config.parallel.pp
    roles = stages.models(config)
    scored = 1 + sum(role in roles for role in ("reference", "reward", "critic"))
    trained = 1 + ("critic" in roles)
    return IterationTime(decoding + forward * batches, scored * forward * batches, trained * both * batches * one.epochs)
