"""`report.md`: what a run was, what came out of it, and how it went, from the files of its directory and what the caller adds.

It reads config.yaml, metrics.jsonl, events.jsonl and goodput.jsonl; any of them may be missing, cut short, or hold a few records only. The pieces are
public: the reports of other stages are made of them (rlhf/report.py).
"""
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ext.files import write_whole

from . import markdown, plots, timeline
from .events import read_events
from .goodput import read_goodput
from .metrics import read_metrics
from .progress import human_count, human_time

Section = Mapping[str, object] | str
Picture = tuple[str, str, Callable[[Path], bool]]  # heading, file name, what draws it (False: there was nothing to draw)


@dataclass(frozen=True)
class Run:
    """The files of a run's directory, read."""

    directory: Path
    records: list[dict]
    events: list[dict]
    _drawn: dict[str, bool] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def read(cls, directory: Path) -> "Run":
        directory = Path(directory)
        return cls(directory, read_metrics(directory / "metrics.jsonl"), read_events(directory / "events.jsonl"))

    @property
    def restarts(self) -> list[int]:
        """Steps at which it was resumed."""
        return [event["step"] for event in self.events if event.get("kind") == "resume" and isinstance(event.get("step"), int)]

    def last(self, kind: str) -> dict:
        """The newest event of a kind; {} where there is none."""
        return next((event for event in reversed(self.events) if event.get("kind") == kind), {})

    def draw(self, name: str, draw: Callable[[Path], bool]) -> bool:
        """Whether there is something to draw. Draws it into the directory the first time, however many pages show it."""
        if name not in self._drawn:
            self._drawn[name] = draw(self.directory / name)
        return self._drawn[name]

    @property
    def bytes_per_token(self) -> float | None:
        """Of the validation data, where the validations tell: a loss of l nats a token is l / ln 2 / bytes bits per byte."""
        found = (r["validation_loss"] / math.log(2) / r["validation_bits_per_byte"] for r in reversed(self.records)
                 if r.get("validation_bits_per_byte") and isinstance(r.get("validation_loss"), float))
        return next((value for value in found if math.isfinite(value)), None)


def write_report(
    run: Path | Run, *, title: str, sections: Mapping[str, Section] | None = None, samples: Sequence[Mapping[str, str]] = (),
    bytes_per_token: float | None = None, baseline_bits_per_byte: float | None = None, baseline_name: str = "interpolated trigram",
) -> Path:
    """Write report.md and its plots into a run's directory.

    Args:
        sections: heading -> a table of names and values, or Markdown text; in this order (evaluation, corpus, hardware, versions, ...).
        samples: {"prompt": ..., "completion": ...} each.
        bytes_per_token: of the validation data, turns nats a token into bits a byte; None = as metrics.jsonl tells.
        baseline_bits_per_byte: drawn beside the loss.

    Returns:
        The path of the report.
    """
    run = run if isinstance(run, Run) else Run.read(run)
    bytes_per_token = bytes_per_token or run.bytes_per_token
    baseline = None if baseline_bits_per_byte is None else (baseline_name, baseline_bits_per_byte)
    parts = [f"# {title}", verdict(run.events)]
    parts.append(markdown.table(progress(run) | losses(run, bytes_per_token, baseline) | resources(run)))
    parts.append(pictures(run, loss_pictures(run, bytes_per_token, baseline)))
    parts += time_parts(run)
    parts += foretold(run)
    parts += sections_of(sections or {})
    if samples:
        parts.append("## Samples")
        parts += [f"{markdown.fenced(s['prompt'])}\n\ncontinues\n\n{markdown.fenced(s['completion'])}" for s in samples]
    return publish(run.directory, [*parts, *ending(run)])


def foretold(run: Run) -> list[str]:
    """What `plan` says of the run beside what was measured on rank 0 (train/foretold.py)."""
    event = run.last("foretold")
    rows = {name: value for name, value in event.items() if isinstance(value, dict) and {"planned", "measured"} <= value.keys()}
    if not rows:
        return []

    def shown(name: str, value: float) -> str:
        return f"{value:.3f} s" if name.endswith("_seconds") else f"{value:,}" if name == "parameters" else f"{value / 2**20:,.1f} MiB"

    table = {name.replace("_", " "): f"{shown(name, row['planned'])} planned, {shown(name, row['measured'])} measured" for name, row in rows.items()}
    return ["## Planned and measured", markdown.table(table)]


# ---- pieces ------------------------------------------------------------------------------------------------------------------------


def verdict(events: Sequence[dict]) -> str:
    """Why the run stopped, as its last word about it says."""
    for event in reversed(events):
        if event.get("kind") == "stop":
            return f"Stopped because {event.get('reason', 'of an unnamed reason')}."
        if event.get("kind") in ("start", "resume"):
            return "No stop was recorded: the run is still going on, or was killed."
    return ""


def progress(run: Run) -> dict:
    """How far it came."""
    if not run.records:
        return {"steps": "no metrics were recorded"}
    out: dict[str, object] = {"steps": f"{run.records[-1]['step']:,}"}
    if isinstance(run.records[-1].get("tokens"), (int, float)):
        out["tokens"] = human_count(run.records[-1]["tokens"])
    return out


