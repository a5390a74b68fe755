"""Torch's products outside autocast: what an op's torch path holds in fp32 is meant so, and its dtypes are those of its tensors."""
import functools
from collections.abc import Callable

import torch
from torch import Tensor


def outside_autocast(function: Callable) -> Callable:
    """The function, whose first argument is a tensor, as if autocast were off: inside it matrix products, `linalg.vecdot` and attention are made in
    bf16 or fp16, whatever was widened before them."""

    @functools.wraps(function)
    def run(x: Tensor, *arguments, **options):
        device = x.device.type
        if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
            return function(x, *arguments, **options)
        with torch.autocast(device, enabled=False):
            return function(x, *arguments, **options)

    return run
