"""LayerNorm with the residual add before it: h = x + residual, y = (h - m) / sqrt(mean((h - m)^2) + eps) g + b with m = mean(h), over the last
dimension (Ba, Kiros & Hinton 2016, arXiv 1607.06450). h is the new residual, rounded to the residual's dtype before it is normed; without a
residual h = x. g = weight, or 1 + weight where gamma is zero-centred (megatron-core's layernorm_zero_centered_gamma). The variance is the mean of
squared deviations, not mean(h^2) - m^2, which cancels where the mean is large.

Backward, with r = 1 / sqrt(...) as above, hn = (h - m) r, for an incoming dy and, where there is a residual, the dh' that arrives at h itself:
    dh = dh' + r (g dy - hn mean(g dy hn) - mean(g dy)),     dweight = sum over rows of dy hn,     dbias = sum over rows of dy.
dh is the gradient of x and of the residual alike: one tensor serves both where they have one dtype.

Memory traffic for [rows, N]: forward reads x and the residual, writes h and y (without a residual: reads x, writes y) and fp32 m and r a row;
backward reads dy, h and dh', writes dh (twice where x and residual differ in dtype). Saved: h, weight, m, r. Statistics and sums are fp32.
Shapes: x, residual [..., N]; weight, bias [N]; y [..., N].
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import norm_rows, norm_torch
from kernels.backend import serving
from kernels.jit import Launch


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5, residual: Tensor | None = None,
                         zero_centered: bool = False):
    """The definition in plain PyTorch, differentiable: fp32 arithmetic for 16-bit tensors, fp64 for fp64. What the op is compared with."""
    h = x if residual is None else (x + residual).to(residual.dtype)
    wide = h if h.dtype == torch.float64 else h.float()
    gain = weight.to(wide.dtype) + (1 if zero_centered else 0)
    deviation = wide - wide.mean(-1, keepdim=True)
    y = deviation * torch.rsqrt(deviation.square().mean(-1, keepdim=True) + eps) * gain
    y = (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)
    return y if residual is None else (y, h)


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, zero_centered: bool,
             backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # y, x + residual (empty without a residual: an op has a fixed number of results), m, r
    serves = norm_torch if serving("layer_norm", backend, x.device.type) == "torch" else norm_rows
    y, total, mean, rstd = serves.forward(norm_rows.rows(x), norm_rows.rows(residual), weight, bias, eps, zero_centered, center=True)
    return y.view(x.shape), x.new_empty(0) if total is None else total.view(x.shape), mean, rstd


_layer_norm = torch.library.custom_op("kernels::layer_norm", _forward, mutates_args=())


@_layer_norm.register_fake
def _(x, residual, weight, bias, eps, zero_centered, backend):
    statistic = x.new_empty(math.prod(x.shape[:-1]), dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(0) if residual is None else residual.new_empty(x.shape), statistic, torch.empty_like(statistic)


def _backward(dy: Tensor, dtotal: Tensor | None, h: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, rstd: Tensor,
              zero_centered: bool, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # dh, the same in dy's dtype (empty where that is h's), dweight, dbias (empty without a bias)
    serves = norm_torch if serving("layer_norm", backend, h.device.type) == "torch" else norm_rows
    dh, dx, dweight, dbias = serves.backward(norm_rows.rows(dy), norm_rows.rows(dtotal), norm_rows.rows(h), weight, mean, rstd,
                                             None if bias is None else bias.dtype, zero_centered)
    return dh.view(h.shape), dy.new_empty(0) if dx is None else dx.view(h.shape), dweight, weight.new_empty(0) if dbias is None else dbias


_layer_norm_backward = torch.library.custom_op("kernels::layer_norm_backward", _backward, mutates_args=())


@_layer_norm_backward.register_fake
def _(dy, dtotal, h, weight, bias, mean, rstd, zero_centered, backend):
    dx = dy.new_empty(0) if dy.dtype == h.dtype else dy.new_empty(h.shape)
    return h.new_empty(h.shape), dx, weight.new_empty(weight.shape), weight.new_empty(0) if bias is None else bias.new_empty(bias.shape)


def _setup(ctx, inputs, output):
    x, residual, weight, bias, _, ctx.zero_centered, ctx.backend = inputs
    ctx.residual, ctx.x_dtype = residual is not None, x.dtype
    ctx.save_for_backward(output[1] if ctx.residual else x, weight, bias, *output[2:])
    ctx.registered = True
    ctx.set_materialize_grads(False)  # an output that nothing used sends None, not a tensor of zeros to be read


def _grad(ctx, dy, dtotal, _dmean, _drstd):
    h, weight, bias, mean, rstd = ctx.saved_tensors
    dtotal = dtotal if ctx.residual else None
    if dy is None:  # only the new residual was used
        return None if dtotal is None else dtotal.to(ctx.x_dtype), dtotal, None, None, None, None, None
    backward = torch.ops.kernels.layer_norm_backward if ctx.registered else _backward
    dh, dx, dweight, dbias = backward(dy, dtotal, h, weight, bias, mean, rstd, ctx.zero_centered, ctx.backend)
    return dh if ctx.x_dtype == h.dtype else dx, dh if ctx.residual else None, dweight, None if bias is None else dbias, None, None, None


_layer_norm.register_autograd(_grad, setup_context=_setup)
_unregistered = norm_torch.unregistered(_forward, _setup, _grad)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5, residual: Tensor | None = None,
               zero_centered: bool = False, backend: str = "auto") -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm over the last dimension, of x or of x + residual.

    Args:
        x: [..., N], fp32, bf16 or fp16; the last dimension dense, the leading ones collapsible into rows.
        weight, bias: [N], in x's dtype or fp32; bias may be None.
        eps: added to the variance.
        residual: [..., N], in x's dtype or fp32, strided as x may be.
        zero_centered: the gain is 1 + weight.
        backend: triton, torch, or auto.
    Returns:
        y [..., N] in x's dtype; with a residual (y, x + residual), the latter in the residual's dtype.
    Raises:
        TypeError: another dtype. ValueError: a shape or device that does not fit, strides that would need a copy, or N over 65,536 in Triton.
        MissingBackend: the backend asked for cannot serve here.
    """
    norm_rows.check("layer_norm", x, residual, weight=weight, bias=bias)
    eager = x.device.type == "cpu" and not torch.compiler.is_compiling()
    if eager and x.dtype == torch.float32 and x.shape[-1] >= norm_torch.SUMS and x.numel() and serving("layer_norm", backend, "cpu") == "torch":
        # what _forward and _backward would call, in C++ all the way: Python around it takes a fifth of the time of 2,048 x 1,024
        h = x if residual is None else residual + x
        y = F.layer_norm(h, h.shape[-1:], weight + 1 if zero_centered else weight, bias, eps)
        return y if residual is None else (y, h)
    op = _unregistered.apply if eager else _layer_norm
    y, total, _, _ = op(x, residual, weight, bias, eps, zero_centered, backend)
    return y if residual is None else (y, total)


def launches() -> list[Launch]:
    """Every configuration of the tile table, for the static check."""
    return norm_rows.every_launch("layer_norm", centered=True)
