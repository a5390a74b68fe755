"""PPO against TRL's and against a ceiling: the same model, prompts, lengths, batch, epochs, precision and threads, in turns in one run.

    python benchmarks/bench_ppo.py [--threads 2 1] [--cases full early] [--pairs 5] [--environment DIR] [--output FILE] [key=value ...]

A GPT-2 of 4 layers, hidden 256, 1,024 words (ppo/weights.py) is policy, reference, reward model and value function; prompts of 32 random ids, at most
64 tokens of response, 32 episodes an iteration, 4 epochs of one minibatch, fp32. Two cases:

    full     no response ends early     bars: 1.15 x TRL's episodes/s, 80 % of the ceiling
    early    the mean length is a third of the limit (EOS has the same probability after every token on both sides)    bar: 2.5 x TRL

`ratio_at_ceiling` is what plain PyTorch would reach if it computed the tokens that exist, at the speed that it has with full responses.

Each side is a process that waits for its turn (ppo/turns.py): TRL 0.21's `PPOTrainer.train()` in an environment of its own that is made here
(ppo/trl_side.py), ours as `train stage=ppo` runs it (ppo/our_side.py), and the ceiling (ppo/ceiling.py; in TRL's environment, whose `generate` is the
faster one). The first turn of each is not counted. Each side's micro-batch is the faster of two. `ratio` is the median over the pairs of TRL's seconds /
ours; `ratio_cpu` the same of processor time, which tells whether a busy machine was to blame (with one thread). key=value: of our configuration.
Prints one JSON object; exit code 1 where a bar is missed.
"""
import argparse
import json
import os
import platform as machine
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "ppo"))

from environment import PACKAGES, ensure
from turns import Side
from weights import Shape

BATCH, PROMPT, RESPONSE, EPOCHS, LR = 32, 32, 64, 4, 1e-6
SHARES = {"full": None, "early": 1 / 3}  # mean length over the limit
MICRO_BATCHES = (32, 8)  # episodes, that TRL may choose from
BATCH_TOKENS = (8192, 1536)  # that ours may choose from: the same in our terms
BARS = {"full": {"ratio": 1.15, "of_ceiling": 0.8}, "early": {"ratio": 2.5}}
ITERATIONS = {"full": 1, "early": 3}  # of a turn: lengths differ from one to the next
LENGTHS = {"full": (RESPONSE, RESPONSE), "early": (0.27 * RESPONSE, 0.4 * RESPONSE)}  # that a side may report


def spec(case: str, folder: Path, *, micro_batch: int = BATCH) -> Path:
    found = {"shape": asdict(Shape()), "seed": 1, "share": SHARES[case], "prompt": PROMPT, "response": RESPONSE, "batch": BATCH, "epochs": EPOCHS,
             "lr": LR, "trl_micro_batch": micro_batch}
    path = folder / f"{case}_{micro_batch}.json"
    path.write_text(json.dumps(found), encoding="utf-8")
    return path


def fastest(sides: dict[int, Side], threads: int) -> tuple[Side, int]:
    """The side whose micro-batch is the faster one here, by the lower of two turns each, and that micro-batch. The others are closed."""
    for side in sides.values():
        side.turn(1)
    seconds = {size: [] for size in sides}
    for _ in range(2):
        for size, side in sides.items():
            seconds[size] += side.turn(1)["cpu" if threads == 1 else "seconds"]
    best = min(sides, key=lambda size: min(seconds[size]))
    for size, side in sides.items():
        if size != best:
            side.close()
    return sides[best], best


def measure(case: str, threads: int, pairs: int, python: Path, words: list[str]) -> dict:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sides: dict[str, Side] = {}
        try:
            sides["trl"], micro_batch = fastest({
                size: Side(f"TRL, micro-batch {size}", [python, HERE / "ppo/trl_side.py", spec(case, folder, micro_batch=size)], threads=threads)
                for size in MICRO_BATCHES
            }, threads)
            sides["ours"], batch_tokens = fastest({
                size: Side(f"ours, {size} tokens", [sys.executable, HERE / "ppo/our_side.py", spec(case, folder), f"rollout.batch_tokens={size}", *words],
                           threads=threads)
                for size in BATCH_TOKENS
            }, threads)
            sides["ceiling"] = Side("ceiling", [python, HERE / "ppo/ceiling.py", spec("full", folder)], threads=threads)
            sides["ceiling"].turn(1)
            turns: dict[str, list[dict]] = {name: [] for name in sides}
            for pair in range(pairs):
                for name in list(sides)[:: 1 if pair % 2 == 0 else -1]:
                    turns[name].append(sides[name].turn(1 if name == "ceiling" else ITERATIONS[case]))
                    print(f"{case}, {threads} threads, pair {pair + 1}: {name} {statistics.mean(turns[name][-1]['seconds']):.2f} s", file=sys.stderr)
        finally:
            for side in sides.values():
                side.close()
    return summary(case, turns) | {"trl_micro_batch": micro_batch, "our_batch_tokens": batch_tokens}


