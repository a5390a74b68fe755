"""Plots and a short table from the CSVs of a results directory.

    python benchmarks/plot.py benchmarks/results/<device>-<date>

Writes <op>.png for every op that was measured at two widths or more (share of the copy bandwidth where the op is bound by memory, TFLOP/s where it
computes, bus bandwidth for collectives, milliseconds otherwise; one line a provider, one panel a mode and dtype), and summary.md: for the largest
shape of each op and mode our time, the ratio to eager, and the best of the others.
"""
import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from measure import table

OURS = "ours"
AXES = (("share_of_copy", "share of copy bandwidth"), ("tflops", "TFLOP/s"), ("gb_per_s", "GB/s"), ("p50_ms", "ms"))


def load(folder: Path) -> list[dict[str, str]]:
    """The rows of every CSV in the folder; ValueError where there is none, or one has another schema."""
    paths = sorted(folder.glob("*.csv"))
    if not paths:
        raise ValueError(f"{folder}: no CSV files; run benchmarks/run_all.py or a benchmark with --output {folder}")
    return table.merge(*(table.read(path) for path in paths))


def width(shape: str) -> int:
    """The last number of a shape: "8192x4096" -> 4096, "4096x4096 V=128256" -> 128256, "64 KB" -> 65536."""
    numbers = re.findall(r"(\d+)\s*(KB|MB|GB)?", shape)
    number, unit = numbers[-1] if numbers else ("0", "")
    return int(number) * {"": 1, "KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30}[unit]


def ops(rows: Sequence[table.Row]) -> list[str]:
    return list(dict.fromkeys(str(r["op"]) for r in rows))


def axis(rows: Sequence[table.Row]) -> tuple[str, str]:
    """What to plot of an op: (column, label)."""
    return next((a for a in AXES if any(r[a[0]] for r in rows)), AXES[-1])


def file_name(op: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "_", op).strip("_") + ".png"


def plot(op: str, rows: Sequence[table.Row], folder: Path) -> Path | None:
    """One PNG, or None where there are not two widths to draw a line between."""
    column, label = axis(rows)
    rows = [r for r in rows if r[column]]
    if len({width(r["shape"]) for r in rows}) < 2:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    modes, dtypes = list(dict.fromkeys(r["mode"] for r in rows)), list(dict.fromkeys(r["dtype"] for r in rows))
    figure, panels = pyplot.subplots(len(dtypes), len(modes), figsize=(4 * len(modes), 3.2 * len(dtypes)), squeeze=False, sharey="row", sharex="col")
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(r["provider"] for r in rows))}
    for i, dtype in enumerate(dtypes):
        for j, mode in enumerate(modes):
            panel = panels[i][j]
            for name, colour in colours.items():
                line = sorted((width(r["shape"]), float(r[column])) for r in rows if (r["provider"], r["dtype"], r["mode"]) == (name, dtype, mode))
                if line:
                    panel.plot(*zip(*line), marker="o", markersize=4, color=colour, label=name, linewidth=2 if name == OURS else 1.2)
            if column == "share_of_copy":
                panel.axhline(0.9, color="grey", linewidth=0.8, linestyle=":")
                panel.set_ylim(bottom=0)
            panel.set_xscale("log", base=2)
            panel.set_title(f"{mode}, {dtype}", fontsize=9)
            panel.grid(alpha=0.3)
            if j == 0:
                panel.set_ylabel(label)
            if i == len(dtypes) - 1:
                panel.set_xlabel("bytes" if "B" in rows[0]["shape"] else "width")
    handles = {text: handle for panel in panels.flat for handle, text in zip(*panel.get_legend_handles_labels())}
    panels[0][0].legend(handles.values(), handles.keys(), fontsize=7)
    figure.suptitle(f"{op} on {rows[0]['device']}", fontsize=10)
    figure.tight_layout()
    path = folder / file_name(op)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def summary(rows: Sequence[table.Row], plots: Sequence[Path] = ()) -> str:
    """Markdown: where and how it was measured, then one line for each op, mode and dtype at its largest shape."""
    device, versions = rows[0]["device"], ", ".join(f"{k} {rows[0][k]}" for k in ("torch", "triton", "cuda", "driver") if rows[0][k])
    commits, dates = sorted({r["commit"] for r in rows}), sorted({r["date"][:10] for r in rows})
    lines = [f"Measured on {device} ({versions}), commit {', '.join(commits)}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}.", "",
             "| op | shape | dtype | mode | ours, ms | x eager | of copy | TFLOP/s | peak MB | error / torch's | best other | its ms |",
             "|---|---|---|---|---:|---:|---:|---:|---:|---:|---|---:|"]
    kernels = [r for r in rows if not is_collective(r)]
    lines += [_line(group) for group in largest(kernels)] if kernels else []
    if not kernels:
        del lines[2:]
    collectives = [r for r in rows if is_collective(r)]
    if collectives:
        lines += ["", "| collective | size | backend, layout | ranks | p50 ms | bus GB/s |", "|---|---|---|---|---:|---:|"]
        lines += ["| " + " | ".join(r[k] for k in ("op", "shape", "provider", "note", "p50_ms", "gb_per_s")) + " |"
                  for group in largest(collectives) for r in group]
    absent = sorted({f"{r['provider']} ({r['op']}: {r['note']})" for r in rows if r["note"] and not r["p50_ms"] and r["note"] != "no gradient"})
    if absent:
        lines += ["", "Without numbers: " + "; ".join(absent) + "."]
    lines += ["", "Commands: " + ", ".join(f"`{c}`" for c in dict.fromkeys(r["command"] for r in rows)) + "."]
    lines += [f"\n![{path.stem}]({path.name})" for path in plots]
    return "\n".join(lines) + "\n"


