"""What the training loop costs: tokens/s of `train` against a bare megatron-core loop on the same model, in one run.

    python benchmarks/bench_loop.py [--steps 60] [--block 10] [--threads 1] [key=value ...]

The loop is the real one (data, learning rate, one loss for all ranks, the check for non-finite values, journal, metrics, progress line,
polling for checkpoints). The bare one does forward, backward and `optimizer.step()` of megatron-core over batches made beforehand, and nothing
else. Every `--block` steps the loop's clock stops and the bare one does as many, so that whatever else the machine does hits both alike. A
step of the loop lasts from its start to the start of the next. Prints JSON: medians, and their ratio (bar: 0.97).
"""
import argparse
import json
import os
import statistics
import sys
import tempfile
import time

DEFAULTS = ("model=tiny", "train.global_batch_size=16", "train.micro_batch_size=8", "optim.warmup_steps=5", "validation.every=0",
            "validation.at_end=false", "checkpoint.save_at_end=false", "launch.device=auto")


def bare_step(engine, batches) -> None:
    """Forward, backward and step as megatron-core does them, and nothing else."""
    def forward(iterator, model):
        batch = next(iterator)
        output = model(batch.tokens, batch.position_ids, None, labels=batch.labels, loss_mask=batch.loss_mask)
        return output, lambda output: (output[0], batch.loss_mask.sum().int(), {})

    for chunk in engine.chunks:
        chunk.zero_grad_buffer()
    engine.optimizer.zero_grad()
    engine._schedule(
        forward_step_func=forward, data_iterator=iter(batches), model=engine.chunks, num_microbatches=len(batches),
        seq_length=batches[0].tokens.shape[1], micro_batch_size=batches[0].tokens.shape[0], forward_only=False,
        pg_collection=engine.groups, p2p_communicator=engine._communicator,
    )
    engine.optimizer.step()
    engine.platform.synchronize()


class Interleaved:
    """Takes the place of `Engine.step`: notes when each step of the loop begins, and lets the bare loop run between blocks."""

    def __init__(self, step, block: int):
        self.step, self.block, self.twin = step, block, None
        self.loop: list[float] = []
        self.bare: list[float] = []
        self.resumed: float | None = None

    def __call__(self, engine, batches, **settings):
        from megatron_ext.train.engine import Engine

        now = time.perf_counter()
        if self.resumed is not None:
            self.loop.append(now - self.resumed)
        if self.twin is None:
            self.twin = Engine(engine.config, engine.layout, engine.platform, vocab_size=engine.vocab_size)
            bare_step(self.twin, batches)  # first calls allocate
        elif settings["step"] % self.block == 0:
            for _ in range(self.block):
                began = time.perf_counter()
                bare_step(self.twin, batches)
                self.bare.append(time.perf_counter() - began)
        self.resumed = time.perf_counter()
        return self.step(engine, batches, **settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--block", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    options, words = parser.parse_known_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)

    from megatron_ext import platform

    platform.quiet()
    from megatron_ext.config.compose import compose
    from megatron_ext.train import pretrain
    from megatron_ext.train.engine import Engine

    with tempfile.TemporaryDirectory() as directory:
        config = compose([*DEFAULTS, f"train.steps={options.steps}", f"run.dir={directory}/run", *words])
        measured = Interleaved(Engine.step, options.block)
        Engine.step = lambda self, batches, **settings: measured(self, batches, **settings)
        pretrain.train(config)
    tokens = config.train.global_batch_size * config.data.sequence_length
    trained, bare = statistics.median(measured.loop[1:]), statistics.median(measured.bare)
    print(json.dumps({
        "train_tokens_per_second": round(tokens / trained), "bare_tokens_per_second": round(tokens / bare), "ratio": round(bare / trained, 4),
        "steps": [len(measured.loop) - 1, len(measured.bare)], "threads": options.threads, "model": config.model.name,
    }))


if __name__ == "__main__":
    sys.exit(main())