def summary(case: str, turns: dict[str, list[dict]]) -> dict:
    """Of each side episodes/s (medians), the share of generation and the mean length; the ratios."""
    found: dict[str, object] = {}
    for name, taken in turns.items():
        seconds = statistics.median(statistics.mean(turn["seconds"]) for turn in taken)
        parts = {key: statistics.median(turn[key] for turn in taken) for key in taken[0] if key.endswith("_seconds")}
        found[name] = {
            "episodes_per_second": round(BATCH / seconds, 3), "seconds": round(seconds, 3),
            "generation_share": round(statistics.median(turn["rollout_seconds"] / statistics.mean(turn["seconds"]) for turn in taken), 3),
            "parts": {key.removesuffix("_seconds"): round(value, 3) for key, value in parts.items()},
        }
        if "length" in taken[0]:
            found[name]["length"] = round(statistics.mean(turn["length"] for turn in taken), 2)
    found["ceiling"]["model"] = turns["ceiling"][0]["model"]

    def ratio(other: str, of: Callable[[dict], float]) -> list[float]:
        """The other side's seconds over ours, pair by pair."""
        return sorted(of(theirs) / of(ours) for theirs, ours in zip(turns[other], turns["ours"]))

    def wall(turn: dict) -> float:
        return statistics.mean(turn["seconds"])

    def cpu(turn: dict) -> float:
        return statistics.mean(turn["cpu"])

    found |= {"ratio": round(statistics.median(ratio("trl", wall)), 3), "ratios": [round(one, 3) for one in ratio("trl", wall)],
              "ratio_cpu": round(statistics.median(ratio("trl", cpu)), 3)}
    # The ceiling has full responses. Where they end early it has to do the tokens that exist: their share of its time.
    share = (PROMPT + found["ours"]["length"]) / (PROMPT + RESPONSE)
    found |= {"of_ceiling": round(share * statistics.median(ratio("ceiling", wall)), 3),
              "of_ceiling_cpu": round(share * statistics.median(ratio("ceiling", cpu)), 3)}
    found["ratio_at_ceiling"] = round(statistics.median(wall(theirs) / wall(bare) for theirs, bare in zip(turns["trl"], turns["ceiling"])) / share, 3)
    low, high = LENGTHS[case]
    for name in ("trl", "ours"):
        if not low <= found[name]["length"] <= high:
            raise SystemExit(f"{case}: responses of {name} have {found[name]['length']} tokens, not {low:g} to {high:g}: the sides do not do the same work")
    return found | {"bars": BARS[case], "met": all(found[name] >= bar for name, bar in BARS[case].items())}


def main() -> int:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--cases", nargs="+", choices=tuple(SHARES), default=list(SHARES))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--environment", type=Path, default=HERE.parent / "outputs/bench_ppo/trl", help="where TRL's is kept, or made")
    parser.add_argument("--output", type=Path)
    options, words = parser.parse_known_args()
    for word in words:
        if "=" not in word or word.startswith("-"):
            parser.error(f"{word} is neither an option nor key=value")
    python = ensure(options.environment.absolute(), torch_version=torch.__version__)
    result = {"unit": "episodes/s", "cores": os.cpu_count(), "torch": torch.__version__, "python": machine.python_version(), "trl": list(PACKAGES),
              "settings": words, "threads": {}}
    met = True
    for threads in options.threads:
        found = result["threads"][threads] = {case: measure(case, threads, options.pairs, python, words) for case in options.cases}
        met = met and all(one["met"] for one in found.values())
    text = json.dumps(result, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
