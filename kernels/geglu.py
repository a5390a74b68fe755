"""GeGLU: y = gelu(a) b with x = [a, b] (Shazeer 2020, arXiv 2002.05202), gelu(a) = a P(a), P the normal distribution function.

Backward recomputes gelu from x, so that nothing but x is kept; for an incoming dy, with the density p = P':
    da = dy b (P(a) + a p(a)),      db = dy a P(a).
P by erf, or by the tanh approximation that GPT-2 and Gemma were trained with: the two are different functions (by up to 5e-4), not two precisions.

Memory traffic for [rows, 2N]: forward reads 2N and writes N a row, backward reads 3N and writes 2N. The kernels' arithmetic is fp32 whatever the
dtype; in torch the passes round as PyTorch's do.
Shapes: x [..., 2N], gate first; y [..., N]. The kernels are those of `kernels.gated`.
"""
import torch.nn.functional as F
from torch import Tensor

from kernels import gated
from kernels.activations import gelu_kind
from kernels.jit import Launch


def geglu_reference(x: Tensor, approximate: str = "none") -> Tensor:
    """The definition in plain PyTorch, differentiable, in x's own dtype: what the op is compared with in fp64, and what it replaces."""
    a, b = x.chunk(2, dim=-1)
    return F.gelu(a, approximate=approximate) * b


_geglu = gated.register("geglu")


def geglu(x: Tensor, *, approximate: str = "none", backend: str = "auto") -> Tensor:
    """gelu(x[..., :N]) * x[..., N:].

    Args:
        x: [..., 2N], fp32, bf16 or fp16; the last dimension dense, the leading ones collapsible into rows.
        approximate: "none" for the exact gelu, "tanh" for its approximation, as in `torch.nn.functional.gelu`.
        backend: triton, torch, or auto.
    Returns:
        [..., N], in x's dtype.
    Raises:
        TypeError: another dtype. ValueError: an odd last dimension, another `approximate`, or strides that would need a copy.
        MissingBackend: the backend asked for cannot serve here.
    """
    return gated.apply("geglu", _geglu, x, gelu_kind("geglu", approximate), backend)


def launches() -> list[Launch]:
    """Every configuration of the tile table, for the static check."""
    return gated.launches_of("geglu", ("gelu", "gelu_tanh"))
