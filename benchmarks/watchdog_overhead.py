"""What the watchdog costs a training step: every other step of one run is done with torch's collectives wrapped, the rest without.

    python benchmarks/watchdog_overhead.py [--steps 120] [--ranks 2] [--output benchmarks/results/watchdog_overhead.json] [key=value ...]

The watchdog's thread runs all the time, with a limit of 20 s (a look every second; at the default of 300 s it is one in 15 s). Two figures: the
ratio of the medians of both kinds of steps, which the noise of a small machine blurs, and the share of a step that the wrapper takes: calls in a
step, times what it adds to one (an all_reduce of a group of this rank alone), over the median step. The share counts the main thread's own
processor time, below and above the line: other work on the machine does not change it, and without the time spent waiting a step looks shorter
than it is, so that the share errs upwards. Prints JSON.
"""
import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

DEFAULTS = ("model=tiny", "parallel=tp2", "train.global_batch_size=16", "train.micro_batch_size=8", "optim.warmup_steps=5", "validation.every=0",
            "validation.at_end=false", "checkpoint.save_at_end=false", "log.report=false", "log.wandb=disabled", "health.hang_timeout=null")
LIMIT = 20.0


class Alternating:
    """Takes the place of `Engine.step`."""

    def __init__(self, step, directory: Path):
        self.step, self.directory, self.dog = step, directory, None
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        self.busy: list[float] = []  # processor seconds of the main thread in a step
        self.calls: list[int] = []

    def __call__(self, engine, batches, **settings):
        import torch.distributed as dist

        from megatron_ext.health.collectives import group_names
        from megatron_ext.health.watchdog import Watchdog

        if self.dog is None:
            rank = dist.get_rank()
            self.dog = Watchdog(self.directory, rank=rank, ranks=dist.get_world_size(), timeout=LIMIT, groups=group_names(engine.layout.grid, rank))
            self.dog.start()
            self.dog.collectives.uninstall()
        watched = settings["step"] % 2 == 0
        if watched:
            self.dog.collectives.install()
        dist.barrier()
        before = self.dog.collectives.moves
        began, busy = time.perf_counter(), time.thread_time()
        result = self.step(engine, batches, **settings)
        if watched:
            self.dog.beat(settings["step"], "step")
        self.seconds[watched].append(time.perf_counter() - began)
        if not watched:
            self.busy.append(time.thread_time() - busy)
        else:
            self.calls.append((self.dog.collectives.moves - before) // 2)
            self.dog.collectives.uninstall()
        return result


def cost_of_a_call(dog) -> float:
    """Seconds that the wrapper adds to an all_reduce: best of turns, with and without it."""
    import torch
    import torch.distributed as dist

    from megatron_ext.platform.process_groups import new_group

    alone, number, best = new_group([dist.get_rank()], "overhead"), torch.ones(1), {True: 1.0, False: 1.0}
    for turn in range(40):
        watched = turn % 2 == 0
        if watched:
            dog.collectives.install()
        began = time.thread_time()
        for _ in range(500):
            dist.all_reduce(number, group=alone)
        best[watched] = min(best[watched], (time.thread_time() - began) / 500)
        if watched:
            dog.collectives.uninstall()
    return best[True] - best[False]


def rank_main(directory: str, steps: int, words: list[str]) -> None:
    from megatron_ext import platform

    platform.quiet()
    from megatron_ext.config.compose import compose
    from megatron_ext.train import pretrain
    from megatron_ext.train.engine import Engine

    last = {word.split("=")[0]: word for word in (*DEFAULTS, f"train.steps={steps}", f"run.dir={directory}/run", *words)}
    config = compose([*last.values()])
    measured = Alternating(Engine.step, Path(directory))
    Engine.step = lambda self, batches, **settings: measured(self, batches, **settings)
    pretrain.train(config)
    cost = cost_of_a_call(measured.dog)
    measured.dog.close()
    if os.environ["RANK"] == "0":
        on, off = (statistics.median(measured.seconds[watched][3:]) for watched in (True, False))
        calls, busy = statistics.median(measured.calls[3:]), statistics.median(measured.busy[3:])
        Path(directory, "result.json").write_text(json.dumps({
            "model": config.model.name, "layout": "tp2" if config.parallel.tp == 2 else str(config.parallel), "ranks": int(os.environ["WORLD_SIZE"]),
            "steps": [len(measured.seconds[True]) - 3, len(measured.seconds[False]) - 3], "step_ms_watched": round(on * 1000, 3),
            "step_ms_unwatched": round(off * 1000, 3), "ratio_of_medians": round(on / off, 4), "calls_a_step": calls,
            "added_us_a_call": round(cost * 1e6, 3), "step_ms_busy": round(busy * 1000, 3), "share_percent": round(100 * calls * cost / busy, 4),
        }))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    options, words = parser.parse_known_args()
    if options.directory:
        rank_main(options.directory, options.steps, words)
        return 0
    from megatron_ext.config.schema import Config, LaunchConfig
    from megatron_ext.parallel.job import start

    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-W", "ignore", __file__, "--directory", directory, "--steps", str(options.steps), *words]
        code = start(command, Config(launch=LaunchConfig(ranks=options.ranks, threads=1)))
        if code:
            return code
        result = Path(directory, "result.json").read_text()
    print(result)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(json.loads(result), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
