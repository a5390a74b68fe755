"""rms_norm and layer_norm in torch, for machines without Triton: the functions of norm_rows.py, with the same arguments and results.

On CPU the rows are worked on in pieces whose temporaries stay in the cache. From NATIVE columns on, layer_norm takes torch's own kernels, from
SUMS on for dweight and dbias too: those are summed row after row (fp32, 3,072 rows of 256: dweight off by 1.3e-6, in pieces by 1.3e-7), on 16-bit
tensors in 16 bits (bf16, 64 rows of 129: dweight off by 0.48, rounding alone by 0.06), so that they are taken from fp32 pieces there. In narrow
rows the kernels lose accuracy (3 columns: rstd off by 4e-7, in two passes by 1e-7).
"""
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.autocast import outside_autocast
from kernels.tiles import pieces_in_cache

NATIVE = 64
SUMS = 512


@outside_autocast
def forward(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, zero_centered: bool,
            center: bool) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """As norm_rows.forward."""
    gain, offset = weight.float() + 1 if zero_centered else weight.float(), None if bias is None else bias.float()
    rows, width = x.shape
    if center and width >= NATIVE:
        total = None if residual is None else residual + x
        h = x if total is None else total
        y, mean, rstd = torch.native_layer_norm(h, [width], gain, offset, eps)
        return y.to(x.dtype), total, mean.float().view(-1), rstd.float().view(-1)
    y, rstd = x.new_empty(x.shape), x.new_empty(rows, 1, dtype=torch.float32)
    mean, total = torch.empty_like(rstd) if center else None, None if residual is None else residual.new_empty(x.shape)
    for piece in pieces_in_cache(x):
        wide = x[piece].float()
        if total is not None:
            if total.dtype == torch.float32:
                wide = torch.add(wide, residual[piece], out=total[piece])
            else:
                total[piece] = wide + residual[piece]
                wide = total[piece].float()
        if mean is not None:
            torch.mean(wide, 1, keepdim=True, out=mean[piece])
            wide = wide - mean[piece]
        rstd[piece] = torch.linalg.vecdot(wide, wide).div_(width).add_(eps).rsqrt_().unsqueeze(1)
        out = y[piece] if y.dtype == torch.float32 else torch.empty_like(wide)
        torch.mul(wide, rstd[piece], out=out).mul_(gain)
        if offset is not None:
            out += offset
        if y.dtype != torch.float32:
            y[piece] = out
    return y, total, None if mean is None else mean.view(-1), rstd.view(-1)


@outside_autocast
def backward(dy: Tensor, dtotal: Tensor | None, h: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor, bias_dtype: torch.dtype | None,
             zero_centered: bool) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """As norm_rows.backward."""
    gain, (_rows, width) = weight.float() + 1 if zero_centered else weight.float(), h.shape
    dx = None if dy.dtype == h.dtype else dy.new_empty(h.shape)
    dweight, dbias = torch.zeros_like(gain), None if bias_dtype is None else torch.zeros_like(gain)
    mean, rstd = None if mean is None else mean.view(-1, 1), rstd.view(-1, 1)
    native = mean is not None and width >= NATIVE
    if native:
        whole = h.dtype == torch.float32 and width >= SUMS
        dh, *sums = _native(dy.to(h.dtype), h, mean, rstd, gain, [True, whole, whole and dbias is not None])
        if dtotal is not None:
            dh += dtotal
        if dx is not None:
            dx.copy_(dh)
        if whole:
            return dh, dx, sums[0].to(weight.dtype), None if dbias is None else sums[1].to(bias_dtype)
    else:
        dh = h.new_empty(h.shape)
    for piece in pieces_in_cache(h, 2**16):
        wide, wide_dy, r = h[piece].float(), dy[piece].float(), rstd[piece]
        if native and width >= SUMS:
            _, dweight_piece, dbias_piece = _native(wide_dy, wide, mean[piece], r, gain, [False, True, dbias is not None])
        else:
            if mean is not None:
                wide = wide - mean[piece]
            dweight_piece, dbias_piece = (wide * r).mul_(wide_dy).sum(0), None if dbias is None else wide_dy.sum(0)
        if not native:
            out = wide_dy * gain
            along = torch.linalg.vecdot(out, wide).div_(-width).unsqueeze(1).mul_(r).mul_(r)
            if mean is not None:
                out -= out.mean(1, keepdim=True)
            out.addcmul_(wide, along).mul_(r)
            if dtotal is not None:
                out += dtotal[piece]
            dh[piece] = out
            if dx is not None:
                dx[piece] = out
        dweight += dweight_piece
        if dbias is not None:
            dbias += dbias_piece
    return dh, dx, dweight.to(weight.dtype), None if dbias is None else dbias.to(bias_dtype)


def _native(dy: Tensor, h: Tensor, mean: Tensor, rstd: Tensor, gain: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    # the bias itself is not read, only whether there is one
    return torch.ops.aten.native_layer_norm_backward(dy, h, h.shape[1:], mean, rstd, gain, gain, wanted)


def unregistered(run: Callable, setup: Callable, gradient: Callable) -> type[torch.autograd.Function]:
    """A registered op without its registration, whose dispatch in Python takes 0.1 ms each way: a tenth of a norm of 2,048 x 1,024 on a CPU."""

    class Unregistered(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = run(*inputs)
            setup(ctx, inputs, output)
            ctx.registered = False
            return output

        @staticmethod
        @once_differentiable  # as the registered op: what it saved are constants to it, so that a second derivative would be wrong
        def backward(ctx, *gradients):
            return gradient(ctx, *gradients)

    return Unregistered
