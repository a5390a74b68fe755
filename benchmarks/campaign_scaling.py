"""Small runs predict a bigger one: runs at three sizes on the embedded data, a law fitted to them, and a fourth run of four times the compute of the
largest, which the law predicted before it was trained. Writes benchmarks/results/scaling.json.

    python benchmarks/campaign_scaling.py [--runs outputs/scaling] [--result benchmarks/results/scaling.json] [--read]

The small runs are the sweep of conf/sweep/scaling.yaml; each stands in a directory of its own and is not made twice. --read trains nothing. Some 20
minutes on one core. Exit code 1 when the prediction is further than 3 % from the loss that came, or further than "as the largest small run" or the line
through the last two.
"""
import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_ext.config.compose import compose
from megatron_ext.errors import UserError
from megatron_ext.plan import scaling, scaling_page

BOUND = 0.03
TIMES = 4  # the compute of the largest small run
WIDTH = 48  # hidden size of the fourth run; its tokens follow from its compute
SWEPT = {key.lstrip("+"): str(values).split(",") for key, values in
         yaml.safe_load((ROOT / "conf/sweep/scaling.yaml").read_text(encoding="utf-8"))["hydra"]["sweeper"]["params"].items()}
RUNS = math.prod(len(values) for values in SWEPT.values())
COMMON = [f"{key}={values[0].lower()}" for key, values in SWEPT.items() if len(values) == 1]  # of the fourth run too


def sweep(directory: Path, words: list[str]) -> None:
    """The small runs, one after another."""
    subprocess.run([sys.executable, "-m", "megatron_ext.submit.multirun", "--multirun", "+sweep=scaling", f"hydra.sweep.dir={directory}", *words],
                   check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})


def complete(directory: Path) -> bool:
    """Whether the sweep has ended: a run that has not would be told by `read_runs`, and one that was never begun by the number."""
    try:
        return len(scaling.read_runs((str(directory),))) == RUNS
    except UserError:
        return False


def target(runs: list[scaling.SmallRun]) -> list[str]:
    """The fourth run, as overrides."""
    words = [*COMMON, f"model.hidden_size={WIDTH}"]
    model = compose(words).model
    _, one = scaling.point(model, vocab_size=runs[0].vocab_size, sequence_length=runs[0].same["sequence length"], tokens=1.0)
    return [*words, f"train.tokens={round(TIMES * runs[-1].compute / one)}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "outputs/scaling")
    parser.add_argument("--result", type=Path, default=ROOT / "benchmarks/results/scaling.json")
    parser.add_argument("--read", action="store_true", help="train nothing, read the runs that are there")
    parser.add_argument("words", nargs="*", help="overrides for all runs, such as launch.threads=1")
    given = parser.parse_args()
    begin = time.monotonic()
    small, big = given.runs / "small", given.runs / "big"
    if not given.read and not complete(small):
        sweep(small, given.words)
    runs = scaling.read_runs((str(small),))
    words = target(runs)
    config = compose([*words, f"scaling.runs=[{small}]"])
    law = scaling.fit(config, runs)
    found = scaling.predict(config, runs, law)
    print(scaling_page.text(runs, law, found), flush=True)  # before the run that it is about
    if not given.read:
        subprocess.run([sys.executable, "-m", "megatron_ext", "train", *words, *given.words, f"run.dir={big}", "checkpoint.load=auto"], check=True, cwd=ROOT,
                       env=os.environ | {"PYTHONPATH": str(ROOT)})
    came = scaling.read_run(big)
    off = {name: value / came.loss - 1 for name, value in (("law", found.loss), ("largest small run", found.flat), ("line", found.line))}
    good = abs(off["law"]) <= BOUND and all(abs(off["law"]) < abs(off[name]) for name in ("largest small run", "line"))
    result = {
        "command": "python benchmarks/campaign_scaling.py " + " ".join(given.words), "machine": platform.machine(), "cores": os.cpu_count(),
        "seconds": None if given.read else round(time.monotonic() - begin), "target": words, "times_the_compute": came.compute / runs[-1].compute,
        "came": came.loss, "off": off, "inside_interval": found.low <= came.loss <= found.high, "passed": good, **scaling_page.fields(runs, law, found),
    }
    given.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"came: {came.loss:.4f}; the law is off by {off['law']:+.2%}, the largest small run by {off['largest small run']:+.2%}, the line by {off['line']:+.2%}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
