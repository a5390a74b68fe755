"""A run's newest figures for Prometheus: a text file, and on demand an HTTP endpoint. Rank 0 writes for all ranks; the standard library suffices.

    run.dir/metrics.prom          always (log.prometheus); replaced in one piece, every ten seconds at most
    log.prometheus_dir            the same as a file there, readable by all: a directory of node_exporter's textfile collector. Removed at the end,
                                  since node_exporter goes on telling what it finds
    log.prometheus_listen         HTTP, GET /metrics, at this address alone

Text format 0.0.4 (https://prometheus.io/docs/instrumenting/exposition_formats): `# HELP`, `# TYPE`, then the samples of one name together;
backslash, line feed and (in labels) the double quote are escaped. No time stamps: node_exporter refuses them. Names end in their unit, in base
units (seconds, bytes, watts, ratios from 0 to 1). Labels: run (run.dir), stage, and of a GPU's figures the rank.

A run that was killed leaves its last figures: `time() - megatron_ext_last_step_timestamp_seconds` tells them from a living one's.
slurm/grafana/megatron_ext.json is a dashboard of all this.
"""
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import gpus
from .scrape import Endpoint

PREFIX = "megatron_ext_"
NAME = "metrics.prom"


@dataclass(frozen=True)
class Metric:
    """name: without PREFIX. field: its name in metrics.jsonl; scale: what turns that into the unit of the name."""

    name: str
    help: str
    field: str
    scale: float = 1.0
    kind: str = "gauge"


# Of the run: fields of metrics.jsonl, and what Publisher itself knows.
RUN = (
    Metric("running", "1 while the training program runs, 0 once it has ended in order.", "running"),
    Metric("step", "Optimizer steps (iterations of ppo and its kin) that are done.", "step"),
    Metric("planned_steps", "Steps of the whole run.", "planned_steps"),
    Metric("restarts", "Times that the run was started again.", "restarts"),
    Metric("start_timestamp_seconds", "When this life of the run began.", "started"),
    Metric("last_step_timestamp_seconds", "When the newest step was done.", "time"),
    Metric("trained_tokens", "Tokens trained on.", "tokens"),
    Metric("tokens_per_second", "Speed of the newest step, all ranks together.", "tokens_per_second"),
    Metric("step_duration_seconds", "Duration of the newest step.", "seconds"),
    Metric("skipped_steps_total", "Steps of this life that changed no weights, because a loss or gradient was not finite.", "skipped", kind="counter"),
    Metric("loss", "Training loss (nats a token for language models).", "loss"),
    Metric("validation_loss", "Loss of the newest validation.", "validation_loss"),
    Metric("gradient_norm", "Global norm of the gradient before clipping.", "grad_norm"),
    Metric("learning_rate", "Learning rate of the newest step.", "lr"),
    Metric("mfu_ratio", "Model FLOPs utilisation (recomputation not counted; FP8 products at the FP8 peak). Absent for unknown devices.", "mfu"),
    Metric("hfu_ratio", "Hardware FLOPs utilisation (recomputation counted). Absent for unknown devices.", "hfu"),
    Metric("token_energy_joules", "Energy that all GPUs used for one token, between the two newest readings.", "energy_per_token"),
)
# Of each rank's GPU: fields of gpus.FIELDS.
GPU = (
    Metric("gpu_utilisation_ratio", "Share of time in which a kernel ran on the GPU.", "gpu_utilisation", 0.01),
    Metric("gpu_memory_used_bytes", "Memory in use on the GPU.", "gpu_memory_used", 2.0**30),
    Metric("gpu_memory_total_bytes", "Memory of the GPU.", "gpu_memory_total", 2.0**30),
    Metric("gpu_power_watts", "Power that the GPU draws.", "gpu_power"),
    Metric("gpu_power_limit_watts", "Power that the GPU is allowed to draw.", "gpu_power_limit"),
    Metric("gpu_temperature_celsius", "Temperature of the GPU.", "gpu_temperature"),
    Metric("gpu_clock_hertz", "Clock of the streaming multiprocessors.", "gpu_clock", 1e6),
    Metric("gpu_memory_clock_hertz", "Clock of the GPU's memory.", "gpu_memory_clock", 1e6),
    Metric("gpu_throttled", "1 while something (power cap, heat, ...) slows the GPU down.", "gpu_throttle"),
    Metric("gpu_energy_joules_total", "Energy that the GPU has used since its driver was loaded.", "gpu_energy", kind="counter"),
)
# Whatever else a stage tells, such as reward and KL of ppo: one name, with the field of metrics.jsonl as label `name`.
NUMBER = Metric("number", "Another number of the stage: the field of metrics.jsonl that the label name gives.", "")


