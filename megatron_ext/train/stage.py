"""What the training loop asks of a stage. Pretraining, SFT, reward models, PPO: each is one class; the loop stands once (loop.py)."""
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch.distributed as dist

from megatron_ext.config.schema import Config, PlacementConfig
from megatron_ext.errors import UserError
from megatron_ext.parallel.layout import Layout
from megatron_ext.platform import Platform
from megatron_ext.train.stop import Best, Stop

if TYPE_CHECKING:
    from megatron_ext.train.journal import Journal
    from megatron_ext.train.life import Life


@dataclass
class Position:
    """Where a run stands: what a resume continues from.

    Attributes:
        steps: optimizer steps, or iterations of ppo and its kin.
        samples: sequences (episodes) used. tokens: that were trained on.
        parent: hash of the checkpoint that this run came from; parent_path: where it was.
        origin: where the weights were imported from at the beginning of the chain, and under what licence (convert/origin.py).
        curation: what earlier stages were trained on, as `record.curation` has it: licences go on where the texts' traces do.
    """

    steps: int = 0
    samples: int = 0
    tokens: int = 0
    parent: str | None = None
    parent_path: str | None = None
    origin: dict | None = None
    curation: list[dict] = field(default_factory=list)


@dataclass(frozen=True)
class StepReport:
    """What one step did; the same on every rank.

    Attributes:
        samples, tokens: used by it.
        applied: False when a loss or gradient was not finite and the weights stayed as they were; searching: see `engine.StepResult`.
        numbers: what else metrics.jsonl gets.
    """

    loss: float
    grad_norm: float | None
    lr: float
    samples: int
    tokens: int
    applied: bool = True
    searching: bool = False
    numbers: dict[str, float] = field(default_factory=dict)


class Stage(Protocol):
    """A stage on this rank. Made with its data only; `build` makes its models.

    Attributes:
        steps: length of the run.
        vocab_size: words of the model. tokenizer: the file that made them, kept with the run. identity: what the order of samples depends on.
        validates: whether `validate` has anything to look at. best: chooses among validations, or None.
        training_flops: True where a token costs one forward and one backward pass, so that MFU means something.
        samples_move_on: the data of a step depends on `Position.samples` alone, so that bad samples can be left out.
        life: set by the loop: what a stage may ask and say while it works (life.py).
    """

    config: Config
    platform: Platform
    layout: Layout
    steps: int
    vocab_size: int
    tokenizer: Path
    identity: dict
    validates: bool
    best: Best | None
    training_flops: bool
    samples_move_on: bool
    life: "Life"

    def build(self) -> None:
        """Makes the models. Collective."""

    def step(self, position: Position) -> StepReport:
        """One step from `position`. Collective."""

    def validate(self, position: Position) -> dict[str, float]:
        """Numbers of the held-out data; `validation_loss` among them feeds the plateau. Collective."""

    def verdict(self, metrics: dict[str, float]) -> Stop | None:
        """Criteria of the stage's own, asked after each step with all its numbers (and the validation's)."""

    def complete(self) -> AbstractContextManager:
        """Inside, every rank holds the newest weights."""

    def state(self, *, loading: bool, sharding: str | None = None) -> dict:
        """The sharded state of all that a resume needs."""

    def load(self, state: dict, record: dict) -> None:
        """Takes what was filled into `state(loading=True)`, and the record of `record()`."""

    def start(self, source: Path) -> None:
        """Takes the weights of an earlier stage's checkpoint. Collective."""

    def record(self) -> dict:
        """What else the checkpoint says, JSON."""

    def begins(self, position: Position, journal: "Journal") -> None:
        """Before the first step of this life. Collective."""

    def ends(self, position: Position, stop: Stop, journal: "Journal") -> None:
        """After the last one, before the checkpoint at the end. Collective."""

    def report(self, run_dir: Path, chosen: Path | None) -> None:
        """Writes report.md, on rank 0. chosen: the checkpoint that the stage ended with."""


def layout_of(config: Config, placement: PlacementConfig | None = None) -> Layout:
    """The layout over all ranks of the job: the policy's, with what `placement` says otherwise. Raises UserError where ranks do not divide."""
    parallel, ranks = config.parallel, dist.get_world_size()
    tp, pp, sp, vpp = parallel.tp, parallel.pp, parallel.sp, parallel.vpp
    if placement is not None:
        tp = tp if placement.tp is None else placement.tp
        vpp = vpp if placement.pp is None or placement.pp == pp else None
        pp = pp if placement.pp is None else placement.pp
        sp = (sp if placement.sp is None else placement.sp) and tp > 1
    if ranks % (tp * pp * parallel.cp):
        raise UserError("launch.ranks", ranks, f"is not a multiple of tp={tp} x pp={pp} x cp={parallel.cp}")
    return Layout(tp, pp, vpp, parallel.cp, sp, tuple(range(ranks)))
