"""Who takes part in a stage: the models on the ranks, with the sizes that their checkpoints say, and the reward functions. The configuration alone
knows neither. No torch.
"""
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_ext import checkpoint
from megatron_ext.config import stages
from megatron_ext.config.placement import layout_key, misplaced, placed
from megatron_ext.config.schema import Config, ModelConfig, ParallelConfig
from megatron_ext.config.sizes import parameters
from megatron_ext.config.validate import ConfigErrors
from megatron_ext.errors import UserError
from megatron_ext.train.start import KEY, same_tokenizer, scalar_checkpoint, stored_config


@dataclass(frozen=True)
class Member:
    """A model on the ranks.

    Attributes:
        role: policy | reference | reward | critic | rollout.
        key, source: the configuration key and the checkpoint that its weights come from; None where another member's are used.
        model, vocab_size: its sizes. parallel: its layout.
    """

    role: str
    key: str
    source: Path | None
    model: ModelConfig
    vocab_size: int
    parallel: ParallelConfig
    ranks: int
    scalar: bool

    @property
    def parameters(self) -> int:
        """A scalar head has hidden + 1 numbers in the place of the vocabulary's."""
        if not self.scalar:
            return parameters(self.model, self.vocab_size)
        tied = parameters(self.model, self.vocab_size) - (0 if self.model.tied_embeddings else self.vocab_size * self.model.hidden_size)
        return tied + self.model.hidden_size + 1

    @property
    def layout(self) -> str:
        """TP 2 x DP 1 x PP 1, as megatron-core counts."""
        tp, pp = self.parallel.tp, self.parallel.pp
        sp = ", sequence parallel" if self.parallel.sp else ""
        return f"TP {tp} x DP {self.ranks // (tp * pp * self.parallel.cp)} x PP {pp}{sp}"


def members(config: Config, vocab: int) -> list[Member]:
    """The models of a stage that generates or refers to another; [] of another stage. Reward functions are looked at too.

    Raises:
        UserError, ConfigErrors: a reward function that cannot be asked; a checkpoint that is not there, is no reward model, or knows other words than the policy; a model that does not fit
            its layout.
    """
    if config.stage.name not in (*stages.ONLINE, "dpo"):
        return []
    if config.stage.name in stages.ONLINE and config.rewards.functions:
        from rlhf.rewards import check  # the front door is the one place that may name rooms above

        check(config.rewards)
    errors: list[UserError] = []
    found: list[Member] = []
    start = checkpoint.find(config.checkpoint.start, Path(config.run.dir) / "checkpoints", key=KEY, best=True)
    tokenizer = None if start is None else checkpoint.read_record(start).get("data", {}).get("tokenizer")
    for role in stages.models(config):
        for key, source in _sources(config, role):
            model, words = config.model, vocab
            if role in ("reward", "critic"):
                stored = stored_config(source, key)
                if tokenizer is not None:
                    same_tokenizer(key, source, tokenizer)
                model, words = stored.model, int(checkpoint.read_record(source)["vocab_size"])
                errors += misplaced(config, role, model)
            own = placed(config, role, model)
            found.append(Member(role, key, source, model, words, own.parallel, config.launch.ranks, role in ("reward", "critic")))
    if errors:
        raise errors[0] if len(errors) == 1 else ConfigErrors({str(error): error for error in errors}.values())
    return found


def _sources(config: Config, role: str) -> Iterator[tuple[str, Path | None]]:
    if role == "reward":
        for load in config.rewards.models:
            yield "rewards.models", scalar_checkpoint("rewards.models", load, config.run.dir)
    elif role == "critic":
        key, load = ("critic.load", config.critic.load) if config.critic.load else ("rewards.models", config.rewards.models[0])
        yield key, scalar_checkpoint(key, load, config.run.dir)
    else:
        yield layout_key(role), None
