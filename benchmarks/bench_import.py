"""What a rank waits for before it does anything: processor seconds from `python` to an imported trainer, and to a tiny training's end.

    python benchmarks/bench_import.py [--rounds 5]

"before" is the same program with megatron_ext/core_import.py and kernels/dynamo.py switched off. In turns; medians; processor seconds, which a busy machine
changes less than wall time.
"""
import argparse
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRAINER = "import megatron_ext.train.pretrain, megatron_ext.train.life"
OP = "; import torch; from kernels.adamw import AdamW; AdamW([torch.nn.Parameter(torch.ones(8))])"
OFF = ("from megatron_ext import core_import; import sys; "
       "sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != 'megatron_ext.core_import']; ")
GUARDS = "from kernels import dynamo; dynamo.install = lambda: None; "
ROWS = {
    "torch": "import torch",
    "torch and megatron-core": "import torch, megatron.core",
    "this trainer and its optimizer, before": OFF + GUARDS + TRAINER + OP,
    "this trainer and its optimizer": TRAINER + OP,
}


def seconds(program: str) -> float:
    """Processor seconds (user and system) of `python -c PROGRAM`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, cwd="/",
                   env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    found = {name: [] for name in ROWS}
    for turn in range(rounds + 1):
        for name, program in ROWS.items():
            spent = seconds(program)
            if turn:  # the first turn reads the files from the disk
                found[name].append(spent)
    print(f"{'processor seconds of':42} {'median':>7} {'least':>7}")
    for name, spent in found.items():
        print(f"{name:42} {statistics.median(spent):7.2f} {min(spent):7.2f}")


if __name__ == "__main__":
    main()