def escape_help(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def escape_label(text: str) -> str:
    return escape_help(text).replace('"', '\\"')


def number(value: float) -> str:
    """A value as Go's ParseFloat reads it, to the last bit."""
    if math.isfinite(value):
        return repr(float(value))
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"


def family(metric: Metric, samples: Sequence[tuple[Mapping[str, str], float]]) -> str:
    """The lines of one metric; "" without samples. samples: labels and value, in the unit of the name."""
    if not samples:
        return ""
    name = PREFIX + metric.name
    lines = [f"# HELP {name} {escape_help(metric.help)}", f"# TYPE {name} {metric.kind}"]
    for labels, value in samples:
        shown = ",".join(f'{key}="{escape_label(text)}"' for key, text in labels.items())
        lines.append(f"{name}{{{shown}}} {number(value)}")
    return "\n".join(lines) + "\n"


def run_text(fields: Mapping[str, object], labels: Mapping[str, str]) -> str:
    """The families of the run: one for each field that is a number, the unnamed ones together under NUMBER."""
    numbers = {name: value for name, value in fields.items() if isinstance(value, (int, float)) and not name.startswith("gpu_")}
    parts = [family(metric, [(labels, numbers.pop(metric.field) * metric.scale)]) for metric in RUN if metric.field in numbers]
    return "".join(parts) + family(NUMBER, [({**labels, "name": name}, float(value)) for name, value in numbers.items()])


def gpu_text(rows: Sequence[gpus.Row], labels: Mapping[str, str]) -> str:
    """The families of all ranks' GPUs. rows: as `gpus.pack` makes them, of rank 0, 1, ..."""
    parts = []
    for metric in GPU:
        index = gpus.FIELDS.index(metric.field)
        told = [({**labels, "rank": str(rank)}, row[index]) for rank, row in enumerate(rows) if not math.isnan(row[index])]
        if metric.field == "gpu_throttle":
            told = [(at, float(bool(gpus.reasons(int(bits))))) for at, bits in told]
        parts.append(family(metric, [(at, value * metric.scale) for at, value in told]))
    return "".join(parts)


class Publisher:
    """Keeps a run's newest figures where Prometheus finds them. Errors of the disk or network are warned of once and never stop a run.

    Args:
        files: path -> mode of files to keep up to date (None = as the umask says); those in `passing` are removed at the end.
        listen: (host, port) of an HTTP endpoint.
        labels: of every sample.
        every: seconds between two writings, at most.
        fixed: figures that do not change: restarts, planned_steps.
    """

    def __init__(self, files: Mapping[Path, int | None], *, labels: Mapping[str, str], passing: Sequence[Path] = (), listen: tuple[str, int] | None = None,
                 every: float = 10.0, fixed: Mapping[str, float] | None = None, clock: Callable[[], float] = time.time):
        self._files, self._passing, self._labels = dict(files), tuple(passing), dict(labels)
        self._every, self._clock, self._written, self._warned = every, clock, -math.inf, False
        self._fields: dict[str, object] = {**(fixed or {}), "running": 1, "started": clock(), "skipped": 0}
        self._gpus = ""
        self.endpoint: Endpoint | None = None
        if listen is not None:
            try:
                self.endpoint = Endpoint(listen, self.text)
            except OSError as error:
                self._warn(f"http://{listen[0]}:{listen[1]}/metrics", error)

    def step(self, step: int, fields: Mapping[str, object], rows: Sequence[gpus.Row] | None = None) -> None:
        """Takes the figures of a step (fields as in metrics.jsonl), and of all ranks' GPUs where they were read."""
        now = self._clock()
        skipped = self._fields["skipped"] + (fields.get("applied") is False)
        new = {**self._fields, **fields, "step": step, "time": now, "skipped": skipped}
        new.pop("applied", None)
        self._fields = new  # a new one: the endpoint's thread may be reading the old one
        if rows is not None:
            self._gpus = gpu_text(rows, self._labels)
        if now - self._written >= self._every or now < self._written:
            self._write(now)

    def text(self) -> str:
        """All of it, in the text format."""
        return run_text(self._fields, self._labels) + self._gpus

    def close(self) -> None:
        """The last figures, with running 0."""
        self._fields, self._gpus = {**self._fields, "running": 0}, ""
        self._write(self._clock())
        for path in self._passing:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                self._warn(path, error)
        if self.endpoint is not None:
            self.endpoint.close()

    def _write(self, now: float) -> None:
        self._written = now
        text = self.text()
        for path, mode in self._files.items():
            try:
                replace(path, text, mode)
            except OSError as error:
                self._warn(path, error)

    def _warn(self, where: object, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"{where}: {error}; figures for Prometheus are missing, the run goes on", RuntimeWarning, stacklevel=3)


def replace(path: Path, text: str, mode: int | None = None) -> None:
    """The file holds `text`, or what it held before: no reader sees a part. mode: of the file; None = as the umask says. Raises OSError."""
    draft = path.with_name(f"{path.name}.tmp")  # not *.prom: the textfile collector must not take it
    with open(draft, "w", encoding="utf-8") as file:
        if mode is not None:
            os.fchmod(file.fileno(), mode)
        file.write(text)
    os.replace(draft, path)