def is_collective(row: table.Row) -> bool:
    return "[" in row["op"]


def _line(group: Sequence[table.Row]) -> str:
    """One line of the summary: ours, or the first provider where there is none of that name, beside the best of the others."""
    ours = next((r for r in group if r["provider"] == OURS), None) or group[0]
    others = [r for r in group if not r["provider"].startswith(OURS) and r["p50_ms"] and r is not ours]
    best = min(others, key=lambda r: float(r["p50_ms"]), default=None)
    share = f"{100 * float(ours['share_of_copy']):.0f} %" if ours["share_of_copy"] else ""
    return "| " + " | ".join((
        ours["op"], ours["shape"], ours["dtype"], ours["mode"], ours["p50_ms"] or ours["note"], ours["time_over_eager"], share, ours["tflops"],
        ours["peak_mb"], ours["error_ratio"], best["provider"] if best else "", best["p50_ms"] if best else "")) + " |"


def largest(rows: Sequence[table.Row]) -> list[list[table.Row]]:
    """The rows of each op, dtype and mode at its largest shape."""
    groups: dict[tuple, list[table.Row]] = {}
    for r in rows:
        groups.setdefault((r["op"], r["dtype"], r["mode"]), []).append(r)
    return [[r for r in g if r["shape"] == max((x["shape"] for x in g), key=size)] for g in groups.values()]


def size(shape: str) -> int:
    """The product of the numbers of a shape."""
    found = 1
    for number in re.findall(r"\d+", shape):
        found *= max(int(number), 1)
    return found if "B" not in shape else width(shape)


def draw(folder: Path) -> list[Path]:
    """All plots and summary.md of a results directory; returns what was written. ValueError as `load`."""
    rows = load(folder)
    plots = [path for op in ops(rows) if (path := plot(op, [r for r in rows if r["op"] == op], folder))]
    page = folder / "summary.md"
    page.write_text(summary(rows, plots), encoding="utf-8")
    return [*plots, page]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    try:
        print("\n".join(str(path) for path in draw(parser.parse_args().folder)))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
