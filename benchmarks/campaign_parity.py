"""Every layout against one rank, over the 20 steps that are asserted and 200 that are reported, in fp32 and in bf16: writes docs/parity.md.

    python benchmarks/campaign_parity.py [--steps 200] [--page docs/parity.md] [--losses FILE] [--read FILE]

The machinery is that of tests/test_parity.py (four ranks, spawned once, train one layout after another; real text; the learning rates of
`make run`), with the schedule stretched over 200 steps, so that steps 11 to 20 run at nearly the full rate. Exit code 1 when a layout
begins with other weights than one rank, or a loss of the first 20 steps in fp32 is further than 2e-6 from one rank's, relative.
"""
import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import parity_ranks as machinery
from parity_ranks import Job

BOUND = 2e-6
TESTED = 13  # steps of bf16 in tests/test_parity.py
LATE = 20  # steps at the end that are averaged
LAYOUTS = {  # name: title, ParallelConfig, ranks
    "tp2": ("TP2", machinery.TP2, 2),
    "tp2sp": ("TP2 + SP", machinery.SP, 2),
    "pp2": ("PP2 (1F1B)", machinery.PP2, 2),
    "interleaved": ("PP2 interleaved (2 chunks a stage)", machinery.INTERLEAVED, 2),
    "dp2-plain": ("DP2, plain all-reduce", machinery.PLAIN_DP, 2),
    "dp2": ("DP2, distributed optimizer, overlap", machinery.DP2, 2),
    "cp2": ("CP2, ring", machinery.CP2, 2),
    "ulysses": ("CP2, Ulysses", machinery.ULYSSES, 2),
    "tp2pp2": ("TP2 x PP2", machinery.TP2PP2, 4),
    "cp2tp2sp": ("CP2 (ring) x TP2 + SP", {**machinery.CP2, **machinery.SP}, 4),
    "tp2dp2": ("TP2 x DP2, distributed optimizer, overlap", machinery.TP2, 4),
}
DTYPES = ("fp32", "bf16")


def jobs(steps: int) -> list[Job]:
    """One rank in both precisions side by side, then the layouts, whose pairs of two ranks run side by side too."""
    made = [Job(f"{dtype}/one", dtype=dtype, steps=steps, length=steps) for dtype in DTYPES]
    for name, (_, parallel, ranks) in LAYOUTS.items():
        made += [Job(f"{dtype}/{name}", parallel=parallel, ranks=ranks, dtype=dtype, steps=steps, length=steps) for dtype in DTYPES]
    return made


