"""How long the loop stands still for a save: blocking against background, and against megatron-core's own blocking save.

    python benchmarks/bench_checkpoint.py [--layers 8] [--hidden 512] [--repeats 3] [--format dp_reshardable] [--directory DIR]

One rank on one thread, so that on two cores one is to spare for the writer. All three in one run, interleaved, medians. Standing
still: making the sharded state, `save`, and every `poll` until the save is complete, while training steps go on. Prints JSON:
seconds, bytes, `fraction` = background / blocking, and the time of a training step with and without a save in flight.
"""
import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
import warnings
from pathlib import Path


def build(options):
    from megatron_ext.config.schema import CheckpointConfig, Config, ModelConfig
    from megatron_ext.parallel.layout import Layout
    from megatron_ext.platform import connect, install
    from megatron_ext.train.engine import Engine

    platform = install("auto")
    connect(platform, 600)
    heads = options.hidden // 64
    model = ModelConfig(num_layers=options.layers, hidden_size=options.hidden, num_attention_heads=heads, max_sequence_length=64)
    config = Config(model=model, checkpoint=CheckpointConfig(format=options.format))
    return Engine(config, Layout(), platform, vocab_size=2048)


def batch(device):
    import torch

    from megatron_ext.data.batches import Batch

    tokens = torch.randint(0, 2048, (1, 65), device=device)
    made = Batch(
        tokens=tokens[:, :-1].contiguous(), labels=tokens[:, 1:].contiguous(), documents=None,
        loss_mask=torch.ones(1, 64, device=device), position_ids=torch.arange(64, device=device)[None],
    )  # fmt: skip
    return made


class Saves:
    """The events of the saves, to read sizes from."""

    def __init__(self):
        self.events = []

    def write(self, kind, **fields):
        self.events.append((kind, fields))


def measure(options) -> dict:
    import torch
    from megatron.core import dist_checkpointing

    from megatron_ext.checkpoint import Checkpoints

    torch.set_num_threads(1)
    engine = build(options)
    data, number, times = batch(engine.platform.device), 0, {}

    def clocked(name, work):
        engine.platform.synchronize()
        began = time.perf_counter()
        result = work()
        engine.platform.synchronize()
        times.setdefault(name, []).append(time.perf_counter() - began)
        return result

    def step(name):
        clocked(name, lambda: engine.step([data], lr=1e-4, step=0))

    def state():
        with engine.complete_weights():
            return engine.sharded_state(loading=False)

    def their_state():  # gathers, for fully_reshardable
        made = engine.sharded_state(loading=False, weights_only=True)
        metadata = {"distrib_optim_sharding_type": options.format, "dp_cp_group": engine.groups.dp_cp}
        return made | {"optimizer": engine.optimizer.sharded_state_dict(made, is_loading=False, metadata=metadata)}

    root = Path(tempfile.mkdtemp(prefix="bench_checkpoint", dir=options.directory))
    log = Saves()
    store = Checkpoints(root / "checkpoints", keep=1, background=True, sharding=options.format, events=log)
    try:
        step("warm-up")
        store.save(0, state(), {})  # warm-up: the first save also makes the shared memory
        store.wait()
        for _ in range(options.repeats):
            for _ in range(3):
                step("step")
            number += 1
            clocked("state", state)
            clocked("blocking", lambda n=number: store.save(n, state(), {}, background=False))
            number += 1
            clocked("background", lambda n=number: store.save(n, state(), {}))
            polls = 0.0
            began = time.perf_counter()
            while store.pending is not None:
                step("step_while_saving")
                at = time.perf_counter()
                store.poll()
                polls += time.perf_counter() - at
            times.setdefault("until_complete", []).append(time.perf_counter() - began)
            times["background"][-1] += polls
            times.setdefault("polls", []).append(polls)
            store.wait()
            theirs = root / f"mcore{number}"
            theirs.mkdir()
            clocked("mcore_blocking", lambda d=theirs: dist_checkpointing.save(their_state(), str(d)))
            shutil.rmtree(theirs)
    finally:
        store.close()
        shutil.rmtree(root, ignore_errors=True)
    median = {name: round(statistics.median(values), 4) for name, values in times.items() if name != "warm-up"}
    return {
        "device": str(engine.platform.device), "format": options.format, "repeats": options.repeats, "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2), "bytes": log.events[-1][1]["bytes"],
        "seconds": median, "fraction": round(median["background"] / median["blocking"], 3),
        "fraction_of_mcore": round(median["background"] / median["mcore_blocking"], 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--format", default="fully_reshardable", choices=("fully_reshardable", "dp_reshardable"))
    parser.add_argument("--directory", default=None, help="where to write (default: the system's temporary directory)")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warnings.filterwarnings("ignore")
    print(json.dumps(measure(parser.parse_args()), indent=1))


if __name__ == "__main__":
    main()
