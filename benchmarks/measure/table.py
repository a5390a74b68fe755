"""The one CSV schema of all benchmarks: reading, writing, merging, and a table to read on a terminal."""
import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from megatron_ext.files import write_whole

COLUMNS = (
    "op", "mode", "shape", "dtype", "provider",
    "p20_ms", "p50_ms", "p80_ms", "time_over_eager",
    "gb_per_s", "copy_gb_per_s", "share_of_copy", "tflops", "peak_mb",
    "error", "error_of_torch", "error_ratio", "note",
    "device", "sm_clock_mhz", "memory_clock_mhz", "threads", "torch", "triton", "cuda", "driver", "commit", "date", "command",
)
KEY = ("op", "mode", "shape", "dtype", "provider", "device", "threads")
Row = Mapping[str, object]


def row(**values: object) -> dict[str, str]:
    """A full row as text: numbers with four significant digits, what is not known blank. KeyError for a column that is not in the schema."""
    for name in values:
        if name not in COLUMNS:
            raise KeyError(f"{name} is no column of the schema")
    return {name: _text(values.get(name)) for name in COLUMNS}


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())


def merge(*parts: Iterable[Row]) -> list[dict[str, str]]:
    """Rows of several runs: of rows for the same op, mode, shape, dtype, provider, device and threads the last one counts, in its first place."""
    found: dict[tuple, dict[str, str]] = {}
    for part in parts:
        for r in part:
            found[tuple(str(r[k]) for k in KEY)] = {name: str(r[name]) for name in COLUMNS}
    return list(found.values())


def read(path: Path) -> list[dict[str, str]]:
    """ValueError where the file has another schema."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: not the schema of these benchmarks (columns {', '.join(reader.fieldnames or ())})")
        return list(reader)


def write(path: Path, rows: Iterable[Row]) -> None:
    """Whole or not at all: a reader, or a job that is killed, never sees half a file."""
    text = io.StringIO(newline="")
    print_csv(rows, text)
    write_whole(path, text.getvalue())


def print_csv(rows: Iterable[Row], file, header: bool = True) -> None:
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)


SHOWN = (("provider", "provider"), ("p50_ms", "p50 ms"), ("p20_ms", "p20"), ("p80_ms", "p80"), ("time_over_eager", "x eager"), ("gb_per_s", "GB/s"),
         ("share_of_copy", "of copy"), ("tflops", "TFLOP/s"), ("peak_mb", "peak MB"), ("error_ratio", "error/torch"), ("note", "note"))


def readable(rows: Sequence[Row]) -> str:
    """A table for each op, shape, dtype and mode; columns that hold nothing are left out."""
    lines, group = [], None
    shown = [(name, title) for name, title in SHOWN if any(r[name] for r in rows)]
    widths = {name: max(len(title), *(len(_cell(r, name)) for r in rows)) for name, title in shown} if rows else {}
    for r in rows:
        now = tuple(r[k] for k in ("op", "shape", "dtype", "mode"))
        if now != group:
            group = now
            lines += ["", " ".join(now), "  " + "  ".join(_aligned(title, widths[name], name) for name, title in shown)]
        lines.append("  " + "  ".join(_aligned(_cell(r, name), widths[name], name) for name, _ in shown).rstrip())
    return "\n".join(lines[1:])


def _cell(r: Row, name: str) -> str:
    text = str(r[name])
    return f"{100 * float(text):.1f} %" if name == "share_of_copy" and text else text


def _aligned(text: str, width: int, name: str) -> str:
    return text.ljust(width) if name in ("provider", "note") else text.rjust(width)
