"""y = gelu(x + b): the bias of the first projection and the activation of GPT's MLP, in one pass (gelu: `kernels.activations`).

Backward recomputes x + b and gelu'; for an incoming dy, with t = x + b:
    dx = dy gelu'(t),      db = the sum of dx over rows.
db is summed in fp32 from the unrounded dx: each program sums its own rows into a row of partial sums, and these are added up in a fixed order, so that
the same input gives the same bits. No atomics. 
In torch the passes round in x's dtype, as PyTorch's do; the kernels' arithmetic is fp32.

Memory traffic for [rows, N]: forward reads N and writes N a row, backward reads 2N and writes N; the partial sums are under 4 % of that.
Shapes: x [..., N], b [N]; y [..., N].
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import activations, tiles
from kernels.activations import gelu_kind
from kernels.backend import serving
from kernels.checks import check_device, check_dtype, check_last_dense, check_shape, rows_of
from kernels.jit import Launch, narrow, on_device_of, tl, triton


def bias_gelu_reference(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    """The definition in plain PyTorch, differentiable, in x's own dtype: what the op is compared with in fp64, and what it replaces."""
    return F.gelu(_sum(x, bias), approximate=approximate)


@triton.jit
def _forward(x_ptr, bias_ptr, y_ptr, x_stride, width, HAS_BIAS: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr):
    pieces = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // pieces).to(tl.int64)  # rows x stride passes 2^31 at long sequences
    col = tl.program_id(0) % pieces * BLOCK + tl.arange(0, BLOCK)
    live = col < width
    t = tl.load(x_ptr + row * x_stride + col, mask=live, other=0.0).to(tl.float32)
    if HAS_BIAS:
        t += tl.load(bias_ptr + col, mask=live, other=0.0).to(tl.float32)
    y, _ = activations.with_derivative(t, KIND, x_ptr.dtype.element_ty == tl.float32)
    tl.store(y_ptr + row * width + col, narrow(y, y_ptr.dtype.element_ty), mask=live)


