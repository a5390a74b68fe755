"""SwiGLU: y = silu(a) b with x = [a, b], silu(a) = a sigmoid(a) (Shazeer 2020, arXiv 2002.05202).

Backward recomputes sigmoid from x, so that nothing but x is kept; for an incoming dy, with s = sigmoid(a):
    da = dy b s (1 + a (1 - s)),      db = dy a s.

Memory traffic for [rows, 2N]: forward reads 2N and writes N a row, backward reads 3N and writes 2N. The kernels' arithmetic is fp32 whatever the
dtype; in torch the passes round as PyTorch's do.
Shapes: x [..., 2N], gate first; y [..., N]. The kernels are those of `kernels.gated`.
"""
import torch.nn.functional as F
from torch import Tensor

from kernels import gated
from kernels.jit import Launch


def swiglu_reference(x: Tensor) -> Tensor:
    """The definition in plain PyTorch, differentiable, in x's own dtype: what the op is compared with in fp64, and what it replaces."""
    a, b = x.chunk(2, dim=-1)
    return F.silu(a) * b


_swiglu = gated.register("swiglu")


def swiglu(x: Tensor, *, backend: str = "auto") -> Tensor:
    """silu(x[..., :N]) * x[..., N:].

    Args:
        x: [..., 2N], fp32, bf16 or fp16; the last dimension dense, the leading ones collapsible into rows.
        backend: triton, torch, or auto.
    Returns:
        [..., N], in x's dtype.
    Raises:
        TypeError: another dtype. ValueError: an odd last dimension, or strides that would need a copy.
        MissingBackend: the backend asked for cannot serve here.
    """
    return gated.apply("swiglu", _swiglu, x, "silu", backend)


def launches() -> list[Launch]:
    """Every configuration of the tile table, for the static check."""
    return gated.launches_of("swiglu", ("silu",))
