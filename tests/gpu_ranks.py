"""One rank of a journal whose GPUs are invented: run by test_prometheus.py. Argument: the run directory."""
import os
import sys
import types
from pathlib import Path

import torch

from megatron_ext.config.compose import compose
from megatron_ext.observe.events import Events
from megatron_ext.platform import Platform, connect, disconnect
from megatron_ext.train.journal import Journal
from megatron_ext.train.stage import StepReport

RANK = int(os.environ["RANK"])
READ = []  # how often this rank's energy was read


class NVMLError(Exception):
    pass


def energy(gpu: int) -> int:
    READ.append(gpu)
    return 10**9 + len(READ) * (1 + 2 * gpu) * 1_000_000  # mJ


def invent_gpus() -> None:
    space = types.SimpleNamespace
    sys.modules["pynvml"] = space(
        NVMLError=NVMLError, NVML_TEMPERATURE_GPU=0, NVML_CLOCK_SM=1, NVML_CLOCK_MEM=2, nvmlInit=lambda: None, nvmlShutdown=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index, nvmlDeviceGetUtilizationRates=lambda gpu: space(gpu=50 + gpu),
        nvmlDeviceGetMemoryInfo=lambda gpu: space(used=2**30, total=80 * 2**30), nvmlDeviceGetPowerUsage=lambda gpu: 100_000 * (1 + gpu),
        nvmlDeviceGetTemperature=lambda gpu, kind: 60 + gpu, nvmlDeviceGetCurrentClocksEventReasons=lambda gpu: 0x40 * gpu,
        nvmlDeviceGetTotalEnergyConsumption=energy)
    torch.cuda.get_device_name = lambda: "NVIDIA H100 80GB HBM3"


class Pretended(Platform):
    """Says CUDA; tensors are on the CPU, so that gloo carries them."""

    is_cuda = True


def main() -> None:
    directory = Path(sys.argv[1])
    connect(Platform(torch.device("cpu"), "gloo"), 60.0)
    invent_gpus()
    config = compose([f"run.dir={directory}", "model.num_layers=1", "model.hidden_size=64", "model.num_attention_heads=4", "model.num_query_groups=2",
                      "model.ffn_hidden_size=128", "data.sequence_length=32", "precision.dtype=bf16", "precision.fp8=current", "log.gpu_every=2",
                      f"log.prometheus_dir={directory / 'collector'}"])
    if RANK == 0:
        (directory / "collector").mkdir()
        Events(directory / "events.jsonl").write("start")  # an earlier life
    os.environ["CUDA_VISIBLE_DEVICES"] = str(RANK)
    journal = Journal(config, Pretended(torch.device("cpu"), "gloo"), writes=RANK == 0, steps=4, done=0, ranks=2, vocab_size=100)
    for step in range(1, 5):
        if step == 4 and RANK == 0:
            journal._publisher._every = 0.0
        journal.step(step, StepReport(2.0, 1.0, 1e-3, 2, 64), seconds=1.0, tokens_done=64 * step, validation={})
    if RANK == 0:
        collected, = (directory / "collector").glob("megatron_ext_*.prom")
        (directory / "before_the_end.prom").write_text(collected.read_text())
        (directory / "step_4.json").write_text((directory / "metrics.jsonl").read_text().splitlines()[-1])
    journal.rewind(2)
    journal.step(3, StepReport(1.5, 1.0, 1e-3, 2, 64), seconds=1.0, tokens_done=192, validation={})
    journal.close()
    disconnect()


main()
