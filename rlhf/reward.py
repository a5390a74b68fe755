"""reward: a reward model from rankings (Ouyang et al. 2022, arXiv 2203.02155, section 3.5; Stiennon et al. 2020, arXiv 2009.01325).

    loss of a prompt = mean over all pairs of its K responses of -log sigmoid(r_w - r_l - margin)                   (preferences.py)

The model is the one that it starts from with a scalar head in the place of the vocabulary's, read at the last token of a response. A step takes
`train.global_batch_size` prompts; the responses of a prompt are one element, and each passes the model once. With every checkpoint goes a bias,
so that demonstrations score 0 on average: `Role` adds it when the model gives rewards. Held-out accuracy and calibration decide when to stop.
"""
from pathlib import Path

import torch

from megatron_ext.checkpoint.ancestry import chain
from megatron_ext.config.schema import Config
from megatron_ext.platform import Platform
from megatron_ext.train.engine import Engine
from megatron_ext.train.life import Life
from megatron_ext.train.loop import Outcome, run
from megatron_ext.train.schedule import lr_at
from megatron_ext.train.stage import Position, StepReport, layout_of
from megatron_ext.train.stop import Stop
from megatron_ext.train.weights import load_weights
from rlhf import preferences
from rlhf.objectives import RankingObjective, Rewards
from rlhf.prompts import Rankings, prepare
from rlhf.ranked import Cut, Ranked, choose
from rlhf.report import write_report
from rlhf.stop import RewardCriteria

DEMONSTRATIONS = 512  # at most so many decide the bias


def train(config: Config) -> Outcome:
    """Runs the stage on this rank. Collective over all ranks of the job. Raises UserError, RunFailed."""
    return run(config, RewardModelling, prepare)


class RewardModelling:
    """A stage (megatron_ext/train/stage.py)."""

    training_flops = False
    samples_move_on = True
    life = Life()

    def __init__(self, config: Config, platform: Platform):
        self.config, self.platform, self.layout, self.steps = config, platform, layout_of(config), config.train.steps
        self.data = Rankings(config)
        self.tokenizer, self.vocab_size, self.identity = self.data.file, self.data.vocab_size, self.data.identity
        self.validates = bool(self.data.held_out)
        self.criteria = RewardCriteria(config)
        self.best = self.criteria.best if config.checkpoint.best else None

    def build(self) -> None:
        self.engine = Engine(self.config, self.layout, self.platform, vocab_size=self.vocab_size, head="scalar")

    def _cut(self, items: list[Ranked]) -> Cut:
        return Cut(self.engine, items, budget=self.config.rollout.batch_tokens, margin=self.config.ranking.margin)

    def step(self, position: Position) -> StepReport:
        config, batch = self.config, self.config.train.global_batch_size
        cut = self._cut(choose(self.data.training, first=position.samples, count=batch, seed=config.data.seed))
        lr = lr_at(position.steps, config.optim, self.steps)
        result = self.engine.step(cut.batches(), lr=lr, step=position.steps, objective=RankingObjective())
        pairs = max(result.sums["pairs"], 1.0)
        return StepReport(
            result.loss, result.grad_norm, lr, samples=batch, tokens=sum(len(sequence.tokens) for sequence in cut.sequences), applied=result.applied,
            searching=result.searching, numbers={"accuracy": result.sums["correct"] / pairs, "margin": result.sums["margin"] / pairs},
        )

    def validate(self, position: Position) -> dict[str, float]:
        cut = self._cut(self.data.held_out)
        rewards = cut.scores(Rewards())
        sizes = torch.tensor([len(item.sequences) for item in self.data.held_out])
        prompts = torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).to(torch.int32)
        ranks = torch.tensor([rank for item in self.data.held_out for rank in item.ranks])
        total, sums = preferences.ranking_loss(rewards, prompts, ranks)
        found = {"validation_loss": float(total) / max(float(sums["prompts"]), 1.0)}
        pairs = float(sums["pairs"])
        if pairs and bool(rewards.isfinite().all()):
            self.calibration = preferences.calibration_sums(preferences.leads(rewards, prompts, ranks))
            found |= {
                "validation_accuracy": float(sums["correct"]) / pairs, "validation_margin": float(sums["margin"]) / pairs, "validation_pairs": pairs,
                "validation_calibration_error": preferences.calibration_error(self.calibration),
            }
            self.journal.event("calibration", step=position.steps, bins=[list(one) for one in preferences.reliability(self.calibration)])
        return found

    def verdict(self, metrics: dict[str, float]) -> Stop | None:
        return self.criteria.after_validation(metrics)

    def bias(self) -> float:
        """What is added to rewards so that demonstrations have 0 on average; where none are marked, the best responses are taken. Collective."""
        chosen = [item for item in self.data.training if item.demonstrations][:DEMONSTRATIONS] or self.data.training[:DEMONSTRATIONS]
        best = [item.sequences[(item.demonstrations or (item.ranks.index(min(item.ranks)),))[0]] for item in chosen]
        rewards = self._cut([Ranked((sequence,), (0,)) for sequence in best]).scores(Rewards())
        return -float(rewards.mean(dtype=torch.float64))

    def report(self, run_dir: Path, chosen: Path | None) -> None:
        write_report(run_dir, title=f"{self.config.model.name}, {self.config.stage.name}", chain=chain(chosen) if chosen else ())

    def record(self) -> dict:
        return {"head": "scalar", "reward_bias": self.bias() if self.config.ranking.demonstrations_to_zero else 0.0,
                "criteria": self.criteria.state_dict()}

    def complete(self):
        return self.engine.complete_weights()

    def state(self, *, loading: bool, sharding: str | None = None) -> dict:
        return self.engine.sharded_state(loading=loading, sharding=sharding)

    def load(self, state: dict, record: dict) -> None:
        self.engine.load_state(state)
        self.criteria.load_state_dict(record["criteria"])

    def start(self, source: Path) -> None:
        load_weights(self.engine, source, average=self.config.checkpoint.average)

    def begins(self, position: Position, journal) -> None:
        self.journal = journal
        self.data.tell(journal)

    def ends(self, position: Position, stop: Stop, journal) -> None:
        pass
