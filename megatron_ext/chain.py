"""The chain of stages: each has its folder in `run.dir` and starts from the one before. What `run` does one after the other here and `submit` leaves to
a cluster's queue is told in the same words. No torch.
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.cli import recipe
from megatron_ext.config.compose import compose
from megatron_ext.config.ranges import check_values
from megatron_ext.config.schema import Config
from megatron_ext.errors import UserError

ASIDE = ("reward",)  # stages that the next one does not start from


def key_of(word: str) -> str:
    """The key of an override."""
    return word.lstrip("+").partition("=")[0]


@dataclass(frozen=True)
class Chain:
    """The configuration (of the first stage), and the words that were typed."""

    config: Config
    words: tuple[str, ...]

    def check(self) -> None:
        """Every stage's words are read before the first is started: a mistake in the last one is told now. Raises UserError."""
        known = tuple(recipe.read()["stages"])
        stages = self.config.run.stages
        for stage in stages:
            if stage not in known:
                raise UserError("run.stages", stage, f"is no stage of the job; it has {', '.join(known)}")
            for error in check_values(compose((f"stage={stage}", *recipe.with_defaults(self.words, stage)))):
                raise UserError(error.key, error.value, f"{error.reason} (stage {stage})")
        if not stages or list(stages) != sorted(set(stages), key=known.index):
            raise UserError("run.stages", ",".join(stages) or "[]", f"must be some of {', '.join(known)}, each once and in this order")
        if "ppo" in stages and "reward" not in stages:
            raise UserError("run.stages", ",".join(stages), "ppo needs the reward model of the stage reward")

    def folder(self, stage: str) -> Path:
        """Where a stage runs."""
        return Path(self.config.run.dir) / stage

    def parent(self, stage: str) -> str | None:
        """The stage that this one starts from."""
        before = [name for name in self.config.run.stages[: self.config.run.stages.index(stage)] if name not in ASIDE]
        return before[-1] if before else None

    def reads(self, stage: str) -> list[str]:
        """The stages whose runs this one needs: its parent, and of ppo the reward model's."""
        parent = self.parent(stage)
        return [*([parent] if parent else ()), *(("reward",) if stage == "ppo" else ())]

    def stage_words(self, stage: str, data: Path, domain: Callable[[], Path]) -> list[str]:
        """What `train stage=...` is told.

        Args:
            data: the prepared directory. domain: makes that of adapt's own text, where nobody has named one.
        """
        words = self.read_words(stage, data)
        if stage == "adapt":
            words = self._with_domain(words, data, domain)
        if parent := self.parent(stage):
            words.append(f"checkpoint.start={self.folder(parent)}")
        if stage == "ppo" and not any(key_of(word) == "rewards.models" for word in words):
            words.append(f"rewards.models=[{self.folder('reward')}]")
        if not any(key_of(word) == "checkpoint.load" for word in words):
            words.append("checkpoint.load=auto")
        return words

    def read_words(self, stage: str, data: Path, drop: Sequence[str] = ()) -> list[str]:
        """The words of a stage's commands, with the prepared data in place of what it was made from."""
        replaced = ("data.path", "input", "output", "run.dir", "run.stages", *drop)
        kept = [word for word in recipe.with_defaults(self.words, stage) if key_of(word) not in replaced]
        return [*kept, f"data.path={data}", f"run.dir={self.folder(stage)}"]

    def _with_domain(self, words: list[str], data: Path, domain: Callable[[], Path]) -> list[str]:
        """The words of adapt with its text: what was named, or the domain's beside the general one."""
        own, keys = recipe.typed(self.words, "adapt"), ("data.path", "data.paths")
        named, rest = [word for word in own if key_of(word) in keys], [word for word in words if key_of(word) not in keys]
        if not named:
            return [*rest, f"data.paths=[{domain()},{data}]"]
        weighted = any(key_of(word) == "data.weights" for word in own)  # the recipe's are of its own two texts
        return [*(word for word in rest if weighted or key_of(word) != "data.weights"), *named]
