"""What watching a run costs: the goodput ledger, the watchdog with its stragglers, and the metrics, as a share of a training step, in one run.

    python benchmarks/bench_observe.py [--steps 60] [--block 5] [--threads 1] [key=value ...]
    torchrun --nproc-per-node 2 benchmarks/bench_observe.py launch.ranks=2 parallel=tp2      # with collectives, which the watchdog counts

Blocks of bare steps (data, forward, backward, optimizer) and of watched ones take turns, so that whatever else the machine does hits both alike. A
watched step does what the loop does around one: phases and `step` of the ledger; beats of the watchdog, whose thread runs and whose wrappers are around
every collective; the stragglers' figures; the journal (metrics.jsonl, the progress line, Prometheus). Prints JSON:

    direct      seconds that the main thread spent in each of them, over the median bare step; what the bar of 1 % is held against
    ratio       median watched step (all of it) over median bare step, and the standard error of that by blocks: it also holds the watchdog's
                thread and wrappers, and the noise of the machine
"""
import argparse
import contextlib
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

DEFAULTS = ("model=tiny", "train.global_batch_size=16", "train.micro_batch_size=8", "optim.warmup_steps=5", "validation.every=0",
            "validation.at_end=false", "launch.device=auto", "log.wandb=disabled")
BAR = 0.01
WATCH = 60.0  # seconds of the watchdog's limit: it looks every three seconds


class Observers:
    """All that watches a step, timed one by one."""

    def __init__(self, config, stage, device):
        import torch.distributed as dist

        from megatron_ext.health.collectives import group_names
        from megatron_ext.health.stragglers import Stragglers, same_work
        from megatron_ext.health.watchdog import Watchdog
        from megatron_ext.observe.goodput import Ledger
        from megatron_ext.train.journal import Journal

        rank, ranks, run_dir = dist.get_rank(), dist.get_world_size(), Path(config.run.dir)
        grid = stage.layout.grid
        self.seconds = {"ledger": 0.0, "watchdog": 0.0, "metrics": 0.0}
        self.ledger = Ledger(run_dir / "goodput.jsonl" if rank == 0 else None)
        self.ledger.begin(life=1)
        self.journal = Journal(config, device, writes=rank == 0, steps=config.train.steps, done=0, ranks=ranks, vocab_size=stage.vocab_size)
        self._make = lambda: Watchdog(run_dir, rank=rank, ranks=ranks, timeout=WATCH, groups=group_names(grid, rank))
        self._stragglers = lambda watchdog: Stragglers(watchdog.collectives, same_work(grid), factor=1.5, window=5, cuda=device.is_cuda)

    @contextlib.contextmanager
    def watching(self):
        """A block of steps."""
        self.watchdog = self._make()
        self.watchdog.start()
        self.stragglers = self._stragglers(self.watchdog)
        yield
        self.watchdog.close()

    def around(self, number: int, step, tokens: int) -> None:
        """`step()` as step `number`."""
        marks = [time.perf_counter()]
        phase, data = self.ledger.phase("step"), self.ledger.phase("data")
        phase.__enter__()
        with data:
            pass
        marks.append(time.perf_counter())
        self.watchdog.beat(number - 1, "step")
        self.stragglers.begin()
        marks.append(time.perf_counter())
        report = step()
        marks.append(time.perf_counter())
        seconds = marks[-1] - marks[-2]
        self.stragglers.end(seconds)
        self.watchdog.beat(number, "step")
        marks.append(time.perf_counter())
        self.ledger.step(number)
        phase.__exit__(None, None, None)
        marks.append(time.perf_counter())
        self.journal.step(number, report, seconds=seconds, tokens_done=tokens, validation={})
        marks.append(time.perf_counter())
        ledger, watchdog, _, more_watchdog, more_ledger, metrics = (after - before for before, after in itertools.pairwise(marks))
        for name, spent in (("ledger", ledger + more_ledger), ("watchdog", watchdog + more_watchdog), ("metrics", metrics)):
            self.seconds[name] += spent

    def close(self) -> None:
        self.ledger.close("measured")
        self.journal.close()


def measure(config, block: int) -> dict:
    """Collective over all ranks."""
    import torch.distributed as dist

    from megatron_ext import platform
    from megatron_ext.data.build import ensure_prepared
    from megatron_ext.train.pretrain import Pretraining
    from megatron_ext.train.stage import Position

    device = platform.install(config.launch.device)
    if platform.is_first_rank():
        ensure_prepared(config.data)
    platform.connect(device, config.launch.timeout)
    shared = [config.run.dir]
    dist.broadcast_object_list(shared, src=0)
    config = replace(config, run=replace(config.run, dir=shared[0]))
    stage, position = Pretraining(config, device), Position()
    stage.build()

    def step():
        report = stage.step(position)
        device.synchronize()
        position.steps += 1
        position.samples += report.samples
        position.tokens += report.tokens
        return report

    observers, times = Observers(config, stage, device), {"bare": [], "watched": []}
    for _ in range(2):  # first calls allocate
        step()
    for number in range(2 * math.ceil(config.train.steps / 2 / block)):
        watched = number % 4 in (1, 2)  # bare, watched, watched, bare: a drift hits both alike
        taken = []
        if watched:
            with observers.watching():
                for _ in range(block):
                    began = time.perf_counter()
                    observers.around(position.steps + 1, step, position.tokens)
                    taken.append(time.perf_counter() - began)
        else:
            for _ in range(block):
                began = time.perf_counter()
                step()
                taken.append(time.perf_counter() - began)
        times["watched" if watched else "bare"].append(taken)
    observers.close()
    return verdict(times, observers.seconds, block)


def verdict(times: dict[str, list[list[float]]], seconds: dict[str, float], block: int) -> dict:
    """times: of steps, block by block."""
    bare, watched = (statistics.median(one for taken in times[name] for one in taken) for name in ("bare", "watched"))
    steps = block * len(times["watched"])
    direct = {name: spent / steps / bare for name, spent in seconds.items()}
    ratios = [statistics.median(one) / statistics.median(other) for one, other in zip(times["watched"], times["bare"], strict=True)]
    error = statistics.stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else math.inf
    total = sum(direct.values())
    return {
        "step_ms": round(1e3 * bare, 3), "direct": {name: round(share, 6) for name, share in direct.items()}, "direct_total": round(total, 6),
        "ratio": round(watched / bare, 4), "ratio_error": round(error, 4), "steps": {"bare": steps, "watched": steps}, "holds": total < BAR,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="measured, half of them watched")
    parser.add_argument("--block", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options, words = parser.parse_known_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)

    from megatron_ext import platform

    platform.quiet()
    import torch

    from megatron_ext.config.compose import compose

    with tempfile.TemporaryDirectory() as directory:
        said = {word.partition("=")[0]: word for word in (*DEFAULTS, f"train.steps={options.steps}", f"run.dir={directory}/run", *words)}
        config = compose(list(said.values()))
        found = measure(config, options.block)
    if platform.is_first_rank():
        print(json.dumps(found | {"model": config.model.name, "ranks": config.launch.ranks, "threads": options.threads, "torch": torch.__version__}))
    return 0 if found["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
