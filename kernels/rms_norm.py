"""RMSNorm with the residual add before it: h = x + residual, y = h / sqrt(mean(h^2) + eps) g, over the last dimension
(Zhang & Sennrich 2019, arXiv 1910.07467). h is the new residual, rounded to the residual's dtype before it is normed; without a residual h = x.
g = weight, or 1 + weight where gamma is zero-centred (weight decay then pulls towards 1; Transformer Engine's zero_centered_gamma).

Backward, with r = 1 / sqrt(mean(h^2) + eps), hn = h r, for an incoming dy and, where there is a residual, the dh' that arrives at h itself:
    dh = dh' + r (g dy - hn mean(g dy hn)),     dweight = sum over rows of dy hn.
dh is the gradient of x and of the residual alike: one tensor serves both where they have one dtype.

Memory traffic for [rows, N]: forward reads x and the residual, writes h and y (without a residual: reads x, writes y) and one fp32 r a row;
backward reads dy, h and dh', writes dh (twice where x and residual differ in dtype). Saved: h, weight, r. Statistics and sums are fp32.
Shapes: x, residual [..., N]; weight [N]; y [..., N].
"""
import math

import torch
from torch import Tensor

from kernels import norm_rows, norm_torch
from kernels.backend import serving
from kernels.jit import Launch


def rms_norm_reference(x: Tensor, weight: Tensor, *, eps: float = 1e-5, residual: Tensor | None = None, zero_centered: bool = False):
    """The definition in plain PyTorch, differentiable: fp32 arithmetic for 16-bit tensors, fp64 for fp64. What the op is compared with."""
    h = x if residual is None else (x + residual).to(residual.dtype)
    wide = h if h.dtype == torch.float64 else h.float()
    gain = weight.to(wide.dtype) + (1 if zero_centered else 0)
    y = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * gain).to(x.dtype)
    return y if residual is None else (y, h)


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, zero_centered: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    # y, x + residual (empty without a residual: an op has a fixed number of results), r
    serves = norm_torch if serving("rms_norm", backend, x.device.type) == "torch" else norm_rows
    y, total, _, rstd = serves.forward(norm_rows.rows(x), norm_rows.rows(residual), weight, None, eps, zero_centered, center=False)
    return y.view(x.shape), x.new_empty(0) if total is None else total.view(x.shape), rstd


_rms_norm = torch.library.custom_op("kernels::rms_norm", _forward, mutates_args=())


@_rms_norm.register_fake
def _(x, residual, weight, eps, zero_centered, backend):
    statistic = x.new_empty(math.prod(x.shape[:-1]), dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(0) if residual is None else residual.new_empty(x.shape), statistic


def _backward(dy: Tensor, dtotal: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor, zero_centered: bool,
              backend: str) -> tuple[Tensor, Tensor, Tensor]:
    # dh, the same in dy's dtype (empty where that is h's), dweight
    serves = norm_torch if serving("rms_norm", backend, h.device.type) == "torch" else norm_rows
    dh, dx, dweight, _ = serves.backward(norm_rows.rows(dy), norm_rows.rows(dtotal), norm_rows.rows(h), weight, None, rstd, None, zero_centered)
    return dh.view(h.shape), dy.new_empty(0) if dx is None else dx.view(h.shape), dweight


_rms_norm_backward = torch.library.custom_op("kernels::rms_norm_backward", _backward, mutates_args=())


@_rms_norm_backward.register_fake
def _(dy, dtotal, h, weight, rstd, zero_centered, backend):
    dx = dy.new_empty(0) if dy.dtype == h.dtype else dy.new_empty(h.shape)
    return h.new_empty(h.shape), dx, weight.new_empty(weight.shape)


def _setup(ctx, inputs, output):
    x, residual, weight, _, ctx.zero_centered, ctx.backend = inputs
    ctx.residual, ctx.x_dtype = residual is not None, x.dtype
    ctx.save_for_backward(output[1] if ctx.residual else x, weight, output[2])
    ctx.registered = True
    ctx.set_materialize_grads(False)  # an output that nothing used sends None, not a tensor of zeros to be read


def _grad(ctx, dy, dtotal, _drstd):
    h, weight, rstd = ctx.saved_tensors
    dtotal = dtotal if ctx.residual else None
    if dy is None:  # only the new residual was used
        return None if dtotal is None else dtotal.to(ctx.x_dtype), dtotal, None, None, None, None
    backward = torch.ops.kernels.rms_norm_backward if ctx.registered else _backward
    dh, dx, dweight = backward(dy, dtotal, h, weight, rstd, ctx.zero_centered, ctx.backend)
    return dh if ctx.x_dtype == h.dtype else dx, dh if ctx.residual else None, dweight, None, None, None


_rms_norm.register_autograd(_grad, setup_context=_setup)
_unregistered = norm_torch.unregistered(_forward, _setup, _grad)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5, residual: Tensor | None = None, zero_centered: bool = False,
             backend: str = "auto") -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm over the last dimension, of x or of x + residual.

    Args:
        x: [..., N], fp32, bf16 or fp16; the last dimension dense, the leading ones collapsible into rows.
        weight: [N], in x's dtype or fp32.
        eps: added to the mean square.
        residual: [..., N], in x's dtype or fp32, strided as x may be.
        zero_centered: the gain is 1 + weight.
        backend: triton, torch, or auto.
    Returns:
        y [..., N] in x's dtype; with a residual (y, x + residual), the latter in the residual's dtype.
    Raises:
        TypeError: another dtype. ValueError: a shape or device that does not fit, strides that would need a copy, or N over 65,536 in Triton.
        MissingBackend: the backend asked for cannot serve here.
    """
    norm_rows.check("rms_norm", x, residual, weight=weight)
    op = _rms_norm if x.device.type != "cpu" or torch.compiler.is_compiling() else _unregistered.apply
    y, total, _ = op(x, residual, weight, eps, zero_centered, backend)
    return y if residual is None else (y, total)


def launches() -> list[Launch]:
    """Every configuration of the tile table, for the static check."""
    return norm_rows.every_launch("rms_norm", centered=False)
