"""How every op is measured: one file an op (`bench_<op>.py`) yields `Case`s, this does the rest.

    python benchmarks/bench_<op>.py [--device cpu|cuda] [--quick] [--output DIR] [--providers a b] [--dtype bfloat16] [--shapes '*x4096']
                                    [--modes forward backward both] [--threads N]

Without --output the CSV goes to stdout and a table to read to stderr; with it, into DIR/<op>.csv (rows of an earlier run for the same case are
replaced), and the table to stdout.

Modes: `forward` with autograd on, as in training; `backward` is torch.autograd.grad over a graph that is kept; `both` is one after the other.
Columns: `measure/table.py`. `share_of_copy` is 100 % where the op moves its bytes (the traffic model of its docstring, not a counter's) as fast
as torch's copy of a large tensor does on this device in the same turns (`copy_gb_per_s`). `peak_mb` (10^6 bytes) is beyond what stood before the call. `error` is
max |x - fp64| / max |fp64| of the worst result, `error_of_torch` the same for PyTorch in the same dtype, `error_ratio` their quotient.
What a provider cannot do (not installed, out of memory, an exception) is a row with the reason in `note`.
"""
import argparse
import fnmatch
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # kernels/, without an installation

import torch
from measure import machine, table, timing
from measure.case import MODES, Case, NotInstalled, compiled, optional, short
from measure.memory import peak_bytes
from measure.run import Run, measure

__all__ = ["Case", "NotInstalled", "compiled", "main", "measure", "optional", "peak_bytes"]


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line and ends with 2."""

    def error(self, message: str):
        self.exit(2, f"error: {message}\n")


def parser(description: str, *, dtype: bool = True) -> Parser:
    """The options that all benchmarks share; `dtype`: whether that is one."""
    made = Parser(description=description, allow_abbrev=False)
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where torch sees a GPU")
    made.add_argument("--quick", action="store_true", help="the first case of each op and dtype, a tenth of the time: does it work?")
    made.add_argument("--output", type=Path, metavar="DIR", help="write DIR/<op>.csv instead of CSV to stdout")
    if dtype:
        made.add_argument("--dtype", nargs="+", default=[], metavar="DTYPE", help="float32, bfloat16, ...")
    made.add_argument("--threads", type=int, help="of torch on CPU; default: torch's own")
    return made


def device_of(options: argparse.Namespace, refuse: Callable[[str], None]) -> torch.device:
    """The device that was asked for, with `--threads` and `--output` checked and the threads set."""
    if options.device == "cuda" and not torch.cuda.is_available():
        refuse("argument --device: torch sees no CUDA device here")
    if options.threads is not None and options.threads < 1:
        refuse(f"argument --threads: {options.threads} is below 1")
    if options.output is not None and options.output.exists() and not options.output.is_dir():
        refuse(f"argument --output: {options.output} is a file; name a directory")
    if options.threads:
        torch.set_num_threads(options.threads)
    cuda = options.device == "cuda" or options.device == "auto" and torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def chosen(cases: Iterable[Case], options: argparse.Namespace, refuse: Callable[[str], None]) -> list[Case]:
    """The cases that the options leave; refuses names that match none."""
    cases = list(cases)
    known = {"--providers": {p for c in cases for p in c.providers}, "--dtype": {short(c.dtype) for c in cases}}
    for option, asked in (("--providers", options.providers), ("--dtype", options.dtype)):
        for name in asked:
            if cases and name not in known[option]:
                refuse(f"argument {option}: {name} is none of {', '.join(sorted(known[option]))}")
    for pattern in options.shapes:
        if cases and not any(fnmatch.fnmatchcase(c.shape, pattern) for c in cases):
            refuse(f"argument --shapes: {pattern} matches none of {', '.join(dict.fromkeys(c.shape for c in cases))}")
    left = [c for c in cases if (not options.dtype or short(c.dtype) in options.dtype)
            and (not options.shapes or any(fnmatch.fnmatchcase(c.shape, p) for p in options.shapes))]
    if options.quick:
        left = list({(c.op, c.dtype): c for c in reversed(left)}.values())[::-1]
    return left


def main(cases: Callable[[str], Iterable[Case]], argv: Sequence[str] | None = None) -> None:
    """The command of a benchmark: parses the options, measures, writes. Ends the process with 2 for bad options.

    Args:
        cases: device type ("cuda", "cpu") -> the cases that make sense there.
    """
    stem = Path(sys.argv[0]).stem.removeprefix("bench_")
    options_parser = parser(f"Measures {stem}; see benchmarks/harness.py.")
    options_parser.add_argument("--providers", nargs="+", default=[], metavar="NAME")
    options_parser.add_argument("--shapes", nargs="+", default=[], metavar="PATTERN", help="as in the shape column; * matches anything")
    options_parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    options = options_parser.parse_args(argv)
    device = device_of(options, options_parser.error)
    left = chosen(cases(device.type), options, options_parser.error)
    if not left:
        print(f"{stem}: no cases for {device.type}", file=sys.stderr)
        return
    run = Run(device, timing.QUICK if options.quick else timing.FULL, timing.Copy(device), machine.describe(device), options.modes, options.providers)
    page = sys.stdout if options.output else sys.stderr
    rate = run.copy.bandwidth(timing.seconds_in_turns({"": run.copy}, device, run.budget).times[""])
    print(f"{run.columns['device']}: copy {rate / 1e9:.1f} GB/s", file=page)
    sink = Sink(options.output, stem)
    for case in left:
        rows = measure(case, run)
        sink.add(rows)
        print("\n" + table.readable(rows), file=page, flush=True)


class Sink:
    """Where rows go as they come: DIR/<stem>.csv, merged with what it holds, or stdout."""

    def __init__(self, folder: Path | None, stem: str):
        self.path = folder / f"{stem}.csv" if folder else None
        self.rows = table.read(self.path) if self.path and self.path.exists() else []
        self.headed = False

    def add(self, rows: Sequence[table.Row]) -> None:
        if self.path is None:
            table.print_csv(rows, sys.stdout, header=not self.headed)
            sys.stdout.flush()
            self.headed = True
        else:
            self.rows = table.merge(self.rows, rows)
            table.write(self.path, self.rows)
