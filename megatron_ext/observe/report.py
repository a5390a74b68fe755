"""`report.md`: what a run was, what came out of it, and how it went, from the files of its directory and what the caller adds.

It reads config.yaml, metrics.jsonl and events.jsonl; any of them may be missing, cut short, or hold a few records only.
"""
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import plots
from .events import read_events
from .metrics import read_metrics
from .progress import human_count, human_time

Section = Mapping[str, object] | str


def write_report(
    run_dir: Path, *, title: str, sections: Mapping[str, Section] | None = None, samples: Sequence[Mapping[str, str]] = (),
    bytes_per_token: float | None = None, baseline_bits_per_byte: float | None = None, baseline_name: str = "interpolated trigram",
) -> Path:
    """Write `run_dir`/report.md and its plots.

    Args:
        sections: heading -> a table of names and values, or Markdown text; in this order (evaluation, corpus, hardware, versions, ...).
        samples: {"prompt": ..., "completion": ...} each.
        bytes_per_token: of the validation data, turns nats a token into bits a byte. baseline_bits_per_byte: drawn beside the loss.

    Returns:
        The path of the report.
    """
    run_dir = Path(run_dir)
    records, events = read_metrics(run_dir / "metrics.jsonl"), read_events(run_dir / "events.jsonl")
    restarts = [e["step"] for e in events if e["kind"] == "resume" and isinstance(e.get("step"), int)] if events else []
    baseline = None if baseline_bits_per_byte is None else (baseline_name, baseline_bits_per_byte)
    parts = [f"# {title}", _verdict(events)]
    parts.append(_table(_summary(records, events, bytes_per_token, baseline)))
    parts.append(_pictures(run_dir, records, restarts, bytes_per_token, baseline))
    for heading, body in (sections or {}).items():
        parts.append(f"## {heading}\n\n{body if isinstance(body, str) else _table(body)}")
    if samples:
        parts.append("## Samples")
        parts += [f"{_fenced(s['prompt'])}\n\ncontinues\n\n{_fenced(s['completion'])}" for s in samples]
    if events:
        parts.append("## Events\n\n" + _event_table(events))
    config = run_dir / "config.yaml"
    if config.exists():
        text = config.read_text(encoding="utf-8")
        parts.append(f"## Configuration\n\n<details><summary>config.yaml</summary>\n\n{_fenced(text, 'yaml')}\n\n</details>")
    path = run_dir / "report.md"
    draft = path.with_name("report.md.tmp")
    draft.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    os.replace(draft, path)
    return path


def _verdict(events: Sequence[dict]) -> str:
    for event in reversed(events):
        if event.get("kind") == "stop":
            return f"Stopped because {event.get('reason', 'of an unnamed reason')}."
        if event.get("kind") in ("start", "resume"):
            return "No stop was recorded: the run is still going on, or was killed."
    return ""


def _summary(records: Sequence[dict], events: Sequence[dict], bytes_per_token: float | None, baseline: tuple[str, float] | None) -> dict:
    out: dict[str, object] = {}
    if not records:
        return {"steps": "no metrics were recorded"}
    out["steps"] = f"{records[-1]['step']:,}"
    if isinstance(records[-1].get("tokens"), (int, float)):
        out["tokens"] = human_count(records[-1]["tokens"])
    _, losses = plots.column(records, "loss")
    if losses:
        tail = losses[-max(1, len(losses) // 50):]
        out["training loss, first -> last"] = f"{losses[0]:.4f} -> {sum(tail) / len(tail):.4f} nats per token"
    _, validation = plots.column(records, "validation_loss")
    if validation:
        out["validation loss, last (best)"] = f"{validation[-1]:.4f} ({min(validation):.4f}) nats per token, perplexity {_exp(validation[-1])}"
    _, bits = plots.column(records, "validation_bits_per_byte")
    if not bits and validation and bytes_per_token:
        bits = [loss / math.log(2) / bytes_per_token for loss in validation]
    if bits:
        out["validation, bits per byte"] = f"{bits[-1]:.4f}"
    if baseline is not None:
        out[f"{baseline[0]}, bits per byte"] = f"{baseline[1]:.4f}"
        if bits:
            gap = baseline[1] - bits[-1]
            out["model against it"] = f"{abs(gap):.4f} bits per byte {'below (better)' if gap >= 0 else 'above (worse)'}"
    _, speed = plots.column(records, "tokens_per_second")
    if speed:
        out["tokens per second, median"] = f"{sorted(speed)[len(speed) // 2]:,.0f}"
    _, mfu = plots.column(records, "mfu")
    if mfu:
        out["MFU, median"] = f"{100 * sorted(mfu)[len(mfu) // 2]:.1f} %"
    _, memory = plots.column(records, "gpu_memory_used")
    if memory:
        out["GPU memory, most"] = f"{max(memory):.1f} GiB"
    bad = sum(1 for r in records if isinstance(r.get("loss"), float) and not math.isfinite(r["loss"]))
    if bad:
        out["non-finite losses"] = f"{bad:,}"
    stops = [e for e in events if e.get("kind") == "stop" and isinstance(e.get("elapsed"), (int, float))]
    if stops:
        out["wall time"] = human_time(stops[-1]["elapsed"])
    resumes = sum(1 for e in events if e.get("kind") == "resume")
    if resumes:
        out["resumed"] = f"{resumes} time{'s' if resumes > 1 else ''}"
    return out


def _pictures(run_dir: Path, records: Sequence[dict], restarts: Sequence[int], bytes_per_token: float | None,
              baseline: tuple[str, float] | None) -> str:
    try:
        drawn = [
            ("Loss", "loss.png", plots.plot_loss(run_dir / "loss.png", records, bytes_per_token=bytes_per_token, baseline=baseline,
                                                 restarts=restarts)),
            ("Throughput", "throughput.png", plots.plot_throughput(run_dir / "throughput.png", records, restarts=restarts)),
            ("Learning rate and gradient norm", "optimizer.png", plots.plot_optimizer(run_dir / "optimizer.png", records, restarts=restarts)),
        ]
    except ImportError:
        return "There are no plots: matplotlib is not installed (`pip install matplotlib`)."
    return "\n\n".join(f"## {heading}\n\n![{heading}]({name})" for heading, name, done in drawn if done)


def _event_table(events: Sequence[dict], most: int = 40) -> str:
    shown = list(events) if len(events) <= most else [*events[: most // 4], None, *events[-(most - most // 4):]]
    rows = ["| time | event | |", "|---|---|---|"]
    for event in shown:
        if event is None:
            rows.append(f"| ... | {len(events) - most} events left out | |")
            continue
        details = ", ".join(f"{k} {_value(v)}" for k, v in event.items() if k not in ("time", "kind"))
        rows.append(f"| {_cell(str(event.get('time', ''))[:19].replace('T', ' '))} | {_cell(event.get('kind', ''))} | {_cell(details)} |")
    return "\n".join(rows)


def _table(rows: Mapping[str, object]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {_cell(name)} | {_cell(_value(value))} |" for name, value in rows.items())])


def _value(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


def _cell(text: object) -> str:
    return str(text).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def _fenced(text: str, language: str = "text") -> str:
    fence = "```"
    while fence in text:  # a text may hold fences of its own
        fence += "`"
    return f"{fence}{language}\n{text.rstrip(chr(10))}\n{fence}"


def _exp(loss: float) -> str:
    return f"{math.exp(loss):,.2f}" if loss < 50 else "inf"
