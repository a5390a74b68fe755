"""The seam: the only room that knows whether this process runs on CUDA with NCCL or on the CPU with gloo.

Everything else takes `Platform.device` and `Platform.backend` as it finds them. `install()` has to run before megatron-core is used.
"""
import logging
import os
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch

from megatron_ext.errors import UserError
from megatron_ext.platform.caches import keep_local


@dataclass(frozen=True)
class Platform:
    """Where tensors live and what carries collectives."""

    device: torch.device
    backend: str  # nccl | gloo

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        """Waits for the device: before reading a clock."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def peak_memory(self) -> int | None:
        """Bytes of device memory at the highest point, where the device counts them."""
        return torch.cuda.max_memory_allocated() if self.is_cuda else None


_installed: Platform | None = None


def quiet() -> None:
    """Silences what megatron-core and torch say at every start about libraries that are optional here (`doctor` tells of those).

    To be called before megatron-core is imported.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", message=r".*all_gather_into_tensor|.*reduce_scatter_tensor|.*_coalescing_manager", category=FutureWarning)
    logging.getLogger("megatron").setLevel(logging.ERROR)


def choose(device: str = "auto") -> Platform:
    """The device that `install` takes, made this process's own. Patches nothing and imports no megatron-core.

    Args:
        device: auto | cpu | cuda. `auto` takes CUDA where torch sees a GPU.
    Raises:
        UserError: cuda was asked for and there is none.
    """
    if torch.version.cuda is not None:
        keep_local(os.environ)
    has_cuda = torch.version.cuda is not None and torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise UserError("launch.device", device, "torch sees no CUDA device here; use launch.device=cpu or auto")
    if not has_cuda or device == "cpu":
        return Platform(torch.device("cpu"), "gloo")
    # One hardware queue: collectives start in the order they were issued, beside the matrix products they overlap with.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return Platform(torch.device("cuda", index), "nccl")


def install(device: str = "auto") -> Platform:
    """Chooses the device and applies the patches it needs. Safe to call again.

    Args:
        device: auto | cpu | cuda. `auto` takes CUDA where torch sees a GPU.
    Raises:
        UserError: cuda was asked for and there is none, or another device is installed already.
    """
    global _installed
    chosen = choose(device)
    if _installed is not None:
        if _installed.device.type != chosen.device.type:
            raise UserError("launch.device", device, f"this process already runs on {_installed.device.type}")
        return _installed

    from megatron_ext.platform import cuda_on_cpu, half_products, heap, megatron

    if not chosen.is_cuda:
        heap.keep(os.environ)
        half_products.install()
        for patch in cuda_on_cpu.PATCHES:
            patch.apply()
    for patch in megatron.PATCHES:
        patch.apply()
    _installed = chosen
    return _installed


def is_first_rank() -> bool:
    """Whether this process is rank 0 of its job; needs no connection."""
    return int(os.environ.get("RANK", "0")) == 0


def connect(platform: Platform, timeout: float) -> None:
    """Joins the ranks of the job (environment: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT); one rank needs none of it.

    Args:
        timeout: seconds that a collective may take.
    """
    if torch.distributed.is_initialized():
        return
    settings = {"timeout": timedelta(seconds=timeout)}
    if "RANK" not in os.environ:
        settings |= {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1}
    # No device_id: it would make every later group a split of the world, which needs all ranks; here only a group's members make it.
    torch.distributed.init_process_group(platform.backend, **settings)


def disconnect() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
