"""The plots of RLHF's reports, in the style of megatron_ext/observe/plots.py; matplotlib is imported when one is drawn.

Reward against KL comes first: the two alone say what a policy gained and what it gave up for it. Each function gives False, and writes no file,
where there is nothing to draw.
"""
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_ext.observe.plots import BLUE, GREEN, GREY, ORANGE, RED, column, figure_of, finish, smooth

FEW = 20  # points that are drawn one by one


def plot_reward_kl(path: Path, records: Sequence[dict], *, budget: float | None = None, best: int | None = None) -> bool:
    """One point an iteration, coloured by iteration; held-out points are squares.

    Args:
        budget: KL, nats a response, drawn as a line. best: step of the checkpoint that was chosen.
    """
    training = _points(records, "kl_k1", "reward")
    held_out = _points(records, "validation_kl_k1", "validation_reward")
    if not training and not held_out:
        return False
    plt, figure, (axis,) = figure_of(1, 5.0)
    steps = [step for step, *_ in training + held_out]
    scale = {"cmap": "viridis", "vmin": min(steps), "vmax": max(max(steps), min(steps) + 1)}
    for points, marker, size, label in ((training, "o", 22, "rollouts"), (held_out, "s", 46, "held-out prompts")):
        if points:
            number, kl, reward = zip(*points, strict=True)
            axis.plot(kl, reward, color=GREY, linewidth=0.7, alpha=0.45)
            shown = axis.scatter(kl, reward, c=number, marker=marker, s=size, edgecolors="black" if marker == "s" else "none", linewidths=0.8,
                                 zorder=3, label=label, **scale)
    chosen = [point for point in held_out if point[0] == best]
    if chosen:
        axis.scatter(chosen[0][1], chosen[0][2], marker="*", s=260, facecolors="none", edgecolors=ORANGE, linewidths=1.6, zorder=4,
                     label=f"best, iteration {best}")
    if budget is not None:
        axis.axvline(budget, color=RED, linestyle="--", linewidth=1.4, label=f"KL budget ({budget:g})")
    axis.set_ylabel("reward, mean of the responses")
    figure.colorbar(shown, ax=axis, label="iteration", pad=0.01)
    axis.legend(framealpha=0.85, edgecolor="none", fontsize=9)
    axis.set_xlabel("KL to the reference (k1), nats a response")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def plot_policy(path: Path, records: Sequence[dict], *, budget: float | None = None, restarts: Sequence[int] = ()) -> bool:
    """Reward, KL, entropy, response length and clip fraction over iterations."""
    rows = (
        ("reward", ("reward", "validation_reward")), ("KL, nats a response", ("kl_k1", "kl_k3", "validation_kl_k1")),
        ("entropy, nats a token", ("entropy",)), ("response length, tokens", ("response_length", "validation_response_length")),
        ("clip fraction", ("clip_fraction",)),
    )
    limits = {} if budget is None else {"KL, nats a response": (budget, f"budget ({budget:g})")}
    return _panels(path, records, rows, restarts=restarts, limits=limits)


def plot_critic(path: Path, records: Sequence[dict], *, restarts: Sequence[int] = ()) -> bool:
    """Explained variance and loss of the value function."""
    return _panels(path, records, (("explained variance", ("explained_variance",)), ("value loss", ("value_loss",))), restarts=restarts)


def plot_phases(path: Path, records: Sequence[dict], *, restarts: Sequence[int] = ()) -> bool:
    """Where the time of an iteration goes: rollout, scoring and update, one on another."""
    names = ("share_rollout", "share_scoring", "share_update")
    rows = [record for record in records if all(column([record], name)[0] for name in names)]
    if not rows:
        return False
    plt, figure, (axis,) = figure_of(1, 3.2)
    steps = [record["step"] for record in rows]
    shares = [[100 * record[name] for record in rows] for name in names]
    labels = [f"{name.removeprefix('share_')} (median {sorted(share)[len(share) // 2]:.0f} %)" for name, share in zip(names, shares, strict=True)]
    colours, bottom = (BLUE, ORANGE, GREEN), [0.0] * len(rows)
    if len(steps) == 1:  # an area needs two points
        for share, label, colour in zip(shares, labels, colours, strict=True):
            axis.bar(steps, share, bottom=bottom, color=colour, alpha=0.8, label=label, width=0.5)
            bottom = [below + one for below, one in zip(bottom, share, strict=True)]
    else:
        axis.stackplot(steps, *shares, labels=labels, colors=colours, alpha=0.8)
    axis.set_ylim(0, 100)
    axis.set_ylabel("share of an iteration, %")
    finish(plt, figure, (axis,), path, restarts, "iteration")
    return True


