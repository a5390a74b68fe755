"""What the plan said of this run beside what happened: bytes of parameters, gradients and optimizer, peak memory, seconds of a step.

One event, `foretold`, when a life ends (observe/report.py shows it). Of rank 0, for stages with one engine; the plan of a GPU that is not in conf/hardware
has no step time, and a CPU does not count its peak.
"""
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import torch

from megatron_ext.config.schema import Config
from megatron_ext.plan import hardware
from megatron_ext.plan.buffers import state
from megatron_ext.plan.calibration import load
from megatron_ext.plan.memory import rank_memory
from megatron_ext.plan.timing import step_time
from megatron_ext.platform import Platform
from megatron_ext.train.engine import Engine
from megatron_ext.train.offload import state_bytes

FEWEST = 3  # steps; the first compile kernels and fill caches


def foretold(config: Config, engine: Engine, platform: Platform, seconds: Sequence[float]) -> dict[str, dict]:
    """{what: {"planned": ..., "measured": ...}}, of rank 0.

    Args:
        seconds: of the steps of this life.
    """
    known = config.hardware if config.hardware.name is not None else _found(platform)
    config = replace(config, hardware=known, launch=replace(config.launch, ranks=len(engine.layout.ranks)))
    head = "scalar" if engine.models[0].scalar else "vocabulary"
    planned = state(config, 0, engine.vocab_size, head=head)
    held = {"parameters": sum(p.numel() for chunk in engine.chunks for p in chunk.parameters())} | state_bytes(engine)
    found = {name: {"planned": getattr(planned, name), "measured": size} for name, size in held.items()}
    peak = platform.peak_memory()
    if peak is not None:
        whole = rank_memory(config, 0, engine.vocab_size, head=head)
        found["peak_memory"] = {"planned": round(whole.total - whole.margin), "measured": peak}
    if hardware.timed(known) and len(seconds) >= FEWEST and platform.is_cuda:
        step = step_time(config, load(config.plan.calibration), engine.vocab_size)
        found["step_seconds"] = {"planned": step.seconds, "measured": median(list(seconds)[1:])}
    return found


def _found(platform: Platform):
    name = torch.cuda.get_device_name() if platform.is_cuda else ""
    return hardware.find(name) or hardware.load("unknown")
