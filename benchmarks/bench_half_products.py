"""Matrix products and attention in 16 bits on the CPU: as the runtime computes them against torch's own kernels, in one run, in turns.

    python benchmarks/bench_half_products.py [--turns 5] [--threads 1]

Prints a table of medians in GFLOP/s, fp32 beside. Where torch has fast kernels (oneDNN with AVX-512) the runtime leaves them alone
(`megatron_ext/platform/half_products.py`), and this says so.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

SHAPES = {"mm": ((512, 512), (512, 512)), "bmm": ((16, 128, 128), (16, 128, 128)), "attention": ((4, 4, 256, 32),) * 3}


def measure(threads: int) -> dict[str, float]:
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name, shapes in SHAPES.items():
            operands = [torch.randn(shape).to(dtype) for shape in shapes]
            call = {"mm": torch.mm, "bmm": torch.bmm, "attention": torch.nn.functional.scaled_dot_product_attention}[name]
            first, last = shapes[0], shapes[-1]
            flops = 4 * first[0] * first[1] * first[2] ** 2 * first[3] if name == "attention" else 2 * torch.Size(first).numel() * last[-1]
            call(*operands)
            count, start = 0, time.perf_counter()
            while (spent := time.perf_counter() - start) < 0.3:
                call(*operands)
                count += 1
            found[f"{name} {str(dtype).removeprefix('torch.')}"] = flops * count / spent / 1e9
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--turns", type=int, default=5)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--side", choices=["torch", "ours"], help=argparse.SUPPRESS)
    chosen = options.parse_args()
    from megatron_ext.platform import half_products

    if chosen.side:
        if chosen.side == "ours":
            half_products.replace()
        print(json.dumps(measure(chosen.threads)))
        return
    print(f"torch's kernels for bf16 are {'slow' if half_products.slow_here() else 'fast, and left alone'} on this processor")
    turns = {"torch": [], "ours": []}
    for _ in range(chosen.turns):
        for side, results in turns.items():
            command = [sys.executable, __file__, "--side", side, "--threads", str(chosen.threads)]
            root = str(Path(__file__).resolve().parent.parent)
            results.append(json.loads(subprocess.run(command, capture_output=True, check=True, env=os.environ | {"PYTHONPATH": root}).stdout))
    print(f"{'GFLOP/s':24}{'torch':>10}{'fp32, rounded':>16}{'ratio':>9}")
    for name in turns["torch"][0]:
        theirs, ours = (statistics.median(result[name] for result in turns[side]) for side in ("torch", "ours"))
        print(f"{name:24}{theirs:10.1f}{ours:16.1f}{ours / theirs:9.2f}")


if __name__ == "__main__":
    main()