def plot_accuracy(path: Path, records: Sequence[dict], *, target: float | None = None, restarts: Sequence[int] = ()) -> bool:
    """Share of pairs in the right order, and the calibration error, over steps."""
    rows = (("pairs in the right order", ("accuracy", "validation_accuracy")), ("calibration error", ("validation_calibration_error",)),
            ("margin", ("margin", "validation_margin")))
    limits = {} if target is None else {"pairs in the right order": (target, f"target ({target:g})")}
    return _panels(path, records, rows, restarts=restarts, limits=limits, xlabel="step")


def plot_reliability(path: Path, bins: Sequence[Sequence[float]]) -> bool:
    """How often the reward model is right where it believes so much in itself.

    Args:
        bins: (pairs, mean confidence, share that was right) of each bin that has any.
    """
    if not bins:
        return False
    plt, figure, (axis,) = figure_of(1, 4.6)
    pairs, confidence, right = zip(*bins, strict=True)
    axis.plot([0.5, 1], [0.5, 1], color=GREY, linestyle="--", linewidth=1.2, label="calibrated")
    axis.plot(confidence, right, color=BLUE, linewidth=1.1, alpha=0.6)
    axis.scatter(confidence, right, s=[18 + 320 * count / max(pairs) for count in pairs], color=BLUE, alpha=0.75, zorder=3,
                 label=f"held-out pairs ({sum(pairs):,.0f}; area: how many)")
    axis.set_xlabel("confidence of the reward model in the order it gives")
    axis.set_ylabel("share that is right")
    axis.set_xlim(0.48, 1.02)
    axis.legend(framealpha=0.85, edgecolor="none", fontsize=9, loc="upper left", markerscale=0.5)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def _points(records: Sequence[dict], x: str, y: str) -> list[tuple[int, float, float]]:
    """(step, x, y) of the records that have both, finite."""
    return [(record["step"], record[x], record[y]) for record in records if column([record], x)[0] and column([record], y)[0]]


def _panels(path: Path, records: Sequence[dict], rows: Sequence[tuple[str, Sequence[str]]], *, restarts: Sequence[int] = (),
            limits: Mapping[str, tuple[float, str]] | None = None, xlabel: str = "iteration") -> bool:
    """One panel a row: its first series is the run's, those of `validation_` are points."""
    drawn = [(label, [(key, *column(records, key)) for key in keys]) for label, keys in rows]
    drawn = [(label, [one for one in series if one[1]]) for label, series in drawn]
    drawn = [(label, series) for label, series in drawn if series]
    if not drawn:
        return False
    limits = limits or {}
    plt, figure, axes = figure_of(len(drawn), 1.9 * len(drawn) + 0.7)
    for axis, (label, series) in zip(axes, drawn, strict=True):
        plain = iter((BLUE, GREEN))
        for key, steps, values in series:
            if key.startswith("validation_"):
                axis.plot(steps, values, color=ORANGE, marker="s", markersize=4, linewidth=1.2, label="held-out")
                continue
            colour = next(plain)
            many, name = len(steps) > 3 * FEW, {"kl_k1": "k1", "kl_k3": "k3"}.get(key, key.replace("_", " "))
            axis.plot(steps, values, color=colour, linewidth=0.9 if many else 1.4, alpha=0.3 if many else 1.0, marker="." if len(steps) <= FEW else None,
                      label=None if many else name)
            if many:
                axis.plot(steps, smooth(values), color=colour, linewidth=1.6, label=name)
        if label in limits:
            value, name = limits[label]
            axis.axhline(value, color=RED, linestyle="--", linewidth=1.3, label=name)
        axis.set_ylabel(label)
        if (len(series) > 1 or label in limits) and axis is not axes[0]:
            axis.legend(framealpha=0.85, edgecolor="none", fontsize=8)
    finish(plt, figure, axes, path, restarts, xlabel)
    return True
