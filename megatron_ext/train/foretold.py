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

FEWEST = 3  # steps; the first compile kernels and fill caches


def foretold(config: Config, engine: Engine, platform: Platform, seconds: Sequence[float]) -> dict[str, dict]:
    """{what: {"planned": ..., "measured": ...}}, of rank 0.

    Args:
        seconds: of the steps of this life.
    """
    known = config.hardware if config.hardware.name is not None else _found(platform)
    config = replace(config, hardware=known, launch=replace(config.launch, ranks=len(engine.layout.ranks)))
    planned = state(config, 0, engine.vocab_size)
    found = {name: {"planned": getattr(planned, name), "measured": size} for name, size in _sizes(engine).items()}
    peak = platform.peak_memory()
    if peak is not None:
        whole = rank_memory(config, 0, engine.vocab_size)
        found["peak_memory"] = {"planned": round(whole.total - whole.margin), "measured": peak}
    if hardware.timed(known) and len(seconds) >= FEWEST and platform.is_cuda:
        step = step_time(config, load(config.plan.calibration), engine.vocab_size)
        found["step_seconds"] = {"planned": step.seconds, "measured": median(list(seconds)[1:])}
    return found


def _found(platform: Platform):
    name = torch.cuda.get_device_name() if platform.is_cuda else ""
    return hardware.find(name) or hardware.load("unknown")


def _sizes(engine: Engine) -> dict[str, int]:
    """Parameters in elements; weights, gradients and optimizer state in bytes. A storage counts once."""
    seen: set[int] = set()

    def size(tensors) -> int:
        total = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                total += storage.nbytes()
        return total

    parameters = [p for chunk in engine.chunks for p in chunk.parameters()]
    found = {"parameters": sum(p.numel() for p in parameters), "weights": size(parameters)}
    found["gradients"] = size(p.main_grad for p in parameters if hasattr(p, "main_grad"))
    optimizer = 0
    for part in engine.optimizer.chained_optimizers:
        if part.optimizer is not None:
            optimizer += size(p for group in part.optimizer.param_groups for p in group["params"])
            optimizer += size(v for one in part.optimizer.state.values() for v in one.values() if isinstance(v, torch.Tensor) and v.dim())
    return found | {"optimizer": optimizer}
