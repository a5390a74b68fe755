"""What the gated activations share: y = f(a) b with x = [a, b], f of `kernels.activations`. `swiglu` and `geglu` are its users.

Backward recomputes f from x, so that nothing but x is kept; for an incoming dy
    da = dy b f'(a),      db = dy f(a).
In torch the passes round in x's dtype, as PyTorch's do; the kernels' arithmetic is fp32.
"""
from collections.abc import Callable

import torch
from torch import Tensor

from kernels import activations, tiles
from kernels.backend import serving
from kernels.checks import check_dtype, rows_of
from kernels.jit import Launch, narrow, on_device_of, tl, triton


@triton.jit
def _forward(x_ptr, y_ptr, x_stride, width, KIND: tl.constexpr, BLOCK: tl.constexpr):
    pieces = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // pieces).to(tl.int64)  # rows x stride passes 2^31 at long sequences
    col = tl.program_id(0) % pieces * BLOCK + tl.arange(0, BLOCK)
    live = col < width
    a = tl.load(x_ptr + row * x_stride + col, mask=live, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + row * x_stride + width + col, mask=live, other=0.0).to(tl.float32)
    active, _ = activations.with_derivative(a, KIND, x_ptr.dtype.element_ty == tl.float32)
    tl.store(y_ptr + row * width + col, narrow(active * b, y_ptr.dtype.element_ty), mask=live)


@triton.jit
def _backward(dy_ptr, x_ptr, dx_ptr, dy_stride, x_stride, width, KIND: tl.constexpr, BLOCK: tl.constexpr):
    pieces = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // pieces).to(tl.int64)
    col = tl.program_id(0) % pieces * BLOCK + tl.arange(0, BLOCK)
    live = col < width
    a = tl.load(x_ptr + row * x_stride + col, mask=live, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + row * x_stride + width + col, mask=live, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * dy_stride + col, mask=live, other=0.0).to(tl.float32)
    active, slope = activations.with_derivative(a, KIND, x_ptr.dtype.element_ty == tl.float32)
    dtype: tl.constexpr = dx_ptr.dtype.element_ty
    tl.store(dx_ptr + row * 2 * width + col, narrow(dy * b * slope, dtype), mask=live)
    tl.store(dx_ptr + row * 2 * width + width + col, narrow(dy * active, dtype), mask=live)


def register(name: str) -> Callable[[Tensor, str, str], Tensor]:
    """The registered op kernels::<name>(x [rows, 2N], kind, backend) -> [rows, N], with kernels::<name>_backward(dy, x, kind, backend) -> dx."""

    @torch.library.custom_op(f"kernels::{name}", mutates_args=())
    def forward(x: Tensor, kind: str, backend: str) -> Tensor:
        rows, width = x.shape[0], x.shape[1] // 2
        y = x.new_empty(rows, width)
        if serving(name, backend, x.device.type) == "torch":
            torch.mul(activations.forward(x[:, :width], kind), x[:, width:], out=y)
        elif y.numel():
            choice = tiles.activation(width)
            with on_device_of(x):
                _forward[(rows * triton.cdiv(width, choice["BLOCK"]),)](x, y, x.stride(0), width, KIND=kind, **choice)
        return y

    @forward.register_fake
    def _(x, kind, backend):
        return x.new_empty(x.shape[0], x.shape[1] // 2)

    @torch.library.custom_op(f"kernels::{name}_backward", mutates_args=())
    def backward(dy: Tensor, x: Tensor, kind: str, backend: str) -> Tensor:
        rows, width = dy.shape
        dx = x.new_empty(x.shape)
        if serving(name, backend, x.device.type) == "torch":
            a, b, da, db = x[:, :width], x[:, width:], dx[:, :width], dx[:, width:]
            torch.mul(dy, activations.forward(a, kind), out=db)
            activations.backward(dy * b, a, kind, out=da)
        elif dy.numel():
            choice = tiles.activation(width)
            with on_device_of(x):
                _backward[(rows * triton.cdiv(width, choice["BLOCK"]),)](dy, x, dx, dy.stride(0), x.stride(0), width, KIND=kind, **choice)
        return dx

    @backward.register_fake
    def _(dy, x, kind, backend):
        return x.new_empty(x.shape)

    def setup(ctx, inputs, output):
        x, ctx.kind, ctx.backend = inputs
        ctx.save_for_backward(x)

    def grad(ctx, dy):
        # What autograd hands over is its own (an expanded scalar after .sum(), a transpose): a copy here is no caller's surprise.
        return backward(dy if dy.stride(-1) == 1 else dy.contiguous(), *ctx.saved_tensors, ctx.kind, ctx.backend), None, None

    forward.register_autograd(grad, setup_context=setup)
    return forward


def apply(name: str, op: Callable[[Tensor, str, str], Tensor], x: Tensor, kind: str, backend: str) -> Tensor:
    """The registered op on x [..., 2N] -> [..., N], after the checks of its public function."""
    check_dtype(name, "x", x)
    rows = rows_of(name, "x", x)
    width = rows.shape[1] // 2  # no divmod: torch.compile has none of a size that it keeps open
    if rows.shape[1] % 2:
        raise ValueError(f"{name}: the last dimension of x is {rows.shape[1]}; it holds gate and up, so it must be even")
    if activations.plain_torch(name, backend, x):
        a, b = x.chunk(2, dim=-1)  # not two slices: autograd would pad each gradient with zeros and add the two
        return activations.forward(a, kind) * b
    return op(rows, kind, backend).view(*x.shape[:-1], width)


def launches_of(name: str, kinds: tuple[str, ...]) -> list[Launch]:
    """Every configuration of the tile table, for the static check."""
    found = []
    for kind in kinds:
        for width in tiles.ACTIVATION_WIDTHS:
            choice = tiles.activation(width)
            warps = choice.pop("num_warps")
            for dtype in ("bf16", "fp32"):
                data, of = f"*{dtype}", f"{kind} N={width} {dtype}"
                constants = {"KIND": kind, **choice}
                found.append(Launch(name, f"forward {of}", _forward, {"x_ptr": data, "y_ptr": data, "x_stride": "i32", "width": "i32"}, constants,
                                    warps, multiples_of_16=("x_stride", "width")))
                found.append(Launch(name, f"backward {of}", _backward, {"dy_ptr": data, "x_ptr": data, "dx_ptr": data, "dy_stride": "i32",
                                                                       "x_stride": "i32", "width": "i32"},
                                    constants, warps, multiples_of_16=("dy_stride", "x_stride", "width")))
    return found
