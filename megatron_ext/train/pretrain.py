"""pretrain and adapt: plain text, from random weights or from a checkpoint's. What is learnt of it follows from the model's family (train/objective.py).

    data -> micro-batches -> engine.step
"""
import math
from pathlib import Path

from megatron_ext.config.geometry import steps_of
from megatron_ext.config.schema import Config
from megatron_ext.data.batches import micro_batches
from megatron_ext.data.build import dataset_tokenizer, ensure_prepared
from megatron_ext.data.objective import pretraining_samples
from megatron_ext.data.samples import Samples
from megatron_ext.errors import UserError
from megatron_ext.evaluate.split import evaluate_split
from megatron_ext.observe.report import write_report
from megatron_ext.platform import Platform
from megatron_ext.train import record as records
from megatron_ext.train.engine import Engine
from megatron_ext.train.life import Life
from megatron_ext.train.loop import Outcome, run
from megatron_ext.train.schedule import lr_at
from megatron_ext.train.stage import Position, StepReport, layout_of
from megatron_ext.train.stop import Best, Stop
from megatron_ext.train.weights import load_weights


def train(config: Config) -> Outcome:
    """Runs the stage on this rank. Collective over all ranks of the job. Raises UserError, RunFailed."""
    return run(config, Pretraining, lambda config: ensure_prepared(config.data))


class Pretraining:
    """The stage: one engine, and samples of fixed length. `sft` is a subclass with samples of its own."""

    training_flops = True
    samples_move_on = True
    life = Life()

    def __init__(self, config: Config, platform: Platform):
        self.config, self.platform, self.layout = config, platform, layout_of(config)
        self.data = self.datasets()
        self.validates = "validation" in self.data
        self.vocab_size = checked_vocabulary(config, self.data["train"])
        self.steps = steps_of(config)
        self.best = Best.of(config) if config.checkpoint.best else None
        self.engine: Engine

    def datasets(self) -> dict[str, Samples]:
        """train, and validation where it is looked at. Sets `tokenizer` and `identity`."""
        config = self.config
        validates = config.validation.every or config.validation.at_end
        data = pretraining_samples(config, ("train", "validation") if validates else ("train",))
        self.tokenizer, self.identity = dataset_tokenizer(config.data)[0], records.data_identity(config.data, config.model)
        return data

    def build(self) -> None:
        self.engine = Engine(self.config, self.layout, self.platform, vocab_size=self.vocab_size)

    def step(self, position: Position) -> StepReport:
        train, groups = self.config.train, self.engine.groups
        with self.life.phase("data"):
            batches = micro_batches(
                self.data["train"], position.samples, global_batch=train.global_batch_size, micro_batch=train.micro_batch_size,
                dp_rank=groups.dp.rank(), dp_size=groups.dp.size(),
            )
        lr = lr_at(position.steps, self.config.optim, self.steps)
        result = self.engine.step(batches, lr=lr, step=position.steps)
        return StepReport(result.loss, result.grad_norm, lr, samples=train.global_batch_size, applied=result.applied, searching=result.searching,
                          tokens=train.global_batch_size * self.config.data.sequence_length)

    def validate(self, position: Position) -> dict[str, float]:
        samples = self.data["validation"]
        result = evaluate_split(self.engine, samples, count=min(self.config.validation.samples, samples.samples_per_epoch),
                                micro_batch=self.config.train.micro_batch_size)
        found = {"validation_loss": result.loss}
        if samples.bytes_per_token:
            found["validation_bits_per_byte"] = result.loss / math.log(2) / samples.bytes_per_token
        return found

    def verdict(self, metrics: dict[str, float]) -> Stop | None:
        return None

    def complete(self):
        return self.engine.complete_weights()

    def state(self, *, loading: bool, sharding: str | None = None) -> dict:
        return self.engine.sharded_state(loading=loading, sharding=sharding)

    def load(self, state: dict, record: dict) -> None:
        self.engine.load_state(state)

    def start(self, source: Path) -> None:
        load_weights(self.engine, source, average=self.config.checkpoint.average)

    def record(self) -> dict:
        return {}

    def begins(self, position: Position, journal) -> None:
        pass

    def ends(self, position: Position, stop: Stop, journal) -> None:
        pass

    def report(self, run_dir: Path, chosen: Path | None) -> None:
        write_report(run_dir, title=f"{self.config.model.name}, {self.config.stage.name}", bytes_per_token=self.data["train"].bytes_per_token)


def checked_vocabulary(config: Config, samples: Samples) -> int:
    """Words of the model: its own number, or the data's (the tokenizer's, and the mask of an encoder). Raises UserError when the data has more."""
    wanted = config.model.vocab_size
    if wanted is not None and wanted < samples.vocab_size:
        raise UserError("model.vocab_size", wanted, f"the tokenizer has {samples.vocab_size} words; give at least as many, or null")
    return wanted or samples.vocab_size
