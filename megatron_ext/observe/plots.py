"""The plots of a report, as PNG files. matplotlib is imported when a plot is drawn; colours are Okabe and Ito's, told apart by all eyes."""
import math
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

BLUE, ORANGE, GREEN, GREY, RED = "#0072B2", "#D55E00", "#009E73", "#8A8F98", "#CC79A7"


def column(records: Sequence[dict], key: str, scale: float = 1.0) -> tuple[list[int], list[float]]:
    """Steps and finite values of one field; records without it are left out."""
    rows = [(r["step"], r[key] * scale) for r in records
            if isinstance(r.get(key), (int, float)) and not isinstance(r.get(key), bool) and math.isfinite(r[key])]
    return [step for step, _ in rows], [value for _, value in rows]


def smooth(values: Sequence[float]) -> list[float]:
    """Mean over a window of about a fiftieth of the run, narrower at the ends. Centred: a trailing mean lags behind a falling loss and
    would draw it above the validation loss."""
    half, sums = max(1, len(values) // 100), [0.0, *accumulate(values)]
    out = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        out.append((sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1))
    return out


def plot_loss(path: Path, records: Sequence[dict], *, bytes_per_token: float | None = None, baseline: tuple[str, float] | None = None,
              restarts: Sequence[int] = (), unit: str = "nats per token") -> bool:
    """Training and validation loss; on the right in bits a byte where the bytes of a token are known.

    Args:
        baseline: name and bits per byte, drawn as a line (needs `bytes_per_token`). restarts: steps at which the run was resumed.

    Returns:
        False, and no file, when there is nothing to draw.
    """
    steps, losses = column(records, "loss")
    val_steps, val_losses = column(records, "validation_loss")
    if not steps and not val_steps:
        return False
    plt, figure, (axis,) = figure_of(1, 4.6)
    if steps:
        axis.plot(steps, losses, color=BLUE, alpha=0.28 if len(steps) > 20 else 1.0, linewidth=0.9 if len(steps) > 20 else 1.6,
                  marker="." if len(steps) <= 20 else None, label=None if len(steps) > 20 else "training")
        if len(steps) > 20:
            axis.plot(steps, smooth(losses), color=BLUE, linewidth=1.8, label="training (smoothed)")
    if val_steps:
        axis.plot(val_steps, val_losses, color=ORANGE, marker="o", markersize=4, linewidth=1.6, label=f"validation (last {val_losses[-1]:.3f})")
    if baseline is not None and bytes_per_token:
        name, bits = baseline
        axis.axhline(bits * math.log(2) * bytes_per_token, color=GREEN, linestyle="--", linewidth=1.5, label=f"{name} ({bits:.3f} bits/byte)")
    axis.set_ylabel(f"loss, {unit}")
    if bytes_per_token:
        factor = 1 / (math.log(2) * bytes_per_token)
        right = axis.secondary_yaxis("right", functions=(lambda x: x * factor, lambda x: x / factor))
        right.set_ylabel("bits per byte")
        right.spines["right"].set_visible(False)
    finish(plt, figure, (axis,), path, restarts)
    return True


def plot_throughput(path: Path, records: Sequence[dict], *, restarts: Sequence[int] = ()) -> bool:
    """Tokens a second, with its median; False when there is nothing to draw."""
    steps, speed = column(records, "tokens_per_second")
    if not steps:
        return False
    median = sorted(speed)[len(speed) // 2]
    unit, name = (1e3, "thousand ") if median >= 10_000 else (1.0, "")
    plt, figure, (axis,) = figure_of(1, 3.2)
    axis.plot(steps, [v / unit for v in speed], color=BLUE, linewidth=0.9, alpha=0.8, marker="." if len(steps) <= 20 else None)
    axis.axhline(median / unit, color=GREY, linestyle="--", linewidth=1.2, label=f"median {median:,.0f} tokens/s")
    axis.set_ylim(0, 1.25 * sorted(speed)[min(len(speed) - 1, int(0.99 * len(speed)))] / unit)
    axis.set_ylabel(f"{name}tokens per second")
    finish(plt, figure, (axis,), path, restarts)
    return True


def plot_optimizer(path: Path, records: Sequence[dict], *, restarts: Sequence[int] = ()) -> bool:
    """Learning rate above, gradient norm (logarithmic) below; False when there is neither."""
    rate, norm = column(records, "lr"), column(records, "grad_norm")
    drawn = [(x, y, label) for (x, y), label in ((rate, "learning rate"), (norm, "gradient norm")) if x]
    if not drawn:
        return False
    plt, figure, axes = figure_of(len(drawn), 2.3 * len(drawn) + 0.6)
    for axis, (x, y, label) in zip(axes, drawn, strict=True):
        axis.plot(x, y, color=BLUE if label == "learning rate" else ORANGE, linewidth=1.1, marker="." if len(x) <= 20 else None)
        axis.set_ylabel(label)
        if label == "gradient norm" and min(y) > 0 and max(y) > 5 * min(y):
            axis.set_yscale("log")
            for each in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                each(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "125" else "")
        elif label == "learning rate":
            axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
            axis.set_ylim(bottom=0)
    finish(plt, figure, axes, path, restarts)
    return True


def figure_of(rows: int, height: float) -> tuple:
    """(pyplot, figure, axes one above another) in the reports' style. height: inches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, 1, figsize=(8.2, height), sharex=True, squeeze=False, layout="constrained")
    for axis in axes[:, 0]:
        axis.grid(True, color="#E3E5E8", linewidth=0.8)
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    return plt, figure, tuple(axes[:, 0])


def finish(plt, figure, axes: tuple, path: Path, restarts: Sequence[int], xlabel: str = "step") -> None:
    """Restarts, the step axis, the legend; then the file."""
    for axis in axes:
        for i, step in enumerate(restarts):
            axis.axvline(step, color=RED, linestyle=":", linewidth=1.3, label="resumed" if i == 0 and axis is axes[0] else None)
    axes[-1].set_xlabel(xlabel)
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    axes[-1].margins(x=0.02)
    if axes[0].get_legend_handles_labels()[1]:
        axes[0].legend(framealpha=0.85, edgecolor="none", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
