"""Triton where it is installed, stand-ins where it is not, and what its interpreter forces.

An op's file holds its Triton kernels beside its torch path, and must import without Triton: it takes `triton` and `tl` from here. Without
Triton `@triton.jit` gives a function that cannot be launched; `backend.choose` never picks it.

TRITON_INTERPRET=1 (set before Triton is imported) runs kernels on CPU tensors. Its defects, and the only places that know of them, tried with
Triton 3.7.1 and 3.9.0:
- a cast or store from fp32 to bf16 truncates instead of rounding to nearest even: kernels narrow with `narrow`, never with `.to`;
- `tl.dot` on bf16 operands multiplies the raw bits: kernels multiply with `dot`;
- casts to FP8 lose the carry of the mantissa and do not saturate: `kernels/fp8.py` rounds onto the FP8 grid in fp32 first, so the cast is exact.
Compiled code takes none of these branches: INTERPRETED is a compile-time constant there.

TRITON_DEFAULT_FP_FUSION is set to 1 here, on purpose: a multiply and an add may become one fused multiply-add, which rounds once instead of
twice. Triton 3.10 will turn that off where nobody says so, and numbers and speed would move.
"""
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

try:
    import triton
    import triton.language as tl

    MISSING: str | None = None
except ImportError as error:
    MISSING = f"triton is not installed ({error})"

    class _Absent:
        """Stands for `triton.language`: kernels are written down with it, and never run."""

        constexpr = staticmethod(lambda value=None: value)

        def __getattr__(self, name):
            return lambda *args, **kwargs: None

    class _AbsentTriton(_Absent):
        @staticmethod
        def jit(function=None, **options):
            if function is None:
                return _AbsentTriton.jit

            class Unlaunchable:
                __name__ = function.__name__

                def __getitem__(self, grid):
                    raise RuntimeError(f"{function.__name__}: {MISSING}")

            return Unlaunchable()

        @staticmethod
        def cdiv(a, b):
            return -(-a // b)

        @staticmethod
        def next_power_of_2(n):
            return 1 << (n - 1).bit_length() if n > 0 else 1

    triton, tl = _AbsentTriton(), _Absent()

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


def interpreted() -> bool:
    """Whether kernels of this process run in Triton's interpreter, on CPU tensors."""
    return MISSING is None and os.environ.get("TRITON_INTERPRET") == "1"


_ANYWHERE = nullcontext()


def on_device_of(x: torch.Tensor) -> AbstractContextManager:
    """Around every launch: Triton launches on the current GPU, whose stream is not the one that x is made on where x lies on another."""
    return torch.cuda.device_of(x) if x.is_cuda else _ANYWHERE


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """fp32 `value` rounded to nearest even in `dtype` (fp32, bf16 or fp16)."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        rounded = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
        return tl.where(value == value, rounded, value).to(tl.bfloat16)  # noqa: PLR0124 NaN stays
    return value.to(dtype)


@triton.jit
def dot(a, b, acc):
    """acc + a b, with fp32 accumulation; a [M, K] and b [K, N] of one dtype, acc [M, N] fp32. fp32 operands are multiplied in full precision."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@dataclass(frozen=True)
class Launch:
    """One kernel in one configuration of the tile table, for the static check (`kernels/static_check.py`).

    Attributes:
        op, variant: where it belongs and which configuration it is: "rms_norm", "backward width<=4096 bf16".
        kernel: the `@triton.jit` function.
        signature: argument name -> Triton type, in the order of the arguments: "*bf16", "*fp32", "i32", "fp32", ...; constants left out.
        constants: the `tl.constexpr` arguments.
        num_warps, num_stages: as launched.
        multiples_of_16: integer arguments that are divisible by 16 at model sizes (widths, strides): Triton specialises on it at launch.
        memory_bound: the kernel must load 16 bytes at a time.
        since: the lowest compute capability it is compiled for (80, 90, 100).
    """

    op: str
    variant: str
    kernel: object
    signature: Mapping[str, str]
    constants: Mapping[str, object]
    num_warps: int = 4
    num_stages: int = 3
    multiples_of_16: tuple[str, ...] = ()
    memory_bound: bool = True
    since: int = 80
    options: Mapping[str, object] = field(default_factory=dict)


Launches = Callable[[], "list[Launch]"]
