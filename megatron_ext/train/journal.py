"""What a run tells while it goes: metrics.jsonl, events.jsonl, the progress line, wandb, Prometheus, GPU figures. Rank 0 writes, the others are silent."""
import contextlib
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_ext.config.observing import parse_address
from megatron_ext.config.schema import Config
from megatron_ext.observe import gpus, prometheus
from megatron_ext.observe.events import Events, read_events
from megatron_ext.observe.flops import peak_flops, token_flops, utilisation
from megatron_ext.observe.gpu import GpuMonitor
from megatron_ext.observe.lines import LineFile
from megatron_ext.observe.metrics import Metrics, drop_from, read_metrics
from megatron_ext.observe.progress import Progress
from megatron_ext.observe.track import Tracker, identity
from megatron_ext.platform import Platform
from megatron_ext.redact import Redactor
from megatron_ext.train.stage import StepReport


class Journal:
    """The writers of one rank. Every rank has one, and calls `step` for each step: there the GPUs' figures come together.

    Args:
        writes: True on rank 0.
        steps: length of the run; done: steps done before this life.
        flops: whether a token of a step costs a forward and a backward pass of the model, so that MFU can be told.
    """

    def __init__(self, config: Config, platform: Platform, *, writes: bool, steps: int, done: int, ranks: int, vocab_size: int, flops: bool = True):
        self.writes, self._config, self._ranks, self._platform = writes, config, ranks, platform
        self.events: Events | None = None
        self._gpu = GpuMonitor(platform.device.index or 0) if platform.is_cuda and config.log.gpu_every else None
        if not writes:
            return
        directory = Path(config.run.dir)
        lives = sum(event.get("kind") in ("start", "resume") for event in read_events(directory / "events.jsonl"))
        self.events = Events(directory / "events.jsonl")
        self._metrics = Metrics(directory / "metrics.jsonl", first=done + 1)
        self._progress = Progress(steps, done=done, every=config.log.every)
        self._tracker = Tracker(config.log, run_dir=directory, config=config, history=lambda: read_metrics(directory / "metrics.jsonl"))
        self._publisher = _publisher(config, directory, {"planned_steps": steps, "restarts": lives})
        self._energy = gpus.Energy()
        self._counted = token_flops(config.model, sequence_length=config.data.sequence_length, vocab_size=vocab_size, precision=config.precision,
                                    data=config.data)
        name = torch.cuda.get_device_name() if platform.is_cuda and flops else ""
        self._peak, self._fp8_peak = peak_flops(name, config.precision.dtype), peak_flops(name, "fp8")

    def event(self, kind: str, **fields) -> None:
        if self.writes:
            self.events.write(kind, **fields)

    def note(self, text: str) -> None:
        """A line for people, above the progress line."""
        if self.writes:
            self._progress.note(text)

    def step(self, step: int, report: StepReport, *, seconds: float, tokens_done: int, validation: dict) -> None:
        """Records step number `step` (1 is the first). Collective where GPUs are read.

        Args:
            seconds: of the step itself.
            validation: `validation_loss`, ... where one followed this step, else empty.
        """
        rows = None
        if self._gpu is not None and step % self._config.log.gpu_every == 0:
            rows = gathered(gpus.pack(self._gpu.read()), self._platform.device)
        if not self.writes:
            return
        speed = report.tokens / seconds
        fields = {
            "loss": report.loss, "grad_norm": report.grad_norm, "lr": report.lr, "tokens": tokens_done, "tokens_per_second": speed,
            "seconds": seconds, "applied": report.applied, **report.numbers, **validation, **self._utilisations(speed),
        }
        if rows is not None:
            fields |= gpus.summary(rows)
            energy = self._energy.read(rows, tokens=tokens_done, now=time.monotonic())
            if energy is not None:
                fields["energy_per_token"] = energy
        self._metrics.write(step, **fields)
        self._tracker.log(step, **fields)
        if self._publisher is not None:
            self._publisher.step(step, fields, rows)
        self._progress.update(
            step, loss=report.loss, tokens_per_second=speed, lr=report.lr, grad_norm=report.grad_norm,
            validation_loss=validation.get("validation_loss"), mfu=fields.get("mfu"),
        )

    def _utilisations(self, speed: float) -> dict[str, float]:
        """`mfu` and `hfu`; nothing for a device that is not known."""
        recompute, found = self._config.parallel.recompute, {}
        for name, flops, fp8 in (("mfu", self._counted.training, self._counted.training_fp8),
                                 ("hfu", self._counted.hardware(recompute), self._counted.hardware_fp8(recompute))):
            share = utilisation(flops, tokens_per_second=speed, devices=self._ranks, peak=self._peak, fp8_flops=fp8, fp8_peak=self._fp8_peak)
            if share is not None:
                found[name] = share
        return found

    def rewind(self, done: int) -> None:
        """Within this life, training goes on from the state after step `done`: what metrics.jsonl says of later steps is dropped."""
        if self.writes:
            self._metrics.close()
            self._metrics = Metrics(self._metrics.path, first=done + 1)

    def samples(self, samples: Iterable[dict]) -> None:
        """Appends to samples.jsonl: what the model answered after a step ("step"), for people to read. A step that is done again has them once."""
        samples = list(samples)
        if self.writes and samples:
            path = Path(self._config.run.dir) / "samples.jsonl"
            with contextlib.suppress(OSError):  # the lines below say so
                drop_from(path, samples[0]["step"])
            lines = LineFile(path, redactor=Redactor(shapes=False))  # a model may speak of passwords
            for sample in samples:
                lines.append(sample)
            lines.close()

    def close(self, *, exit_code: int = 0) -> None:
        if self._gpu is not None:
            self._gpu.close()
        if self.writes:
            self._progress.close()
            self._tracker.close(exit_code=exit_code)
            if self._publisher is not None:
                self._publisher.close()
            self._metrics.close()
            self.events.close()


def gathered(row: Sequence[float], device: torch.device) -> list[list[float]]:
    """The rows of all ranks, in their order. Collective."""
    mine = torch.tensor(row, dtype=torch.float64, device=device)
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, mine)
    return torch.stack(rows).tolist()


def _publisher(config: Config, directory: Path, fixed: dict[str, float]) -> prometheus.Publisher | None:
    """None where nobody asked for any of it."""
    log, files, passing = config.log, {}, []
    if log.prometheus:
        files[directory / prometheus.NAME] = None
    if log.prometheus_dir is not None:
        passing = [Path(log.prometheus_dir) / f"megatron_ext_{identity(directory)}.prom"]
        files[passing[0]] = 0o644
    listen = None if log.prometheus_listen is None else parse_address(log.prometheus_listen)
    if not files and listen is None:
        return None
    labels = {"run": Redactor().text(config.run.dir), "stage": config.stage.name}
    return prometheus.Publisher(files, labels=labels, passing=passing, listen=listen, fixed=fixed)
