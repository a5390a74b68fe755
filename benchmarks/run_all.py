"""Runs the benchmark of every op, and leaves one directory: a CSV an op, environment.json, plots, summary.md.

    python benchmarks/run_all.py [--device cpu|cuda] [--quick] [--output DIR] [--only rms_norm swiglu] [--threads N] [--ranks N]
    python benchmarks/run_all.py --list            the names, one a line, in the order of --index
    python benchmarks/run_all.py --index 3 ...     that one alone, without plots: a job of a Slurm array (slurm/bench.sbatch)
    python benchmarks/run_all.py --merge DIR       environment.json, plots and summary.md of what such jobs wrote

DIR is benchmarks/results/<device>-<date> unless given. Each benchmark is a process of its own: one that dies is named at the end (exit code 1) and
the others go on. The collectives run on --ranks ranks of this machine: all GPUs unless given, 2 on CPU, none with one GPU; across nodes it is
slurm/bench_submit.sh that starts them.
"""
import argparse
import ast
import json
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARIES = ("liger-kernel", "transformer-engine", "flash-attn", "apex", "megatron-core", "numpy")


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"error: {message}\n")


def names(folder: Path = HERE) -> list[str]:
    """The ops that have a benchmark with `cases` (those with an output of their own are run by hand). No torch: login nodes ask this."""
    found = []
    for path in sorted(folder.glob("bench_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "cases" for node in tree.body):
            found.append(path.stem.removeprefix("bench_"))
    return found


def layouts(ranks: int) -> list[list[str]]:
    """Options of bench_collectives.py: all ranks in one group, and pairs beside replicas of pairs."""
    found = [["--tp", str(ranks)]]
    return [*found, ["--tp", "2"]] if ranks >= 4 and ranks % 2 == 0 else found


def slug(device: str) -> str:
    """"NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def environment(device) -> dict[str, object]:
    """What the rows do not say about the machine."""
    import torch
    from measure import machine

    found = machine.describe(device) | {
        "host": socket.gethostname(), "python": platform.python_version(), "system": platform.platform(), "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "libraries": {name: version for name in LIBRARIES if (version := machine.version(name))},
        "slurm_job": os.environ.get("SLURM_JOB_ID", ""),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"memory_gb": round(properties.total_memory / 1e9, 1), "multiprocessors": properties.multi_processor_count,
                  "capability": f"{properties.major}.{properties.minor}", "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    return found


def run(name: str, words: Sequence[str], output: Path) -> int:
    """One benchmark as a process of its own; its exit code."""
    print(f"== {name}", flush=True)
    command = [sys.executable, str(HERE / f"bench_{name}.py"), *words, "--output", str(output)]
    return subprocess.run(command, cwd=HERE.parent, check=False).returncode


def merge(folder: Path) -> list[Path]:
    """The parts that the jobs of an array left become environment.json; plots and summary are made. ValueError where there is nothing."""
    from plot import draw

    written = draw(folder)
    parts = sorted(folder.glob("environment.*.json"))
    if parts:
        together = {part.name.split(".")[1]: json.loads(part.read_text()) for part in parts}
        (folder / "environment.json").write_text(json.dumps(together, indent=1) + "\n", encoding="utf-8")
        for part in parts:
            part.unlink()
    return [folder / "environment.json", *written]


def options_of(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Parser]:
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, metavar="DIR")
    parser.add_argument("--only", nargs="+", metavar="OP")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--ranks", type=int, help="of the collectives; 0 leaves them out")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true")
    what.add_argument("--index", type=int)
    what.add_argument("--merge", type=Path, metavar="DIR")
    options = parser.parse_args(argv)
    known = names()
    for name in options.only or []:
        if name not in (*known, "collectives"):
            parser.error(f"argument --only: {name} is none of {', '.join([*known, 'collectives'])}")
    if options.index is not None and not 0 <= options.index < len(known):
        parser.error(f"argument --index: {options.index} is not in 0..{len(known) - 1} (--list shows them)")
    return options, parser


def main(argv: Sequence[str] | None = None) -> int:
    options, parser = options_of(argv)
    if options.list:
        print("\n".join(names()))
        return 0
    if options.merge:
        try:
            print("\n".join(map(str, merge(options.merge))))
        except ValueError as error:
            parser.error(str(error))
        return 0
    import torch
    from harness import device_of
    from measure import machine

    device = device_of(options, parser.error)
    output = options.output or HERE / "results" / f"{slug(machine.device_name(device))}-{date.today()}"
    output.mkdir(parents=True, exist_ok=True)
    words = ["--device", device.type, *(["--quick"] if options.quick else []), *(["--threads", str(options.threads)] if options.threads else [])]
    one = options.index is not None
    todo = [names()[options.index]] if one else [n for n in names() if not options.only or n in options.only]
    part = f"environment.{todo[0]}.json" if one else "environment.json"
    (output / part).write_text(json.dumps(environment(device), indent=1) + "\n", encoding="utf-8")
    failed = [name for name in todo if run(name, words, output)]
    ranks = options.ranks if options.ranks is not None else torch.cuda.device_count() if device.type == "cuda" else 2
    if not one and ranks > 1 and (not options.only or "collectives" in options.only):
        failed += [f"collectives {' '.join(layout)}" for layout in layouts(ranks)
                   if run("collectives", [*words, "--ranks", str(ranks), *layout], output)]
    if not one and any(output.glob("*.csv")):
        print("\n".join(map(str, merge(output))))
    print(output)
    if failed:
        print(f"error: failed: {', '.join(failed)}; the messages are above", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