def losses(run: Run, bytes_per_token: float | None = None, baseline: tuple[str, float] | None = None) -> dict:
    """Of a language model: nats a token, bits a byte."""
    out: dict[str, object] = {}
    _, values = plots.column(run.records, "loss")
    if values:
        out["training loss, first -> last"] = f"{values[0]:.4f} -> {tail_mean(values):.4f} nats per token"
    _, validation = plots.column(run.records, "validation_loss")
    if validation:
        out["validation loss, last (best)"] = f"{validation[-1]:.4f} ({min(validation):.4f}) nats per token, perplexity {_exp(validation[-1])}"
    _, bits = plots.column(run.records, "validation_bits_per_byte")
    if not bits and validation and bytes_per_token:
        bits = [loss / math.log(2) / bytes_per_token for loss in validation]
    if bits:
        out["validation, bits per byte"] = f"{bits[-1]:.4f}"
    if baseline is not None and run.records:
        out[f"{baseline[0]}, bits per byte"] = f"{baseline[1]:.4f}"
        if bits:
            gap = baseline[1] - bits[-1]
            out["model against it"] = f"{abs(gap):.4f} bits per byte {'below (better)' if gap >= 0 else 'above (worse)'}"
    return out


def resources(run: Run) -> dict:
    """Speed, memory, time, and what went wrong."""
    out: dict[str, object] = {}
    for name, key, shown in (("tokens per second, median", "tokens_per_second", "{:,.0f}"), ("MFU, median", "mfu", "{:.1%}")):
        _, values = plots.column(run.records, key)
        if values:
            out[name] = shown.format(sorted(values)[len(values) // 2]).replace("%", " %")
    memory = plots.column(run.records, "gpu_memory_used_max")[1] or plots.column(run.records, "gpu_memory_used")[1]  # of several ranks, or of one
    if memory:
        out["GPU memory, most"] = f"{max(memory):.1f} GiB"
    bad = sum(1 for r in run.records if isinstance(r.get("loss"), float) and not math.isfinite(r["loss"]))
    if bad:
        out["non-finite losses"] = f"{bad:,}"
    stopped = run.last("stop")
    if isinstance(stopped.get("elapsed"), (int, float)):
        out["wall time"] = human_time(stopped["elapsed"])
    resumes = sum(1 for e in run.events if e.get("kind") == "resume")
    if resumes:
        out["resumed"] = f"{resumes} time{'s' if resumes > 1 else ''}"
    return out


def loss_pictures(run: Run, bytes_per_token: float | None = None, baseline: tuple[str, float] | None = None, *,
                  unit: str = "nats per token") -> list[Picture]:
    """Loss, throughput, and what the optimizer did."""
    records, restarts = run.records, run.restarts
    return [
        ("Loss", "loss.png", lambda path: plots.plot_loss(path, records, bytes_per_token=bytes_per_token, baseline=baseline, restarts=restarts, unit=unit)),
        ("Throughput", "throughput.png", lambda path: plots.plot_throughput(path, records, restarts=restarts)),
        ("Learning rate and gradient norm", "optimizer.png", lambda path: plots.plot_optimizer(path, records, restarts=restarts)),
    ]


def time_parts(run: Run, *, level: int = 2, prefix: str = "") -> list[str]:
    """Where the time went: goodput, the timeline, the classes and the lives; nothing where there is no ledger. prefix: as in `pictures`."""
    goodput = read_goodput(run.directory)
    if not goodput.lives:
        return []
    parts = [f"{'#' * level} Where the time went", timeline.sentence(goodput), timeline.class_table(goodput), timeline.life_table(goodput.lives)]
    try:
        if run.draw("timeline.png", lambda path: timeline.plot_timeline(path, goodput)):
            parts.insert(1, f"![Where the time went]({prefix}timeline.png)")
    except ImportError:
        pass  # that there are no plots is said where the others would be
    return parts


def pictures(run: Run, wanted: Sequence[Picture], *, level: int = 2, prefix: str = "") -> str:
    """Draws them into the run's directory; the Markdown that shows those that were drawn. prefix: the way there from the page."""
    try:
        drawn = [(heading, name) for heading, name, draw in wanted if run.draw(name, draw)]
    except ImportError:
        return "There are no plots: matplotlib is not installed (`pip install matplotlib`)."
    return "\n\n".join(f"{'#' * level} {heading}\n\n![{heading}]({prefix}{name})" for heading, name in drawn)


def sections_of(sections: Mapping[str, Section]) -> list[str]:
    """Each with its heading."""
    return [f"## {heading}\n\n{body if isinstance(body, str) else markdown.table(body)}" for heading, body in sections.items()]


def ending(run: Run) -> list[str]:
    """Events and configuration."""
    parts = ["## Events\n\n" + markdown.event_table(run.events)] if run.events else []
    config = run.directory / "config.yaml"
    if config.exists():
        text = config.read_text(encoding="utf-8")
        parts.append(f"## Configuration\n\n<details><summary>config.yaml</summary>\n\n{markdown.fenced(text, 'yaml')}\n\n</details>")
    return parts


def publish(directory: Path, parts: Sequence[str], name: str = "report.md") -> Path:
    """Writes the page in one piece: a crash leaves the old one or the new one."""
    path = Path(directory) / name
    write_whole(path, "\n\n".join(part for part in parts if part) + "\n")
    return path


def tail_mean(values: Sequence[float], share: int = 50) -> float:
    """Mean of the last 1 / share of them, one at least."""
    tail = values[-max(1, len(values) // share):]
    return math.fsum(tail) / len(tail)


def _exp(loss: float) -> str:
    return f"{math.exp(loss):,.2f}" if loss < 50 else "inf"
