"""SwiGLU: y = silu(a) b with x = [a, b], silu(a) = a sigmoid(a) (Shazeer 2020, arXiv 2002.05202).

Backward recomputes sigmoid from x, so that nothing but x is kept; for an incoming dy, with s = sigmoid(a):
    da = dy b s (1 + a (1 - s)),      db = dy a s.

Memory traffic for [rows, 2N]: forward reads 2N and writes N a row, backward reads 3N and writes 2N. Arithmetic is fp32 whatever the dtype.
Shapes: x [..., 2N], gate first; y [..., N].
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import tiles
from kernels.backend import serving
from kernels.checks import check_dtype, rows_of
from kernels.jit import Launch, narrow, tl, triton


def swiglu_reference(x: Tensor) -> Tensor:
    """The definition in plain PyTorch, differentiable, in x's own dtype: what the op is compared with in fp64, and what it replaces."""
    a, b = x.chunk(2, dim=-1)
    return F.silu(a) * b


@triton.jit
def _forward(x_ptr, y_ptr, x_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # rows x stride passes 2^31 at long sequences
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = col < width
    a = tl.load(x_ptr + row * x_stride + col, mask=live, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + row * x_stride + width + col, mask=live, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * width + col, narrow(a * tl.sigmoid(a) * b, y_ptr.dtype.element_ty), mask=live)


@triton.jit
def _backward(dy_ptr, x_ptr, dx_ptr, dy_stride, x_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = col < width
    a = tl.load(x_ptr + row * x_stride + col, mask=live, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + row * x_stride + width + col, mask=live, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * dy_stride + col, mask=live, other=0.0).to(tl.float32)
    s = tl.sigmoid(a)
    dtype: tl.constexpr = dx_ptr.dtype.element_ty
    tl.store(dx_ptr + row * 2 * width + col, narrow(dy * b * s * (1 + a * (1 - s)), dtype), mask=live)
    tl.store(dx_ptr + row * 2 * width + width + col, narrow(dy * a * s, dtype), mask=live)


@torch.library.custom_op("kernels::swiglu", mutates_args=())
def _swiglu(x: Tensor, backend: str) -> Tensor:
    rows, width = x.shape[0], x.shape[1] // 2
    if serving("swiglu", backend, x.device.type) == "torch":
        a, b = x.chunk(2, dim=-1)
        return F.silu(a).mul_(b) if x.dtype == torch.float32 else F.silu(a.float()).mul_(b).to(x.dtype)
    y = x.new_empty(rows, width)
    if y.numel():
        choice = tiles.elementwise(width)
        _forward[(rows, triton.cdiv(width, choice["BLOCK"]))](x, y, x.stride(0), width, **choice)
    return y


@_swiglu.register_fake
def _(x, backend):
    return x.new_empty(x.shape[0], x.shape[1] // 2)


@torch.library.custom_op("kernels::swiglu_backward", mutates_args=())
def _swiglu_backward(dy: Tensor, x: Tensor, backend: str) -> Tensor:
    rows, width = dy.shape
    dx = x.new_empty(x.shape)
    if serving("swiglu", backend, x.device.type) == "torch":
        a, b, dy = x[:, :width].float(), x[:, width:].float(), dy.float()
        silu = F.silu(a)
        db = dy * silu
        da = torch.ops.aten.silu_backward(dy.mul(b), a)
        dx[:, :width], dx[:, width:] = da, db
    elif dy.numel():
        choice = tiles.elementwise(width)
        _backward[(rows, triton.cdiv(width, choice["BLOCK"]))](dy, x, dx, dy.stride(0), x.stride(0), width, **choice)
    return dx


@_swiglu_backward.register_fake
def _(dy, x, backend):
    return x.new_empty(x.shape)


def _setup(ctx, inputs, output):
    x, ctx.backend = inputs
    ctx.save_for_backward(x)


def _grad(ctx, dy):
    # What autograd hands over is its own (an expanded scalar after .sum(), a transpose): a copy here is no caller's surprise.
    return torch.ops.kernels.swiglu_backward(dy if dy.stride(-1) == 1 else dy.contiguous(), *ctx.saved_tensors, ctx.backend), None


_swiglu.register_autograd(_grad, setup_context=_setup)


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
    check_dtype("swiglu", "x", x)
    rows = rows_of("swiglu", "x", x)
    if rows.shape[1] % 2:
        raise ValueError(f"swiglu: the last dimension of x is {rows.shape[1]}; it holds gate and up, so it must be even")
    return _swiglu(rows, backend).view(*x.shape[:-1], rows.shape[1] // 2)


def launches() -> list[Launch]:
    """Every configuration of the tile table, for the static check."""
    found = []
    for width in (256, 4096):
        choice = tiles.elementwise(width)
        warps = choice.pop("num_warps")
        for dtype in ("bf16", "fp32"):
            data = f"*{dtype}"
            found.append(Launch("swiglu", f"forward N={width} {dtype}", _forward,
                                {"x_ptr": data, "y_ptr": data, "x_stride": "i32", "width": "i32"}, choice, warps,
                                multiples_of_16=("x_stride", "width")))
            found.append(Launch("swiglu", f"backward N={width} {dtype}", _backward,
                                {"dy_ptr": data, "x_ptr": data, "dx_ptr": data, "dy_stride": "i32", "x_stride": "i32", "width": "i32"},
                                choice, warps, multiples_of_16=("dy_stride", "x_stride", "width")))
    return found