def page(measured: dict) -> str:
    runs, steps, command = measured["runs"], measured["steps"], measured["command"]

    def cell(dtype: str, name: str, upto: int) -> str:
        return f"{machinery.difference(runs, f'{dtype}/{name}', f'{dtype}/one', steps=upto):.1e}"

    short = machinery.STEPS
    columns = [(dtype, upto) for dtype in DTYPES for upto in (short, steps)]
    rows = "\n".join(
        "| " + " | ".join([title, *(cell(dtype, name, upto) for dtype, upto in columns)]) + " |" for name, (title, _, _) in LAYOUTS.items()
    )
    exact = [title for name, (title, _, _) in LAYOUTS.items() if runs[f"bf16/{name}"]["losses"] == runs["bf16/one"]["losses"]]
    but = f" (without that a run is one rank's bit for bit: {'; '.join(exact)})" if exact else ""
    losses = {dtype: runs[f"{dtype}/one"]["losses"] for dtype in DTYPES}
    rounding = {upto: machinery.difference(runs, "bf16/one", "fp32/one", steps=upto) for upto in (short, steps)}
    late = {name: statistics.fmean(facts["losses"][-LATE:]) for name, facts in runs.items()}
    spread = {
        dtype: max(abs(late[f"{dtype}/{name}"] / late[f"{dtype}/one"] - 1) for name in LAYOUTS) for dtype in DTYPES
    } | {"one": abs(late["bf16/one"] / late["fp32/one"] - 1)}
    early = max(machinery.difference(runs, f"bf16/{name}", "bf16/one", steps=TESTED) for name in LAYOUTS)
    norms = {
        dtype: max(max(runs[f"{dtype}/{name}"]["norms"][machinery.WARMUP:]) for name in ("one", *LAYOUTS)) for dtype in DTYPES
    }
    wrong = failures(runs)
    verdict = "**Failed:** " + "; ".join(wrong) if wrong else (
        f"Holds: every layout begins with one rank's weights bit for bit, and in fp32 no loss of the first {short} steps is further than "
        f"{BOUND:.0e} from one rank's."
    )
    model = machinery.LLAMA
    return f"""<!-- Written by `{command}`; not by hand. -->
# Parity: every layout against one rank

    {command}

What is trained: a Llama of {model.num_layers} layers, hidden size {model.hidden_size}, {model.num_attention_heads} heads
({model.num_query_groups} of keys and values), on the source of three modules of the standard library in {machinery.BATCH} samples of
{machinery.SEQUENCE} tokens a step, in micro-batches of 2; learning rate 2e-3 after {machinery.WARMUP} steps of warm-up, falling to 2e-4 at step
{steps} (the rates of `make run`). Ranks on this machine over gloo, one thread each.

Largest relative difference of a step's loss from that of one rank in the same precision:

| layout | {" | ".join(f"{dtype}, {upto} steps" for dtype, upto in columns)} |
|---|{"---|" * len(columns)}
{rows}

{verdict}

The yardstick for bf16 is what its rounding does on one rank: against one rank in fp32 it differs by up to {rounding[short]:.1e} in {short} steps and
{rounding[steps]:.1e} in {steps}. Averaged over the last {LATE} steps the losses of layouts are within {spread['fp32']:.1e} of one rank's in fp32 and
{spread['bf16']:.1e} in bf16; one rank in bf16 within {spread['one']:.1e} of fp32.

The loss falls from {losses['fp32'][0]:.3f} to {losses['fp32'][short - 1]:.3f} in {short} steps and {losses['fp32'][-1]:.3f} in {steps} (fp32, one rank).

How to read it: layouts add the same numbers in another order, which is worth about 1e-7 in fp32. The accepted band over {short} steps is {BOUND:.0e};
what leaves it is taken for a mistake in a layout. Over {steps} steps training amplifies the last bits, so the other columns are reported and not bounded. bf16 rounds
at 2^-9: in the first {TESTED} steps its layouts are within {early:.1e} of one rank (`tests/test_parity.py` accepts 2e-3 there). Later
the norm of the gradient reaches {norms['bf16']:.0f} in one bf16 run or another ({norms['fp32']:.1f} at most in fp32), and the runs go their own ways, since they round
differently{but}: single steps say little about a layout from there on.

{measured['versions']}, {measured['date']}; {measured['seconds'] / 60:.0f} minutes.
"""


def failures(runs: dict[str, dict]) -> list[str]:
    found = []
    for dtype in DTYPES:
        found += [f"{dtype}/{name} begins with other weights" for name in LAYOUTS if runs[f"{dtype}/{name}"]["initial"] != runs[f"{dtype}/one"]["initial"]]
    for name in LAYOUTS:
        worst = machinery.difference(runs, f"fp32/{name}", "fp32/one")
        if not worst <= BOUND:
            found.append(f"fp32/{name} is {worst:.1e} from one rank")
    return found


def measure(steps: int) -> dict:
    """Trains everything. {"runs": facts by job, "steps", "command", "versions", "date", "seconds"}"""
    import torch
    from small import prepare_text

    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="campaign_parity") as name:
        directory = Path(name)
        prepare_text(directory, split=(1.0, 0.0, 0.0))
        runs = machinery.run_ranks(directory, script=Path(__file__), arguments=[str(steps)], timeout=7200)
    return {
        "runs": runs, "steps": steps, "seconds": time.monotonic() - began,
        "command": "python benchmarks/campaign_parity.py" + (f" --steps {steps}" if steps != 200 else ""),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, megatron-core {importlib.metadata.version('megatron-core')}, "
                    f"{os.cpu_count()} cores",
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "parity.md")
    parser.add_argument("--losses", type=Path, help="write every loss and gradient norm here too (JSON)")
    parser.add_argument("--read", type=Path, help="train nothing, write the page of what --losses wrote")
    options = parser.parse_args()
    if options.steps < machinery.STEPS:
        parser.error(f"--steps must be at least {machinery.STEPS}")
    measured = json.loads(options.read.read_text(encoding="utf-8")) if options.read else measure(options.steps)
    if options.losses:
        options.losses.write_text(json.dumps(measured), encoding="utf-8")
    text = page(measured)
    options.page.write_text(text, encoding="utf-8")
    print(text)
    return 1 if failures(measured["runs"]) else 0


if __name__ == "__main__":
    if "RANK" in os.environ:
        machinery.main(Path(sys.argv[1]), jobs(int(sys.argv[2])), also=None)
    else:
        sys.exit(main())
