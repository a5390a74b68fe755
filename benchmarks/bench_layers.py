"""A whole training step of the model on one kind of layers against another: tokens/s, in turns, in one run.

    python benchmarks/bench_layers.py [--layers fused] [--against plain] [--steps 20] [--threads 1] [key=value ...]

Forward, backward and optimizer step of the engine on random tokens. Prints JSON: the median seconds of each, and the median of the ratios of
neighbouring steps (above 1: `--layers` is faster), with the losses' largest relative difference over the steps.
"""
import argparse
import json
import os
import statistics
import sys
import time

DEFAULTS = ("model=tiny", "train.micro_batch_size=8", "train.global_batch_size=8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", default="fused")
    parser.add_argument("--against", default="plain")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    options, words = parser.parse_known_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)

    from megatron_ext import platform

    platform.quiet()
    from dataclasses import replace

    import torch

    from megatron_ext.config.compose import compose
    from megatron_ext.data.batches import Batch
    from megatron_ext.parallel.layout import Layout
    from megatron_ext.train.engine import Engine

    config = compose([*DEFAULTS, *words])
    here = platform.install(config.launch.device)
    platform.connect(here, 60)
    vocab, batch, length = config.data.vocab_size, config.train.micro_batch_size, config.data.sequence_length
    engines = {kind: Engine(replace(config, kernels=replace(config.kernels, layers=kind)), Layout(), here, vocab_size=vocab)
               for kind in (options.layers, options.against)}
    generator = torch.Generator().manual_seed(1)
    seconds, losses = {kind: [] for kind in engines}, {kind: [] for kind in engines}
    for step in range(options.steps + 2):
        rows = torch.randint(0, vocab, (batch, length + 1), generator=generator)
        made = Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), torch.ones(batch, length),
                     torch.arange(length).expand(batch, -1).contiguous(), None)
        for kind, engine in engines.items():
            here.synchronize()
            began = time.perf_counter()
            losses[kind].append(engine.step([made], lr=1e-3, step=step).loss)
            here.synchronize()
            seconds[kind].append(time.perf_counter() - began)
    ours, theirs = (seconds[kind][2:] for kind in (options.layers, options.against))  # the first steps allocate and compile
    print(json.dumps({
        options.layers: round(statistics.median(ours), 4), options.against: round(statistics.median(theirs), 4),
        "ratio": round(statistics.median(b / a for a, b in zip(ours, theirs)), 4),
        "losses_differ": max(abs(a - b) / b for a, b in zip(losses[options.layers], losses[options.against])),
        "model": config.model.name, "precision": config.precision.dtype, "threads": options.threads,
    }))
    platform.disconnect()


if __name__ == "__main__":
    sys.exit(main())
