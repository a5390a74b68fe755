"""Matrix products and attention in 16 bits on processors that have no instructions for them: computed in fp32, rounded once.

oneDNN multiplies bf16 matrices where the processor has AVX-512 or better. Elsewhere torch 2.13 falls back to dot products of single rows: 1 GFLOP/s where
fp32 has 60 (`python benchmarks/bench_half_products.py`), and a run in bf16 takes hours for minutes. Converting the operands costs little beside that, and
the result is the one that AVX-512 gives: exact products of 16-bit numbers, a sum in fp32, one rounding.

The kernels of the dispatcher are replaced, below autograd, so that megatron-core's layers, our own and torch's are all served; what is not in 16 bits goes
to torch's kernel as before, 4 microseconds later.
"""
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
FUNCTIONAL = ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward")
IN_PLACE = ("addmm", "baddbmm")  # a.addmm_(b, c)
WITH_OUT = ("mm", "addmm", "bmm", "baddbmm")  # torch.mm(a, b, out=c)
STAYS = {"_scaled_dot_product_flash_attention_for_cpu": 1}  # which result is fp32 for 16-bit operands too: the log-sum-exp

_library: torch.library.Library | None = None


def slow_here() -> bool:
    """Whether torch multiplies bf16 matrices on this processor without oneDNN."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is None or not supported()


def install() -> bool:
    """Replaces the kernels where they are slow; True where they are replaced. Safe to call again."""
    if _library is None and slow_here():
        replace()
    return _library is not None


def replace() -> None:
    """Replaces the kernels in this process, for good, whatever its processor has."""
    global _library
    _library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s).*Overriding a previously registered kernel")
        for name in FUNCTIONAL:
            _library.impl(name, _functional(torch.library.get_kernel(f"aten::{name}", "CPU"), STAYS.get(name)), "CPU", with_keyset=True)
        for name in IN_PLACE:
            _library.impl(f"{name}_", _in_place(torch.library.get_kernel(f"aten::{name}_", "CPU"), getattr(torch, name)), "CPU", with_keyset=True)
        for name in WITH_OUT:
            _library.impl(f"{name}.out", _with_out(torch.library.get_kernel(f"aten::{name}.out", "CPU"), getattr(torch, name)), "CPU", with_keyset=True)


def _wide(value):
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value


def _functional(kernel, stays: int | None) -> Callable:
    """The kernel on fp32 copies; results in the dtype of the operands, but for the one with the index `stays`."""

    def product(keys, first, *others, **options):
        dtype = first.dtype
        if dtype not in HALF:
            return kernel.call_boxed(keys, first, *others, **options)
        found = kernel.call_boxed(keys, first.float(), *map(_wide, others), **{name: _wide(value) for name, value in options.items()})
        if isinstance(found, Tensor):
            return found.to(dtype)
        return tuple(x if i == stays else x.to(dtype) for i, x in enumerate(found))

    return product


def _in_place(kernel, function: Callable) -> Callable:
    def product(keys, target, *operands, **options):
        if target.dtype not in HALF:
            return kernel.call_boxed(keys, target, *operands, **options)
        return target.copy_(function(target, *operands, **options))

    return product


def _with_out(kernel, function: Callable) -> Callable:
    def product(keys, *operands, out, **options):
        if operands[0].dtype not in HALF:
            return kernel.call_boxed(keys, *operands, out=out, **options)
        found = function(*operands, **options)
        return out.resize_(found.shape).copy_(found)

    return product
