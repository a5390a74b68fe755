"""The cast of an on-policy run: who is on the ranks, who is awake in which phase, and what a checkpoint holds of them.

    policy      trains and generates. In a checkpoint its tensors have the names that they have in any other, so that `generate` reads it.
    critic      trains; its tensors are under `critic.`
    reference   the policy that the run started from. With LoRA it is the policy without its adapters, and costs nothing.
    rewards     reward models; they and the reference are named in the record with their hashes, and found again on a resume.
    average     exponential moving average of the policy's weights (fp32), under `ema.`
    rollout     the policy's weights in another layout, where `rollout_layout` asks for one; they are moved there before each rollout.
"""
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

from megatron_ext import checkpoint
from megatron_ext.config.schema import Config
from megatron_ext.errors import UserError
from megatron_ext.models import lora
from megatron_ext.parallel.reshard import Reshard
from megatron_ext.platform import Platform
from megatron_ext.train.engine import Engine
from megatron_ext.train.stage import layout_of
from megatron_ext.train.start import same_tokenizer, scalar_checkpoint
from megatron_ext.train.weights import as_average, averaged
from rlhf.judge import Judge
from rlhf.roles import Identity, Ledger, Role


class Cast:
    """The roles. Made without models; `build` makes them.

    Args:
        tokenizer: sha256 of the policy's. critic: whether the algorithm has one.
    """

    def __init__(self, config: Config, platform: Platform, *, vocab_size: int, tokenizer: str, critic: bool):
        self.config, self._platform, self._vocab_size, self._wants_critic = config, platform, vocab_size, critic
        self.layout = layout_of(config)
        rewards = config.rewards
        self._reward_paths = [scalar_checkpoint("rewards.models", path, config.run.dir) for path in rewards.models]
        self._critic_path = None
        if critic:
            self._critic_path = scalar_checkpoint("critic.load", config.critic.load, config.run.dir) if config.critic.load else self._reward_paths[0]
        for path in [*self._reward_paths, *([self._critic_path] if critic else [])]:
            same_tokenizer("rewards.models", path, tokenizer)
        self._reference_path: Path | None = None
        self._from_average = config.checkpoint.average  # what the run began with
        self.critic: Role | None = None
        self.ledger = Ledger()
        self._average: dict[str, torch.Tensor] = {}
        self._functions = None
        if rewards.functions and dist.get_rank() == 0:
            from rlhf.rewards import Functions

            self._functions = Functions(rewards)

    def build(self) -> None:
        config, common = self.config, {"vocab_size": self._vocab_size, "ledger": self.ledger}
        self.policy = Role(config, self._platform, name="policy", key="checkpoint.start", train=True, lora=True, **common)
        self._adapters = config.lora.rank > 0
        self._reference = None if self._adapters else Role(config, self._platform, name="reference", key="checkpoint.start", placement=config.reference_layout, **common)
        self._rollout = None
        if layout_of(config, config.rollout_layout) != self.layout:
            self._rollout = Role(config, self._platform, name="rollout", key="rollout_layout", placement=config.rollout_layout, lora=True, **common)
            self._move = Reshard(self.policy.engine, self._rollout.engine)
        if self._wants_critic:
            self.critic = Role(config, self._platform, name="critic", key="critic.load", placement=config.critic_layout, source=self._critic_path, train=True,
                               head="scalar", optim=(config.critic.lr, config.critic.min_lr), **common)
        models = []
        for number, path in enumerate(self._reward_paths):
            role = Role(config, self._platform, name=f"reward{number or ''}", key="rewards.models", placement=config.reward_layout, source=path, head="scalar", **common)
            role.load(path)
            models.append(role)
        self.judge = Judge(config, models, self._functions)
        self.models = models

    # ------------------------------------------------------------ who is awake

    @contextmanager
    def generating(self) -> Iterator[Engine]:
        """The engine that rollouts come from, on the policy's newest weights."""
        if self._rollout is None:
            with self.policy.awake() as engine:
                yield engine
            return
        with self._rollout.awake() as target:
            with self.policy.awake():
                self._move.run()
            yield target

    @contextmanager
    def reference(self) -> Iterator[Engine]:
        if self._reference is not None:
            with self._reference.awake() as engine:
                yield engine
            return
        with self.policy.awake() as engine, lora.disabled(engine.models):
            yield engine

    def close(self) -> None:
        if self._functions is not None:
            self._functions.close()

    # ------------------------------------------------------------ average

    def average(self) -> None:
        """Moves the average towards the policy's weights: ema <- d ema + (1 - d) weights."""
        decay = self.config.ppo.ema
        if decay is None:
            return
        with self.policy.awake() as engine, engine.complete_weights(), torch.no_grad():
            for chunk, name, piece in self._weights():
                self._average[chunk, name].lerp_(piece.data.detach().float(), 1 - decay)

    def _weights(self) -> Iterator[tuple[str, str, ShardedTensor | ShardedTensorFactory]]:
        """(chunk, name, piece) of every weight of the policy on this rank."""
        for chunk, pieces in self.policy.engine.sharded_state(loading=False, weights_only=True).items():
            for name, piece in pieces.items():
                if averaged(piece):
                    yield chunk, name, piece

    def _begin_average(self) -> None:
        if self.config.ppo.ema is not None:
            with self.policy.awake():
                self._average = {(chunk, name): piece.data.detach().float().clone() for chunk, name, piece in self._weights()}

    def _average_state(self) -> dict:
        """The averages, as the policy's weights are in its own state, in fp32."""
        weights: dict[str, dict] = {}
        for chunk, name, piece in self._weights():
            weights.setdefault(chunk, {})[name] = (piece, self._average[chunk, name])
        return as_average(weights)

    # ------------------------------------------------------------ state

    @contextmanager
    def complete(self) -> Iterator[None]:
        with (self.policy.awake() as policy, policy.complete_weights(), self.critic.awake() if self.critic else nullcontext() as critic,
              critic.complete_weights() if critic else nullcontext()):
            yield

    def state(self, *, loading: bool, sharding: str | None = None) -> dict:
        """Call inside `complete`."""
        state = self.policy.engine.sharded_state(loading=loading, sharding=sharding)
        if self.critic is not None:
            critic = self.critic.engine.sharded_state(loading=loading, sharding=sharding)
            add_prefix_for_sharding(critic, "critic.")
            state["critic"] = critic
        if self.config.ppo.ema is not None:
            if not self._average:
                self._begin_average()
            state["ema"] = self._average_state()
        return state

    def load(self, state: dict, identities: dict) -> None:
        """Takes the state of a resume, and the roles that do not change from where they were. Raises UserError where one is another now."""
        critic, average = state.pop("critic", None), state.pop("ema", None)
        self.policy.engine.load_state(state)
        if critic is not None:
            self.critic.engine.load_state(critic)
        for chunk, weights in (average or {}).items():
            for name, value in weights.items():
                self._average[chunk, name].copy_(value)
        stored = identities["reference"]
        path = checkpoint.find(stored["path"], Path(self.config.run.dir) / "checkpoints", key="checkpoint.start")
        Identity.of(path).check("checkpoint.start", stored)
        self._from_average = bool(identities.get("average"))
        self._take_reference(path)
        if len(self._reward_paths) != len(identities["rewards"]):
            named = "[" + ",".join(self.config.rewards.models) + "]"
            raise UserError("rewards.models", named, f"this run began with {len(identities['rewards'])}: "
                                                     f"[{','.join(known['path'] for known in identities['rewards'])}]")
        for path, known in zip(self._reward_paths, identities["rewards"]):
            Identity.of(path).check("rewards.models", known)
        self._rest()

    def start(self, source: Path) -> None:
        self.policy.load(source, average=self._from_average)
        self._take_reference(source)
        if self.critic is not None:
            self.critic.load(self._critic_path)
        self._begin_average()
        self._rest()

    def _take_reference(self, path: Path) -> None:
        self._reference_path = path
        if self._reference is not None:
            self._reference.load(path, average=self._from_average)

    def _rest(self) -> None:
        for role in (self.policy, self.critic, self._reference, self._rollout):
            if role is not None:
                role.rest()

    def identities(self) -> dict:
        """What the record says of the roles: JSON."""
        return {"reference": vars(Identity.of(self._reference_path)), "average": self._from_average, "rewards": [vars(Identity.of(path)) for path in self._reward_paths]}
