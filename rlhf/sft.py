"""sft: supervised fine-tuning on conversations (Ouyang et al. 2022, arXiv 2203.02155, section 3.5).

It is pretraining on other samples: the loss is on what the assistant says, with the end of its turn, and examples that share a sample do not see
each other. A step takes `train.global_batch_size` sequences of `data.sequence_length`.
"""
from pathlib import Path

from megatron_ext.checkpoint.ancestry import chain
from megatron_ext.config.schema import Config
from megatron_ext.data.samples import Samples
from megatron_ext.train.loop import Outcome, run
from megatron_ext.train.pretrain import Pretraining
from megatron_ext.train.stage import Position
from rlhf.prompts import Conversations, prepare
from rlhf.report import write_report


def train(config: Config) -> Outcome:
    """Runs the stage on this rank. Collective over all ranks of the job. Raises UserError, RunFailed."""
    return run(config, FineTuning, prepare)


class FineTuning(Pretraining):
    """A stage (megatron_ext/train/stage.py)."""

    def datasets(self) -> dict[str, Samples]:
        self.chat = Conversations(self.config)
        self.tokenizer, self.identity = self.chat.file, self.chat.identity | {"sequence_length": self.config.data.sequence_length}
        data = {"train": self.chat.samples(self.chat.training, reshuffle=True)}
        validates = self.config.validation.every or self.config.validation.at_end
        if validates and self.chat.held_out:
            data["validation"] = self.chat.samples(self.chat.held_out, reshuffle=False)
        return data

    def begins(self, position: Position, journal) -> None:
        self.chat.tell(journal)

    def report(self, run_dir: Path, chosen: Path | None) -> None:
        write_report(run_dir, title=f"{self.config.model.name}, {self.config.stage.name}", chain=chain(chosen) if chosen else ())
