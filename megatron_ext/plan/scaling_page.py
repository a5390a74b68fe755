"""The page of `plan scaling`: numbers, what they mean, and the plot of loss against compute with its interval."""
from dataclasses import asdict
from pathlib import Path

import numpy as np

from megatron_ext.config.schema import Config
from megatron_ext.observe import markdown
from megatron_ext.plan.laws import Law, Points
from megatron_ext.plan.scaling import Prediction, SmallRun, points

PLOT = "scaling.png"
FORMULAS = {"chinchilla": "L = E + A / N^alpha + B / D^beta", "power": "L = E + A / C^alpha"}


def fields(runs: list[SmallRun], law: Law, found: Prediction) -> dict:
    """What --json prints: losses in nats a token, compute in operations."""
    intervals = law.constant_intervals(level=found.level)
    split = law.best_split(found.compute)
    return {
        "prediction": asdict(found), "law": law.kind, "formula": FORMULAS[law.kind], "constants": law.constants,
        "intervals": {name: list(ends) for name, ends in intervals.items()}, "spread": law.spread,
        "best_split": None if split is None else {"size": split[0], "tokens": split[1]},
        "runs": [{"name": run.name, "size": run.size, "tokens": run.tokens, "compute": run.compute, "loss": run.loss,
                  "fitted": float(value)} for run, value in zip(runs, law.loss(points(runs)), strict=True)],
    }


def text(runs: list[SmallRun], law: Law, found: Prediction) -> str:
    """Few lines for a terminal."""
    constants = ", ".join(f"{name} {value:.4g}" for name, value in law.constants.items())
    lines = [
        f"{len(runs)} runs, {runs[0].compute:.2e} to {runs[-1].compute:.2e} operations: {FORMULAS[law.kind]} with {constants}",
        (f"predicted: {found.loss:.4f} nats a token ({found.level:.0%} between {found.low:.4f} and {found.high:.4f}) at {found.size:.3g} parameters, "
        f"{found.tokens:.3g} tokens, {found.compute:.2e} operations ({found.compute / runs[-1].compute:.1f} times the largest run)"),
        f"for comparison: the largest run ended at {found.flat:.4f}; the line through the last two says {found.line:.4f}",
    ]
    split = law.best_split(found.compute)
    if split is not None:
        lines.append(f"with as many operations the law would spend them on {split[0]:.3g} parameters and {split[1]:.3g} tokens")
    return "\n".join(lines)


def write(output: Path, config: Config, runs: list[SmallRun], law: Law, found: Prediction) -> Path:
    """Writes the plot and scaling.md into `output`; returns the page."""
    output.mkdir(parents=True, exist_ok=True)
    plot(output / PLOT, runs, law, found)
    rows = [(run.name, f"{run.size:.4g}", f"{run.tokens:.4g}", f"{run.compute:.3e}", f"{run.loss:.4f}", f"{value:.4f}", f"{value / run.loss - 1:+.2%}")
            for run, value in zip(runs, law.loss(points(runs)), strict=True)]
    intervals = law.constant_intervals(level=found.level)
    constants = [(name, f"{value:.5g}", f"{intervals[name][0]:.5g} to {intervals[name][1]:.5g}") for name, value in law.constants.items()]
    page = [
        f"# The loss of {config.model.name} at {found.compute:.2e} operations, predicted", "", text(runs, law, found), "", f"![loss against compute]({PLOT})", "",
        "## The law", "", (f"`{FORMULAS[law.kind]}` (Hoffmann et al. 2022, section 3.3: Huber's loss of log L). N: parameters in matrix products, D: tokens, "
        "C: training operations."), "", markdown.columns(("constant", "value", f"{found.level:.0%} interval"), constants), "",
        (f"A run lies {law.spread:.2%} from it (standard deviation; not less than scaling.noise={config.scaling.noise:g}). Intervals: {len(law.resamples)} bootstrap "
        "fits. They know nothing of what changes with size and is not in the law (a learning rate that no longer fits, data that repeats)."), "",
        "## The runs", "", markdown.columns(("run", "N", "D", "C", "loss", "law", "off"), rows), "",
    ]
    path = output / "scaling.md"
    path.write_text("\n".join(page), encoding="utf-8")
    return path


def plot(path: Path, runs: list[SmallRun], law: Law, found: Prediction) -> None:
    """Loss against compute: the runs, the prediction with its interval, and the law along the way from the largest run to it."""
    from megatron_ext.observe.plots import BLUE, GREEN, GREY, ORANGE, figure_of

    plt, figure, (axis,) = figure_of(1, 4.6)
    largest = runs[-1]
    share = np.linspace(-0.6, 1.15, 60)
    along = Points(*(getattr(largest, name) * (getattr(found, name) / getattr(largest, name)) ** share for name in ("size", "tokens", "compute")),
                   np.ones_like(share))
    low, high = law.interval(along, level=found.level)
    axis.fill_between(along.compute, low, high, color=BLUE, alpha=0.15, linewidth=0, label=f"{found.level:.0%} interval")
    axis.plot(along.compute, law.loss(along), color=BLUE, linewidth=1.8, label="law, on the way from the largest run")
    axis.plot([run.compute for run in runs], [run.loss for run in runs], "o", color=GREY, markersize=5, label="runs")
    axis.plot([largest.compute, found.compute], [largest.loss, found.line], color=GREEN, linestyle="--", linewidth=1.2, label="line through the last two")
    axis.errorbar([found.compute], [found.loss], [[found.loss - found.low], [found.high - found.loss]], fmt="s", color=ORANGE, capsize=4, label="predicted")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(plt.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(plt.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_xlabel("training operations")
    axis.set_ylabel("validation loss, nats per token")
    axis.legend(framealpha=0.85, edgecolor="none", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
