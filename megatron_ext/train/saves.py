"""When a run saves: every `checkpoint.every` steps, or as often as its failures so far make best (`checkpoint.auto`); sooner where a save failed."""
from pathlib import Path

import torch.distributed as dist

from megatron_ext import checkpoint
from megatron_ext.config.schema import Config
from megatron_ext.errors import UserError
from megatron_ext.observe.goodput import read_goodput, steps_between_saves

RETRY = 10  # a save that failed is tried again after a tenth of the interval


class Saves:
    """Asked after each step. Collective where `checkpoint.auto` is on.

    Attributes:
        done: the step that was saved last (or is being saved).
    """

    def __init__(self, config: Config, saver: checkpoint.Checkpoints):
        self._config, self._saver = config.checkpoint, saver
        self._run_dir = Path(config.run.dir)
        self.done: int | None = None
        self._every = self._interval()

    def due(self, step: int) -> bool:
        """Whether a save is due after this step."""
        if self.done == step:
            return False
        if self._config.auto and (self.done is None or step - self.done >= self._every > 0):
            self._every = self._interval()
        if self._saver.failed is not None and step - max(self._saver.failed, self.done or 0) >= max(1, self._every // RETRY):
            return True  # a disk that was full may have room again
        if not self._every:
            return False
        if self._config.auto:
            return step - (self.done or 0) >= self._every
        return step % self._every == 0

    def settled(self) -> Path | None:
        """Waits for the save in flight; the newest checkpoint of this run."""
        try:
            self._saver.wait()
        except UserError:  # it has been told; the one before counts
            pass
        return self._saver.newest()

    def _interval(self) -> int:
        """Steps from one save to the next; 0 = none but the last."""
        if not self._config.auto:
            return self._config.every
        steps = 0
        if dist.get_rank() == 0:
            goodput = read_goodput(self._run_dir)
            steps = steps_between_saves(goodput, goodput.step_seconds)
        found = [steps]
        dist.broadcast_object_list(found, src=0)
        return found[0] or self._config.every
