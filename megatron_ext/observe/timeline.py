"""Where the time of a run went, for people: the picture of its lives, the table of classes, and what a better checkpoint interval would be.

The picture cuts the time from the first submission to the last line into columns. A column's colours are the classes' shares of its time, so that a
run of weeks and a run of seconds look alike; below is the goodput of all that lies to the left. matplotlib is imported when it is drawn.
"""
from collections.abc import Sequence
from pathlib import Path

from . import markdown, plots
from .goodput import CLASSES, LOST, QUEUE, STEP, Goodput, Life, Span, steps_between_saves
from .ledger import MICRO
from .progress import human_time

COLOURS = dict(zip(CLASSES, ("#DDDFE3", "#56B4E9", "#F0E442", "#E69F00", "#009E73", "#0072B2", "#CC79A7", "#6B7079", "#D55E00"), strict=True))
ORDER = (STEP, *(name for name in CLASSES if name not in (STEP, QUEUE)), QUEUE)  # useful work at the bottom, idle nodes at the top
COLUMNS = 400
MOST_LIVES = 20  # rows of the table of lives


def columns(spans: Sequence[Span], count: int = COLUMNS) -> tuple[float, float, dict[str, list[float]]]:
    """(start, width, class -> seconds in each of `count` columns); start in seconds since 1970, width in seconds, 0 where there is nothing."""
    table = {name: [0.0] * count for name in CLASSES}
    lengths = [sum(span.micro.values()) / MICRO for span in spans]
    if not sum(lengths):
        return 0.0, 0.0, table
    start = min(span.start for span in spans)
    width = (max(span.start + length for span, length in zip(spans, lengths, strict=True)) - start) / count
    for span, length in zip(spans, lengths, strict=True):
        place, end = (span.start - start) / width, (span.start - start + length) / width
        for number in range(int(place), min(count, int(end) + 1)):
            share = (min(end, number + 1) - max(place, number)) * width / length
            for name, micro in span.micro.items():
                table[name][number] += micro / MICRO * share
    return start, width, table


def plot_timeline(path: Path, goodput: Goodput) -> bool:
    """False, and no file, when there is nothing to draw."""
    start, width, table = columns(goodput.spans)
    if not width:
        return False
    unit, name = next((each for each in ((86400, "days"), (3600, "hours"), (60, "minutes")) if width * COLUMNS > 3 * each[0]), (1, "seconds"))
    plt, figure, (axis, below) = plots.figure_of(2, 5.0)
    edges = [number * width / unit for number in range(COLUMNS + 1)]
    base = [0.0] * COLUMNS
    for kind in ORDER:
        shares = [100 * seconds / width for seconds in table[kind]]
        if any(shares):
            top = [one + share for one, share in zip(base, shares, strict=True)]
            axis.stairs(top, edges, baseline=base, fill=True, color=COLOURS[kind], label=kind, linewidth=0)
            base = top
    _ends(axis, goodput.lives, lambda moment: (moment - start) / unit)
    axis.set(ylim=(0, 108), ylabel="share of the time, %")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1.24), ncols=6, frameon=False, fontsize=9, columnspacing=1.2, handlelength=1.2)
    useful, allocated, shown = 0.0, 0.0, []
    for number in range(COLUMNS):
        useful += table[STEP][number]
        allocated += sum(table[kind][number] for kind in CLASSES if kind != QUEUE)
        shown.append(100 * useful / allocated if allocated else None)
    below.plot([x for x, y in zip(edges[1:], shown, strict=True) if y is not None], [y for y in shown if y is not None], color=COLOURS[STEP], linewidth=1.8)
    below.set(ylim=(0, 102), ylabel="goodput so far, %", xlabel=f"{name} since the start", xlim=(0, edges[-1]))
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def _ends(axis, lives: Sequence[Life], place) -> None:
    """A cross where a life failed, a stroke where one ended as it should."""
    for marker, clean, label in (("x", False, "a life failed"), ("|", True, "a life ended")):
        at = [place(life.ended) for life in lives if life.clean is clean]
        if at:
            axis.plot(at, [104] * len(at), marker, color="black", markersize=6, markeredgewidth=1.6, label=label, clip_on=False)


def sentence(goodput: Goodput) -> str:
    """Goodput, failures and the interval in words."""
    if goodput.goodput is None:
        return "Nothing was allocated yet."
    seconds, failed = goodput.seconds, goodput.failures
    said = [f"Goodput {100 * goodput.goodput:.1f} %: {duration(seconds[STEP])} of steps that were kept in {duration(goodput.allocated)} of allocation, over "
            + f"{_count(len(goodput.lives), 'life', 'lives')}."]
    if failed:
        said.append(f"{_count(failed, 'life', 'lives')} failed: a mean time to failure of {duration(goodput.mttf)}.")
    if goodput.interval is not None:
        steps = steps_between_saves(goodput, goodput.step_seconds)
        said.append(f"A save takes {duration(goodput.write_seconds)}, so that one every {duration(goodput.interval)}"
                    + (f" ({_count(steps, 'step', 'steps')})" if steps else "") + " would cost least: sqrt(2 x MTTF x write time).")
    return " ".join(said)


def class_table(goodput: Goodput) -> str:
    """Time in each class that has any, and its share of the allocation."""
    rows = [(name, duration(spent), "not allocated" if name == QUEUE else f"{100 * spent / goodput.allocated:.1f} %")
            for name, spent in goodput.seconds.items() if spent]
    return markdown.columns(("class", "time", "share of the allocation"), [*rows, ("in all", duration(goodput.wall), "")])


def life_table(lives: Sequence[Life]) -> str:
    """A row a life; of many the middle is left out."""
    shown = list(lives) if len(lives) <= MOST_LIVES else [*lives[: MOST_LIVES // 4], None, *lives[-(MOST_LIVES - MOST_LIVES // 4):]]
    rows = []
    for life in shown:
        if life is None:
            rows.append(("...", f"{len(lives) - MOST_LIVES} left out", "", "", "", ""))
            continue
        spent = life.seconds
        steps = "-" if life.first is None else f"{life.first:,} to {life.last:,}"
        ended = {None: "running, or killed", False: life.reason or "died", True: life.reason or "closed"}[life.clean]
        rows.append((life.number, duration(life.ended - life.started), steps, duration(spent[STEP]), duration(spent[LOST]), ended))
    return markdown.columns(("life", "time", "steps", "kept", "lost work", "end"), rows)


def summary(goodput: Goodput) -> dict[str, object]:
    """The figures for programs, JSON. Seconds; shares of 1."""
    return {
        "goodput": goodput.goodput, "allocated": goodput.allocated, "wall": goodput.wall, "seconds": goodput.seconds, "steps": goodput.steps,
        "lives": len(goodput.lives), "failures": goodput.failures, "mttf": goodput.mttf, "write_seconds": goodput.write_seconds,
        "interval": goodput.interval, "interval_steps": steps_between_saves(goodput, goodput.step_seconds) or None,
    }


def duration(seconds: float) -> str:
    """As people read it: two units, hundredths below ten seconds."""
    return f"{seconds:.2f}s" if seconds < 10 else human_time(seconds)


def _count(number: int, one: str, more: str) -> str:
    return f"{number:,} {one if number == 1 else more}"