@triton.jit
def _backward(dy_ptr, x_ptr, bias_ptr, dx_ptr, partial_ptr, dy_stride, x_stride, rows, width, HAS_BIAS: tl.constexpr, KIND: tl.constexpr,
              GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """GROUP rows of BLOCK columns, ROWS at a time; their dx summed into row program_id(1) of the partial sums."""
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    live_col = col < width
    bias = tl.zeros((1, BLOCK), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + col, mask=live_col, other=0.0).to(tl.float32)
    exact: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    total, lost = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, GROUP, ROWS):
        row = (tl.program_id(1) * GROUP + start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        live = live_col & (row < rows)
        t = tl.load(x_ptr + row * x_stride + col, mask=live, other=0.0).to(tl.float32) + bias
        dy = tl.load(dy_ptr + row * dy_stride + col, mask=live, other=0.0).to(tl.float32)
        _, slope = activations.with_derivative(t, KIND, exact)
        dx = dy * slope
        tl.store(dx_ptr + row * width + col, narrow(dx, dx_ptr.dtype.element_ty), mask=live)
        if exact:  # Kahan's sum: rounding errors of fp32 sums would be as large as all others together
            step = dx - lost
            longer = total + step
            lost, total = (longer - total) - step, longer
        else:
            total += dx
    if HAS_BIAS:
        if exact:
            sums = tl.sum(total.to(tl.float64) - lost.to(tl.float64), axis=0).to(tl.float32)
        else:
            sums = tl.sum(total, axis=0)
        tl.store(partial_ptr + tl.program_id(1).to(tl.int64) * width + col, sums[None, :], mask=live_col)


def _sum(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias


@torch.library.custom_op("kernels::bias_gelu", mutates_args=())
def _bias_gelu(x: Tensor, bias: Tensor | None, kind: str, backend: str) -> Tensor:
    if serving("bias_gelu", backend, x.device.type) == "torch":
        return activations.forward(_sum(x, bias), kind)
    y = x.new_empty(x.shape)
    if y.numel():
        rows, width = x.shape
        choice = tiles.activation(width)
        with on_device_of(x):
            _forward[(rows * triton.cdiv(width, choice["BLOCK"]),)](x, bias, y, x.stride(0), width, HAS_BIAS=bias is not None, KIND=kind, **choice)
    return y


@_bias_gelu.register_fake
def _(x, bias, kind, backend):
    return x.new_empty(x.shape)


@torch.library.custom_op("kernels::bias_gelu_backward", mutates_args=())
def _bias_gelu_backward(dy: Tensor, x: Tensor, bias: Tensor | None, kind: str, backend: str) -> tuple[Tensor, Tensor]:
    """(dx, dbias); dbias is empty without a bias."""
    rows, width = dy.shape
    dx = x.new_empty(x.shape)
    if serving("bias_gelu", backend, x.device.type) == "torch":
        activations.backward(dy, _sum(x, bias), kind, out=dx)
        return dx, x.new_empty(0) if bias is None else dx.sum(0)
    choice = tiles.column_sums(rows, width)
    groups = triton.cdiv(rows, choice["GROUP"])
    partial = x.new_empty(groups if bias is not None else 0, width, dtype=torch.float32)
    if dy.numel():
        with on_device_of(x):
            _backward[(triton.cdiv(width, choice["BLOCK"]), groups)](dy, x, bias, dx, partial, dy.stride(0), x.stride(0), rows, width,
                                                                    HAS_BIAS=bias is not None, KIND=kind, **choice)
    return dx, x.new_empty(0) if bias is None else partial.sum(0, dtype=torch.float64).to(bias.dtype)


@_bias_gelu_backward.register_fake
def _(dy, x, bias, kind, backend):
    return x.new_empty(x.shape), x.new_empty(0) if bias is None else torch.empty_like(bias)


def _setup(ctx, inputs, output):
    x, bias, ctx.kind, ctx.backend = inputs
    ctx.save_for_backward(x, bias)


def _grad(ctx, dy):
    x, bias = ctx.saved_tensors
    # What autograd hands over is its own (an expanded scalar after .sum(), a transpose): a copy here is no caller's surprise.
    dx, dbias = torch.ops.kernels.bias_gelu_backward(dy if dy.stride(-1) == 1 else dy.contiguous(), x, bias, ctx.kind, ctx.backend)
    return dx, None if bias is None else dbias, None, None


_bias_gelu.register_autograd(_grad, setup_context=_setup)


def bias_gelu(x: Tensor, bias: Tensor | None = None, *, approximate: str = "none", backend: str = "auto") -> Tensor:
    """gelu(x + bias).

    Args:
        x: [..., N], fp32, bf16 or fp16; the last dimension dense, the leading ones collapsible into rows.
        bias: [N], dense, of x's dtype; None for gelu(x).
        approximate: "none" for the exact gelu, "tanh" for its approximation, as in `torch.nn.functional.gelu`.
        backend: triton, torch, or auto.
    Returns:
        [..., N], in x's dtype.
    Raises:
        TypeError: another dtype. ValueError: a bias that does not fit, another `approximate`, or strides that would need a copy.
        MissingBackend: the backend asked for cannot serve here.
    """
    check_dtype("bias_gelu", "x", x)
    rows = rows_of("bias_gelu", "x", x)
    if bias is not None:
        check_dtype("bias_gelu", "bias", bias, (x.dtype,))
        check_device("bias_gelu", "bias", bias, x.device)
        check_shape("bias_gelu", "bias", bias, (x.shape[-1],))
        check_last_dense("bias_gelu", "bias", bias)
    kind = gelu_kind("bias_gelu", approximate)
    if activations.plain_torch("bias_gelu", backend, x):
        return activations.forward(_sum(x, bias), kind)
    return _bias_gelu(rows, bias, kind, backend).view(x.shape)


def launches() -> list[Launch]:
    """Every configuration of the tile table, for the static check."""
    found = []
    for kind in ("gelu", "gelu_tanh"):
        for dtype in ("bf16", "fp32"):
            data = f"*{dtype}"
            for width in tiles.ACTIVATION_WIDTHS:
                choice = tiles.activation(width)
                warps = choice.pop("num_warps")
                found.append(Launch("bias_gelu", f"forward {kind} N={width} {dtype}", _forward,
                                    {"x_ptr": data, "bias_ptr": data, "y_ptr": data, "x_stride": "i32", "width": "i32"},
                                    {"HAS_BIAS": True, "KIND": kind, **choice}, warps, multiples_of_16=("x_stride", "width")))
            for rows, has_bias in ((2048, True), (8192, True), (8192, False)):
                choice = tiles.column_sums(rows, 4096)
                warps = choice.pop("num_warps")
                found.append(Launch("bias_gelu", f"backward {kind} rows={rows}{'' if has_bias else ' no bias'} {dtype}", _backward,
                                    {"dy_ptr": data, "x_ptr": data, "bias_ptr": data, "dx_ptr": data, "partial_ptr": "*fp32", "dy_stride": "i32",
                                     "x_stride": "i32", "rows": "i32", "width": "i32"},
                                    {"HAS_BIAS": has_bias, "KIND": kind, **choice}, warps, multiples_of_16=("dy_stride", "x_stride", "width")))
    return found
