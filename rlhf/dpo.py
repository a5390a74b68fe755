"""dpo: direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290). Rankings train the policy itself, without rewards and rollouts.

    loss of a pair = -log sigmoid(beta ((log p(w) - log p_ref(w)) - (log p(l) - log p_ref(l))))                     (preferences.py)

A step takes `train.global_batch_size` pairs; a ranking of K responses gives all its decided pairs. Settings: `ppo.beta`, `ppo.label_smoothing`.
The reference is the policy that the run started from (with LoRA: without its adapters).
"""
from contextlib import contextmanager
from pathlib import Path

from megatron_ext import checkpoint
from megatron_ext.checkpoint.ancestry import chain
from megatron_ext.config.schema import Config
from megatron_ext.errors import UserError
from megatron_ext.models import lora
from megatron_ext.platform import Platform
from megatron_ext.train.life import Life
from megatron_ext.train.loop import Outcome, run
from megatron_ext.train.schedule import lr_at
from megatron_ext.train.stage import Position, StepReport, layout_of
from megatron_ext.train.stop import Best, Stop
from rlhf.objectives import PreferenceObjective
from rlhf.prompts import Rankings, prepare
from rlhf.ranked import Cut, Ranked, choose
from rlhf.report import write_report
from rlhf.roles import Identity, Ledger, Role


def train(config: Config) -> Outcome:
    """Runs the stage on this rank. Collective over all ranks of the job. Raises UserError, RunFailed."""
    return run(config, DirectPreference, prepare)


class DirectPreference:
    """A stage (megatron_ext/train/stage.py)."""

    training_flops = False
    samples_move_on = True
    life = Life()

    def __init__(self, config: Config, platform: Platform):
        self.config, self.platform, self.layout, self.steps = config, platform, layout_of(config), config.train.steps
        self.data = Rankings(config)
        self.tokenizer, self.vocab_size, self.identity = self.data.file, self.data.vocab_size, self.data.identity
        self.training, self.held_out = ([pair for item in items for pair in item.pairs] for items in (self.data.training, self.data.held_out))
        if not self.training:
            raise UserError("chat.path", config.chat.path, "holds no ranking in which one response is better than another")
        self.validates = bool(self.held_out)
        self.best = Best("validation_loss") if config.checkpoint.best else None
        self.objective = PreferenceObjective(config.ppo)

    def build(self) -> None:
        common = {"key": "checkpoint.start", "vocab_size": self.vocab_size, "ledger": Ledger()}
        self.policy = Role(self.config, self.platform, name="policy", train=True, lora=True, **common)
        self.reference = None if self.config.lora.rank else Role(self.config, self.platform, name="reference", placement=self.config.reference_layout, **common)

    @contextmanager
    def _referring(self):
        if self.reference is not None:
            with self.reference.awake() as engine:
                yield engine
        else:
            with self.policy.awake() as engine, lora.disabled(engine.models):
                yield engine

    def _batches(self, items: list[Ranked]) -> tuple[Cut, list]:
        budget = self.config.rollout.batch_tokens
        with self._referring() as engine:
            reference = Cut(engine, items, budget=budget).scores(self.objective)
        cut = Cut(self.policy.engine, items, budget=budget)
        return cut, cut.batches(reference=reference.tolist())

    def step(self, position: Position) -> StepReport:
        config, count = self.config, self.config.train.global_batch_size
        cut, batches = self._batches(choose(self.training, first=position.samples, count=count, seed=config.data.seed))
        lr = lr_at(position.steps, config.optim, self.steps)
        with self.policy.awake() as engine:
            result = engine.step(batches, lr=lr, step=position.steps, objective=self.objective)
        return StepReport(
            result.loss, result.grad_norm, lr, samples=count, tokens=sum(len(sequence.tokens) for sequence in cut.sequences), applied=result.applied,
            searching=result.searching, numbers=_means(result.sums, ""),
        )

    def validate(self, position: Position) -> dict[str, float]:
        _, batches = self._batches(self.held_out)
        with self.policy.awake() as engine:
            total, pairs, sums = engine.measure(batches, self.objective)
        return {"validation_loss": total / max(pairs, 1), **_means(sums, "validation_")}

    def verdict(self, metrics: dict[str, float]) -> Stop | None:
        return None

    @contextmanager
    def complete(self):
        with self.policy.awake() as engine, engine.complete_weights():
            yield

    def state(self, *, loading: bool, sharding: str | None = None) -> dict:
        return self.policy.engine.sharded_state(loading=loading, sharding=sharding)

    def load(self, state: dict, record: dict) -> None:
        self.policy.engine.load_state(state)
        stored = record["reference"]
        path = checkpoint.find(stored["path"], Path(self.config.run.dir) / "checkpoints", key="checkpoint.start")
        Identity.of(path).check("checkpoint.start", stored)
        self._take(path, average=bool(stored.get("average")))

    def start(self, source: Path) -> None:
        average = self.config.checkpoint.average
        self.policy.load(source, average=average)
        self._take(source, average=average)

    def _take(self, source: Path, *, average: bool) -> None:
        self._source, self._from_average = source, average
        if self.reference is not None:
            self.reference.load(source, average=average)
        self.policy.rest()

    def report(self, run_dir: Path, chosen: Path | None) -> None:
        write_report(run_dir, title=f"{self.config.model.name}, {self.config.stage.name}", chain=chain(chosen) if chosen else ())

    def record(self) -> dict:
        return {"reference": vars(Identity.of(self._source)) | {"average": self._from_average}}

    def begins(self, position: Position, journal) -> None:
        self.data.tell(journal)

    def ends(self, position: Position, stop: Stop, journal) -> None:
        pass


def _means(sums: dict[str, float], prefix: str) -> dict[str, float]:
    pairs = max(sums["pairs"], 1.0)
    names = {"correct": "accuracy", "margin": "margin", "chosen_reward": "chosen_reward", "rejected_reward": "rejected_reward"}
    return {f"{prefix}{name}": sums[key] / pairs for key, name in names.items()}
