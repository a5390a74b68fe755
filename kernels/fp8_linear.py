"""A linear layer whose three products run in FP8: y = x w^T, dx = dy w, dw = dy^T x, on `torch._scaled_mm` (what `fp8.py` quantises,
multiplied and scaled back). It runs where Transformer Engine is absent.

    recipe      x, w         dy             scales
    current     e4m3         e5m2 or e4m3   amax of the tensor itself
    delayed     e4m3         e5m2 or e4m3   given; the amaxes of this step are recorded for the next
    blockwise   e4m3         e5m2 or e4m3   1 x 128 of x, dy and their transposes along tokens; 128 x 128 of w

Every FP8 product wants both operands dense along the dimension that it contracts: forward takes x and w as they are, dx takes dy and w^T,
dw takes dy^T and x^T. For backward x^T is kept, in FP8 (a quarter of what fp32 keeps); w^T is quantised anew in backward, so that nothing
is kept of the weight, however many micro-batches are in flight.

Scales are applied to the sums, which are fp32. Forward lets Hopper's tensor cores keep partial sums in their own registers (fast
accumulation, 14 bits), as Transformer Engine does; the gradients do not. Contracted sizes are padded with zeros to multiples of 16 (of
128 with blocks), which is what cuBLAS wants; sizes that are multiples anyway cost nothing. Where the hardware lacks the product,
`emulation` reads the operands back and multiplies in fp32.

Memory traffic beside the products, in elements of b bytes, current scaling: x is read twice and written twice, w is read three times and
written twice, dy is read twice and written twice. Shapes: x [..., K], w [N, K], y [..., N].
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import serving
from kernels.checks import check_device, check_dtype, check_shape, rows_of
from kernels.fp8 import amax_of, dequantise, quantise
from kernels.fp8_scaling import BLOCK, E4M3, Fp8Recipe, scale_of

CURRENT = Fp8Recipe()
HELD = 1 << 24  # numbers of the temporary that is added to a main gradient: 64 MiB


def fp8_linear_reference(x: Tensor, weight: Tensor) -> Tensor:
    """What is approximated."""
    return F.linear(x, weight)


def _padded(data: Tensor, rows: int, cols: int) -> Tensor:
    """Zeros after the end up to multiples of `rows` and `cols`; the tensor itself where there is nothing to add."""
    down, right = -data.shape[0] % rows, -data.shape[1] % cols
    return F.pad(data.view(torch.uint8), (0, right, 0, down)).view(data.dtype) if down or right else data


def _block_scales(inverse: Tensor, rows: int, size: tuple[int, int]) -> Tensor:
    """Scales of the unpadded `rows`, for a padded operand of `size`, with the strides that cuBLAS wants."""
    across, square = size[1] // BLOCK, inverse.shape[0] != rows
    down = size[0] // BLOCK if square else size[0]
    inverse = F.pad(inverse, (0, across - inverse.shape[1], 0, down - inverse.shape[0]), value=1.0)
    if not square:
        return inverse.t().contiguous().t()
    return F.pad(inverse, (0, -across % 4))[:, :across]  # rows of scales begin at multiples of 16 bytes


def product(a: Tensor, a_inverse: Tensor, b: Tensor, b_inverse: Tensor, *, out_dtype: torch.dtype, fast: bool = False,
            backend: str = "auto") -> Tensor:
    """a b^T of FP8 operands a [M, K] and b [N, K], scaled back: [M, N]. Scales as from `quantise`: one for each, or blocks for both."""
    m, n = a.shape[0], b.shape[0]
    blocks = a_inverse.dim() == 2
    if not a.numel() or not b.numel():
        return a.new_zeros(m, n, dtype=out_dtype)
    with torch.autocast(a.device.type, enabled=False):  # which would multiply in bf16 what has been read back to fp32
        return _product(a, a_inverse, b, b_inverse, blocks, out_dtype, fast, backend)


def _product(a: Tensor, a_inverse: Tensor, b: Tensor, b_inverse: Tensor, blocks: bool, out_dtype: torch.dtype, fast: bool, backend: str) -> Tensor:
    m, n = a.shape[0], b.shape[0]
    if serving("fp8_linear_blockwise" if blocks else "fp8_linear", backend, a.device.type, a.device.index) == "emulation":
        if blocks:
            return (dequantise(a, a_inverse) @ dequantise(b, b_inverse).t()).to(out_dtype)
        return (a.float() @ b.float().t()).mul_(a_inverse).mul_(b_inverse).to(out_dtype)
    unit = BLOCK if blocks else 16
    a_, b_ = _padded(a, unit if blocks else 1, unit), _padded(b, unit, unit)
    if blocks:
        a_inverse, b_inverse = _block_scales(a_inverse, m, tuple(a_.shape)), _block_scales(b_inverse, n, tuple(b_.shape))
    y = torch._scaled_mm(a_, b_.t(), scale_a=a_inverse, scale_b=b_inverse.t() if blocks else b_inverse, out_dtype=out_dtype,
                         use_fast_accum=fast and a.is_cuda)
    return y if y.shape == (m, n) else y[:m, :n].contiguous()


def _over_group(amax: Tensor, group: str) -> Tensor:
    """The largest over the ranks of the group, in place; NaN counts as infinity, which every maximum carries on."""
    amax = torch.where(amax.isnan(), torch.inf, amax)
    dist.all_reduce(amax, dist.ReduceOp.MAX, group=dist.distributed_c10d._resolve_process_group(group))
    return amax


@torch.library.custom_op("kernels::fp8_linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, scales: Tensor | None, main_grad: Tensor | None, record: Tensor | None, dy_dtype: torch.dtype,
            blocks: bool, power_of_2: bool, group: str, keep: bool, parts: int, part: int, out_dtype: torch.dtype,
            backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y; one of `parts` parts of x^T in FP8 (if `keep`); the scales of x^T with blocks, else amax, scale and 1 / scale of x; the same three
    of the weight. main_grad, record and dy_dtype are backward's."""
    given = [None, None] if scales is None else [scales[:1], scales[1:2]]
    if scales is None and group and not blocks:
        both = scale_of(_over_group(torch.cat((amax_of(x), amax_of(weight))), group), E4M3, power_of_2=power_of_2)
        given = [both[:1], both[1:]]
    q = quantise(x, scaling="1x128" if blocks else "tensor", scale=given[0], transpose=keep, power_of_2=power_of_2)
    w = quantise(weight, scaling="128x128" if blocks else "tensor", scale=given[1], power_of_2=power_of_2)
    y = product(q.data, q.scale_inverse, w.data, w.scale_inverse, out_dtype=out_dtype, fast=True, backend=backend)
    # As bytes: outputs of a floating dtype take part in autograd, which cannot multiply FP8.
    x_t = q.data_t.view(torch.uint8) if keep else x.new_empty(0, dtype=torch.uint8)
    if keep and parts > 1:
        x_t = x_t.chunk(parts, dim=1)[part].contiguous()
    if not blocks:
        return y, x_t, q.figures, w.figures
    return y, x_t, q.scale_inverse_t if keep else x.new_empty(0, dtype=torch.float32), x.new_empty(0, dtype=torch.float32)


