"""Pictures of a plan: memory by part, time by part, and tokens a second against the number of GPUs. matplotlib is imported when they are drawn."""
from dataclasses import replace
from pathlib import Path

from megatron_ext.config.schema import Config
from megatron_ext.observe.plots import BLUE, GREEN, GREY, ORANGE, RED, figure_of
from megatron_ext.plan.calibration import Calibration
from megatron_ext.plan.hardware import GIB, timed
from megatron_ext.plan.memory import limit
from megatron_ext.plan.text import PARTS, Plan
from megatron_ext.plan.timing import step_time

COLOURS = (BLUE, "#56B4E9", GREEN, ORANGE, "#E69F00", RED, GREY)


def draw(plan: Plan, calibration: Calibration, folder: Path) -> list[Path]:
    """Writes memory.png, and where the GPU is known time.png and scaling.png, into `folder`. Returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    found = [memory(plan, folder / "memory.png")]
    if plan.step is not None:
        found.append(time(plan, folder / "time.png"))
    if plan.step is not None and timed(plan.config.hardware):
        found.append(scaling(plan.config, calibration, plan.vocab, folder / "scaling.png"))
    return found


def memory(plan: Plan, path: Path) -> Path:
    """A bar for each pipeline stage that can be the fullest."""
    plt, figure, (axis,) = figure_of(1, 1.6 + 0.5 * len(plan.ranks))
    names, left = [f"stage {one.pipeline_rank}" for one in plan.ranks], [0.0] * len(plan.ranks)
    for part, colour in zip(PARTS, COLOURS, strict=True):
        sizes = [getattr(one, part) / GIB for one in plan.ranks]
        axis.barh(names, sizes, left=left, color=colour, label=part, height=0.6)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    if (most := limit(plan.config)) is not None:
        axis.axvline(most / GIB, color="black", linewidth=1.2, linestyle="--", label=plan.config.hardware.name)
    axis.invert_yaxis()
    axis.set_xlabel("GiB a rank")
    figure.legend(loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def time(plan: Plan, path: Path) -> Path:
    """Seconds of a step by part."""
    parts = sorted(((name, seconds) for name, seconds in plan.step.parts.items() if seconds), key=lambda one: one[1])
    plt, figure, (axis,) = figure_of(1, 1.2 + 0.3 * len(parts))
    bars = axis.barh([name for name, _ in parts], [seconds for _, seconds in parts], color=BLUE, height=0.65)
    axis.bar_label(bars, [f" {100 * seconds / plan.step.seconds:.1f} %" for _, seconds in parts], fontsize=8)
    axis.set_xlabel(f"seconds of a step of {plan.step.seconds:.2f} s")
    axis.margins(x=0.12)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def scaling(config: Config, calibration: Calibration, vocab: int, path: Path) -> Path:
    """Tokens a second over GPUs, the layout of a replica and the batch unchanged, beside a line through the smallest."""
    replica = config.parallel.tp * config.parallel.pp * config.parallel.cp
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size
    group = config.parallel.pp if config.parallel.vpp else 1
    counts = [d for d in range(1, batch + 1) if batch % (d * micro * group) == 0]
    points = [(d * replica, step_time(replace(config, launch=replace(config.launch, ranks=d * replica)), calibration, vocab)) for d in counts]
    plt, figure, (axis,) = figure_of(1, 3.6)
    ranks, speeds = [n for n, _ in points], [step.tokens_per_second for _, step in points]
    axis.loglog(ranks, speeds, color=BLUE, marker="o", markersize=4, label="planned")
    axis.loglog(ranks, [speeds[0] * n / ranks[0] for n in ranks], color=GREY, linestyle="--", label="linear")
    for n, step in points:
        if step.mfu is not None:
            axis.annotate(f"{100 * step.mfu:.0f} %", (n, step.tokens_per_second), textcoords="offset points", xytext=(4, -11), fontsize=7)
    axis.set_xlabel(f"GPUs (batch {batch}, MFU at the points)")
    axis.set_ylabel("tokens per second")
    axis.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
