"""What a run tells while it goes: metrics.jsonl, events.jsonl, the progress line, wandb, GPU figures. Rank 0 writes, the others are silent."""
import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch

from megatron_ext.config.schema import Config
from megatron_ext.observe.events import Events
from megatron_ext.observe.flops import peak_flops, token_flops, utilisation
from megatron_ext.observe.gpu import GpuMonitor
from megatron_ext.observe.lines import LineFile
from megatron_ext.observe.metrics import Metrics
from megatron_ext.observe.progress import Progress
from megatron_ext.observe.track import Tracker
from megatron_ext.platform import Platform
from megatron_ext.train.stage import StepReport


class Journal:
    """The writers of one rank.

    Args:
        writes: True on rank 0.
        steps: length of the run; done: steps done before this life.
        flops: whether a token of a step costs a forward and a backward pass of the model, so that MFU can be told.
    """

    def __init__(self, config: Config, platform: Platform, *, writes: bool, steps: int, done: int, ranks: int, vocab_size: int, flops: bool = True):
        self.writes, self._config, self._ranks = writes, config, ranks
        self.events: Events | None = None
        if not writes:
            return
        directory = Path(config.run.dir)
        self.events = Events(directory / "events.jsonl")
        self._metrics = Metrics(directory / "metrics.jsonl", first=done + 1)
        self._progress = Progress(steps, done=done, every=config.log.every)
        run_id = hashlib.sha256(str(directory.absolute()).encode()).hexdigest()[:12]
        self._tracker = Tracker(config.log, run_dir=directory, config=config, run_id=run_id)
        self._gpu = GpuMonitor(platform.device.index or 0) if platform.is_cuda and config.log.gpu_every else None
        counted = token_flops(config.model, sequence_length=config.data.sequence_length, vocab_size=vocab_size)
        self._flops, self._hardware_flops = counted.training, counted.hardware(config.parallel.recompute)
        self._peak = peak_flops(torch.cuda.get_device_name(), config.precision.dtype) if platform.is_cuda and flops else None

    def event(self, kind: str, **fields) -> None:
        if self.writes:
            self.events.write(kind, **fields)

    def note(self, text: str) -> None:
        """A line for people, above the progress line."""
        if self.writes:
            self._progress.note(text)

    def step(self, step: int, report: StepReport, *, seconds: float, tokens_done: int, validation: dict) -> None:
        """Records step number `step` (1 is the first).

        Args:
            seconds: of the step itself.
            validation: `validation_loss`, ... where one followed this step, else empty.
        """
        if not self.writes:
            return
        speed = report.tokens / seconds
        fields = {
            "loss": report.loss, "grad_norm": report.grad_norm, "lr": report.lr, "tokens": tokens_done, "tokens_per_second": speed,
            "seconds": seconds, "applied": report.applied, **report.numbers, **validation,
        }
        for name, flops in (("mfu", self._flops), ("hfu", self._hardware_flops)):
            share = utilisation(flops, tokens_per_second=speed, devices=self._ranks, peak=self._peak)
            if share is not None:
                fields[name] = share
        if self._gpu is not None and step % self._config.log.gpu_every == 0:
            fields |= self._gpu.read()
        self._metrics.write(step, **fields)
        self._tracker.log(step, **fields)
        self._progress.update(
            step, loss=report.loss, tokens_per_second=speed, lr=report.lr, grad_norm=report.grad_norm,
            validation_loss=validation.get("validation_loss"), mfu=fields.get("mfu"),
        )

    def samples(self, samples: Iterable[dict]) -> None:
        """Appends to samples.jsonl: what the model answered, for people to read."""
        if self.writes:
            lines = LineFile(Path(self._config.run.dir) / "samples.jsonl")
            for sample in samples:
                lines.append(sample)
            lines.close()

    def close(self, *, exit_code: int = 0) -> None:
        if self.writes:
            self._progress.close()
            self._tracker.close(exit_code=exit_code)
            self._metrics.close()
            self.events.close()