@_linear.register_fake
def _(x, weight, scales, main_grad, record, dy_dtype, blocks, power_of_2, group, keep, parts, part, out_dtype, backend):
    m, k = x.shape
    few = 0 if blocks else 3
    x_scales = x.new_empty(-(-m // BLOCK), k, dtype=torch.float32).t() if blocks and keep else x.new_empty(few, dtype=torch.float32)
    return (x.new_empty(m, weight.shape[0], dtype=out_dtype), x.new_empty((k, m // parts) if keep else 0, dtype=torch.uint8), x_scales,
            x.new_empty(few, dtype=torch.float32))


@torch.library.custom_op("kernels::fp8_linear_dx", mutates_args=())
def _dx(dy: Tensor, weight: Tensor, weight_scale: Tensor, scale: Tensor | None, dtype: torch.dtype, blocks: bool, power_of_2: bool,
        group: str, wanted: bool, keep: bool, out_dtype: torch.dtype, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """dx (if `wanted`); dy^T in FP8 (if `keep`); the scales of dy^T with blocks, else amax, scale and 1 / scale of dy."""
    if scale is None and group and not blocks:
        scale = scale_of(_over_group(amax_of(dy), group), dtype, power_of_2=power_of_2)
    q = quantise(dy, dtype=dtype, scaling="1x128" if blocks else "tensor", scale=scale, transpose=keep, power_of_2=power_of_2)
    dx = dy.new_empty(0, dtype=out_dtype)
    if wanted:
        w = quantise(weight, scaling="128x128" if blocks else "tensor", scale=None if blocks else weight_scale, transpose="only",
                     power_of_2=power_of_2)
        dx = product(q.data, q.scale_inverse, w.data_t, w.scale_inverse_t, out_dtype=out_dtype, backend=backend)
    dy_t = q.data_t.view(torch.uint8) if keep else dy.new_empty(0, dtype=torch.uint8)
    return dx, dy_t, q.figures if not blocks else q.scale_inverse_t if keep else dy.new_empty(0, dtype=torch.float32)


@_dx.register_fake
def _(dy, weight, weight_scale, scale, dtype, blocks, power_of_2, group, wanted, keep, out_dtype, backend):
    m, n = dy.shape
    few = 0 if blocks else 3
    scales = dy.new_empty(-(-m // BLOCK), n, dtype=torch.float32).t() if blocks and keep else dy.new_empty(few, dtype=torch.float32)
    dy_t = dy.new_empty((n, m) if keep else 0, dtype=torch.uint8)
    return dy.new_empty((m, weight.shape[1]) if wanted else 0, dtype=out_dtype), dy_t, scales


@torch.library.custom_op("kernels::fp8_gather", mutates_args=())
def _gather(x_t: Tensor, parts: int, group: str) -> Tensor:
    """[K, M] bytes from the [K, M / parts] of each rank."""
    whole = x_t.new_empty(parts * x_t.shape[0], x_t.shape[1])
    dist.all_gather_into_tensor(whole, x_t, group=dist.distributed_c10d._resolve_process_group(group))
    return whole.unflatten(0, (parts, -1)).transpose(0, 1).reshape(x_t.shape[0], -1)


@_gather.register_fake
def _(x_t, parts, group):
    return x_t.new_empty(x_t.shape[0], parts * x_t.shape[1])


@torch.library.custom_op("kernels::fp8_linear_dw", mutates_args=())
def _dw(dy_t: Tensor, dy_inverse: Tensor, x_t: Tensor, x_inverse: Tensor, dtype: torch.dtype, out_dtype: torch.dtype,
        backend: str) -> Tensor:
    return product(dy_t.view(dtype), dy_inverse, x_t.view(E4M3), x_inverse, out_dtype=out_dtype, backend=backend)


@_dw.register_fake
def _(dy_t, dy_inverse, x_t, x_inverse, dtype, out_dtype, backend):
    return dy_t.new_empty(dy_t.shape[0], x_t.shape[0], dtype=out_dtype)


@torch.library.custom_op("kernels::fp8_linear_dw_add", mutates_args=("main_grad",))
def _dw_add(main_grad: Tensor, dy_t: Tensor, dy_inverse: Tensor, x_t: Tensor, x_inverse: Tensor, dtype: torch.dtype, backend: str) -> None:
    """main_grad += dw, rows at a time: the product has no place to accumulate, and its temporary stays small."""
    rows = max(HELD // max(x_t.shape[0], 1) // BLOCK, 1) * BLOCK
    for start in range(0, dy_t.shape[0], rows):
        some = slice(start, start + rows)
        inverse = dy_inverse[some] if dy_inverse.dim() == 2 else dy_inverse
        main_grad[some] += product(dy_t[some].view(dtype), inverse, x_t.view(E4M3), x_inverse, out_dtype=torch.float32, backend=backend)


@_dw_add.register_fake
def _(main_grad, dy_t, dy_inverse, x_t, x_inverse, dtype, backend):
    return None


@torch.library.custom_op("kernels::fp8_record", mutates_args=("record",))
def _record(record: Tensor, amax: Tensor) -> None:
    """record = max(record, amax): the same however often a forward pass is recomputed, and in whatever order micro-batches come."""
    torch.maximum(record, amax, out=record)


@_record.register_fake
def _(record, amax):
    return None


def _setup(ctx, inputs, output):
    x, weight, scales, ctx.main_grad, ctx.record, ctx.dtype, ctx.blocks, ctx.power_of_2, ctx.group, _, ctx.parts, _, _, ctx.backend = inputs
    _, x_t, x_scales, weight_figures = output
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(weight, x_t, x_scales, weight_figures, *(() if scales is None else (scales[2:],)))


def _grad(ctx, dy, *_):
    weight, x_t, x_scales, weight_figures, *scale = ctx.saved_tensors
    wanted, keep = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
    if dy.stride(-1) != 1 or dy.stride(0) < dy.shape[1]:
        # What autograd hands over is its own (an expanded scalar after .sum(), a transpose): a copy here is no caller's surprise.
        dy = dy.clone(memory_format=torch.contiguous_format)
    dx, dy_t, dy_scales = torch.ops.kernels.fp8_linear_dx(
        dy, weight, weight_figures[1:2], scale[0] if scale else None, ctx.dtype, ctx.blocks, ctx.power_of_2, ctx.group, wanted, keep,
        ctx.x_dtype, ctx.backend)
    if ctx.record is not None and not ctx.blocks:
        torch.ops.kernels.fp8_record(ctx.record[2:], dy_scales[:1])
    x_inverse, dy_inverse = (x_scales, dy_scales) if ctx.blocks else (x_scales[2:], dy_scales[2:])
    if keep and ctx.parts > 1:
        x_t = torch.ops.kernels.fp8_gather(x_t, ctx.parts, ctx.group)
    dw = None
    if keep and ctx.main_grad is None:
        dw = torch.ops.kernels.fp8_linear_dw(dy_t, dy_inverse, x_t, x_inverse, ctx.dtype, weight.dtype, ctx.backend)
    elif keep:
        torch.ops.kernels.fp8_linear_dw_add(ctx.main_grad, dy_t, dy_inverse, x_t, x_inverse, ctx.dtype, ctx.backend)
        if hasattr(weight, "grad_added_to_main_grad"):  # megatron-core's agreement: a gradient nobody reads makes its hooks run
            weight.grad_added_to_main_grad = True
            dw = (torch.zeros_like if getattr(weight, "zero_out_wgrad", False) else torch.empty_like)(weight)
    return dx if wanted else None, dw, *[None] * 12


_linear.register_autograd(_grad, setup_context=_setup)


def fp8_linear(x: Tensor, weight: Tensor, *, recipe: Fp8Recipe = CURRENT, scales: Tensor | None = None, record: Tensor | None = None,
               group: "dist.ProcessGroup | None" = None, split: bool = False, main_grad: Tensor | None = None,
               out_dtype: torch.dtype | None = None, backend: str = "auto") -> Tensor:
    """x weight^T in FP8, and so are its gradients.

    Args:
        x: [..., K], fp32, bf16 or fp16; the last dimension dense, the leading ones collapsible into rows.
        weight: [N, K], in x's dtype.
        recipe: how operands are scaled.
        scales: fp32 [3], delayed scaling's for x, weight and dy. None takes them from the tensors of this call, as current scaling does
            (and as delayed scaling must in its first step).
        record: fp32 [3]; the amaxes of x, weight and dy (in backward) are taken into it by maximum. With blocks nothing is recorded.
        group: ranks that share x and weight: where scales come from the tensors, they are those of the whole ones. Collective in forward
            and backward.
        split: x is the same on all ranks of the group (sequence parallelism has gathered it): each keeps its share of the rows for
            backward, where they are gathered in FP8.
        main_grad: fp32 [N, K]; the weight's gradient is added to it in backward, and autograd gets none.
        out_dtype: of y; None = x's.
        backend: scaled_mm, emulation, or auto.
    Returns:
        [..., N].
    Raises:
        TypeError: dtypes. ValueError: shapes, devices, strides that would need a copy.
        MissingBackend: the backend asked for cannot serve here.
    """
    op = "fp8_linear"
    check_dtype(op, "x", x)
    check_dtype(op, "weight", weight, (x.dtype,))
    if not isinstance(recipe, Fp8Recipe):
        raise TypeError(f"{op}: recipe is a {type(recipe).__name__}; it must be a kernels.fp8_scaling.Fp8Recipe")
    rows = rows_of(op, "x", x)
    if weight.dim() != 2 or weight.shape[1] != rows.shape[1]:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}, expected [N, {rows.shape[1]}] for x {tuple(x.shape)}")
    if not weight.is_contiguous():
        raise ValueError(f"{op}: weight is strided {weight.stride()}; call .contiguous() where the copy is meant")
    check_device(op, "weight", weight, x.device)
    for name, tensor, shape in (("scales", scales, (3,)), ("record", record, (3,)), ("main_grad", main_grad, weight.shape)):
        if tensor is not None:
            check_dtype(op, name, tensor, (torch.float32,))
            check_shape(op, name, tensor, shape)
            check_device(op, name, tensor, x.device)
    if scales is not None and recipe.blocks:
        raise ValueError(f"{op}: scales are given, the recipe is blockwise; blocks take their scales from the tensors")
    out_dtype = out_dtype or x.dtype
    if out_dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{op}: out_dtype is {out_dtype}; it must be float32, bfloat16 or float16")
    keep = torch.is_grad_enabled() and weight.requires_grad
    parts = group.size() if group is not None else 1
    name, split = (group.group_name if parts > 1 else ""), split and parts > 1
    if split and rows.shape[0] % parts:
        raise ValueError(f"{op}: x has {rows.shape[0]} rows, the group {parts} ranks; with split=True each keeps an equal share")
    y, _, x_figures, weight_figures = torch.ops.kernels.fp8_linear(
        rows, weight, scales, main_grad, record, recipe.backward, recipe.blocks, recipe.power_of_2, name, keep, parts if split else 1,
        group.rank() if split else 0, out_dtype, backend)
    if record is not None and not recipe.blocks:
        torch.ops.kernels.fp8_record(record[:2], torch.stack((x_figures[0], weight_figures[0])).detach())
    return y.view(*x.shape[:-1], weight.shape[0])
