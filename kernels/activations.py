"""The activations that the ops share: silu, gelu (exact, by erf) and gelu_tanh, each with its derivative, as Triton functions and in torch.

    silu(x) = x s,                  silu'(x) = s + x s (1 - s),                s = sigmoid(x)
    gelu(x) = x P,                  gelu'(x) = P + x exp(-x^2/2) / sqrt(2 pi), P = (1 + erf(x / sqrt 2)) / 2
    gelu_tanh(x) = x t,             gelu_tanh'(x) = t + x t (1 - t) u'(x),     t = sigmoid(u), u = sqrt(8/pi) (x + 0.044715 x^3)
(Hendrycks and Gimpel 2016, arXiv 1606.08415; (1 + tanh v) / 2 is sigmoid(2 v), which loses no digits where x is negative.)
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import serving
from kernels.jit import tl, triton

KINDS = ("silu", "gelu", "gelu_tanh")


@triton.jit
def _sigmoid(v):
    """(s, s (1 - s)) of fp32 v, both from the smaller of s and 1 - s, which alone has all its digits."""
    small = tl.exp(-tl.abs(v))
    tail = small / (1 + small)
    return tl.where(v < 0, tail, 1 - tail), tail * (1 - tail)


@triton.jit
def with_derivative(x, KIND: tl.constexpr, EXACT: tl.constexpr):
    """(activation, its derivative) of fp32 x; what is not used costs nothing, the compiler drops it.

    EXACT: erf to fp32's last digits. Without it to 1.5e-7 (Abramowitz and Stegun 7.1.26), far under what bf16 and fp16 can tell, from the exponential
    that the derivative needs anyway: erf itself takes so many instructions that the backward would be bound by them instead of by memory.
    """
    if KIND == "silu":
        gate, bump = _sigmoid(x)
        slope = gate + x * bump
    elif KIND == "gelu":
        density = tl.exp(-0.5 * x * x)
        if EXACT:
            gate = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        else:
            t = 1 / (1 + 0.23164189 * tl.abs(x))
            tail = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)))) * density
            gate = tl.where(x < 0, tail, 1 - tail)
        slope = gate + x * 0.3989422804014327 * density
    else:
        tl.static_assert(KIND == "gelu_tanh")
        square = tl.minimum(x * x, 1e4)  # the gate is 0 or 1 long before, and 0 x infinity is not a number
        gate, bump = _sigmoid(x * (1.5957691216057308 + 0.07135481627260025 * square))
        slope = gate + x * bump * (1.5957691216057308 + 0.21406444881780075 * square)
    return x * gate, slope


def forward(x: Tensor, kind: str) -> Tensor:
    """The activation in torch, in x's dtype."""
    return F.silu(x) if kind == "silu" else F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def backward(dy: Tensor, x: Tensor, kind: str, out: Tensor) -> Tensor:
    """dy times the derivative at x in torch, written into `out`."""
    if kind == "silu":
        return torch.ops.aten.silu_backward.grad_input(dy, x, grad_input=out)
    return torch.ops.aten.gelu_backward.grad_input(dy, x, approximate="tanh" if kind == "gelu_tanh" else "none", grad_input=out)


def plain_torch(op: str, backend: str, x: Tensor) -> bool:
    """Whether PyTorch's expression and autograd are the best that this call can have: in torch on CPU, outside torch.compile. There exponentials are
    what a backward costs, so recomputing them would slow it by a third, and an op registered in Python costs 0.1 ms a call."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and serving(op, backend, "cpu") == "torch"


def gelu_kind(op: str, approximate: str) -> str:
    """`approximate` of torch.nn.functional.gelu as one of KINDS; ValueError for another."""
    if approximate not in ("none", "tanh"):
        raise ValueError(f'{op}: approximate is {approximate!r}; it must be "none" (exact) or "tanh"')
    return "gelu_tanh" if approximate == "tanh" else "gelu"
