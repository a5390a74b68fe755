"""The models of RLHF on the same ranks: policy, reference, reward models, critic, each with its own size and layout.

InstructGPT trained a 175B policy with a 6B reward model and value function: a role's sizes come from its checkpoint, its layout from
`reference_layout`, `reward_layout`, `critic_layout`; all span all ranks. Every role is an `Engine`: there is no other one.
"""
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_ext import checkpoint
from megatron_ext.config.schema import Config, LoraConfig, PlacementConfig
from megatron_ext.config.validate import check_layout
from megatron_ext.errors import UserError
from megatron_ext.platform import Platform
from megatron_ext.train.engine import Engine
from megatron_ext.train.offload import Offload, device_bytes
from megatron_ext.train.stage import layout_of
from megatron_ext.train.start import stored_config
from megatron_ext.train.weights import load_weights


@dataclass(frozen=True)
class Identity:
    """A checkpoint that a role came from: what a resume must find again."""

    path: str
    hash: str

    @classmethod
    def of(cls, path: Path) -> "Identity":
        return cls(str(Path(path).absolute()), checkpoint.checkpoint_hash(path))

    def check(self, key: str, stored: dict | None) -> None:
        """Raises UserError where the run began with another one."""
        if stored is not None and stored["hash"] != self.hash:
            raise UserError(key, self.path, f"is not what this run began with ({stored['path']}, hash {stored['hash'][:12]}...): its hash is "
                                            f"{self.hash[:12]}...; KL and rewards would be measured against another model")


class Ledger:
    """Bytes of the device that the models of a run hold on this rank. Attributes: roles, peak (the most at the start of any phase)."""

    def __init__(self):
        self.roles: list[Role] = []
        self.peak = 0
        self._known: dict[tuple, int] = {}

    def now(self) -> dict[str, int]:
        """By model. What is off-loaded holds nothing."""
        return {role.name: sum(device_bytes(role.engine).values()) for role in self.roles}

    def note(self) -> None:
        """Looks at a model again (every tensor of it: tens of milliseconds) only when it has moved, or its optimizer has made its moments."""
        whole = 0
        for number, role in enumerate(self.roles):
            state = (number, *role.offload.state())
            if state not in self._known:
                self._known[state] = sum(device_bytes(role.engine).values())
            whole += self._known[state]
        self.peak = max(self.peak, whole)


class Role:
    """One model. Attributes: name, engine, offload.

    Args:
        name: what the ledger and errors call it. ledger: where it is counted.
        placement: its layout, where that is not the policy's.
        source: the checkpoint that its sizes are of; None = the policy's own sizes.
        optim: (lr, min_lr) for a role that trains beside the policy.
    """

    def __init__(self, config: Config, platform: Platform, *, name: str, ledger: Ledger, key: str, vocab_size: int, placement: PlacementConfig | None = None,
                 source: Path | None = None, train: bool = False, head: str = "vocabulary", optim: tuple[float, float] | None = None,
                 lora: bool = False):
        layout = layout_of(config, placement)
        model = config.model
        if source is not None:
            stored = stored_config(source, key)
            model = replace(stored.model, hidden_dropout=0.0, attention_dropout=0.0)  # it is asked, or learns from what it said
        parallel = replace(config.parallel, tp=layout.tp, pp=layout.pp, vpp=layout.vpp, sp=layout.sp)
        own = replace(config, model=model, parallel=parallel, lora=config.lora if lora else LoraConfig())
        if optim is not None:
            own = replace(own, optim=replace(config.optim, lr=optim[0], min_lr=optim[1]))
        check_layout(own)
        self.engine = Engine(own, layout, platform, vocab_size=vocab_size, train=train, head=head)
        self.name, self._ledger, self._moves = name, ledger, config.ppo.offload
        self.offload = Offload(self.engine, name)
        ledger.roles.append(self)

    def load(self, source: Path, *, average: bool = False) -> None:
        """Takes a checkpoint's weights, and a reward model's bias with them. Collective."""
        load_weights(self.engine, source, average=average)
        bias = checkpoint.read_record(source).get("reward_bias", 0.0)
        for model in self.engine.models:
            if bias and model.scalar and model.post_process:
                model.value_head.bias.data.add_(bias)
        if bias and self.engine.optimizer is not None:
            self.engine.optimizer.reload_model_params()
        self.rest()

    @contextmanager
    def awake(self) -> Iterator[Engine]:
        """Inside, the model is on the device. With `ppo.offload` it waits in host memory outside."""
        with self.offload.needed() as engine:
            self._ledger.note()
            yield engine

    def rest(self) -> None:
        if self._moves:
            self.offload.to_host()
