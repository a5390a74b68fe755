"""What rms_norm and layer_norm share: the Triton kernels over rows, their launches, and what both check of their arguments.

A row h (x, or x + residual rounded to the residual's dtype) becomes y = (h - mean) rstd gain + bias. layer_norm has a mean, rms_norm none: a
pointer that is None takes its part out of the compiled kernel, so that neither pays for the other. gain = weight, or 1 + weight where it is
zero-centred. Backward, with xn = (h - mean) rstd and dh' the gradient that arrives at h itself (as the new residual):
    dh = dh' + rstd (gain dy - xn mean(gain dy xn) - mean(gain dy)),     dweight = sum over rows of dy xn,     dbias = sum over rows of dy;
without a mean the last term of dh is absent.

Forward: a program holds one row, or several narrow ones, in registers. Backward: a fixed number of programs walks over the rows, each with its
share of dweight and dbias in registers, written once as one fp32 row; a last kernel adds those rows in a fixed order. Rows too wide for
registers are looped over, and read again from the L2 cache.
No atomics, and no number of programs taken from the machine: the same bits on every run, and on every GPU.
"""
import math

import torch
from torch import Tensor

from kernels import tiles
from kernels.checks import check_device, check_dtype, check_last_dense, check_shape, rows_of
from kernels.jit import Launch, narrow, on_device_of, tl, triton


@triton.jit
def _gain(weight_ptr, col, live, ONE: tl.constexpr):
    gain = tl.load(weight_ptr + col, mask=live, other=0.0, eviction_policy="evict_last").to(tl.float32)  # every program reads it: stays in L1
    return gain + 1.0 if ONE else gain


@triton.jit
def _row_sum(x_ptr, residual_ptr, total_ptr, at, residual_at, total_at, live):
    """h = x + residual in fp32, rounded to the residual's dtype and stored; x where there is no residual."""
    h = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        h += tl.load(residual_ptr + residual_at, mask=live, other=0.0).to(tl.float32)
        total = narrow(h, total_ptr.dtype.element_ty)
        tl.store(total_ptr + total_at, total, mask=live)
        h = total.to(tl.float32)
    return h


@triton.jit
def _forward(x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, total_ptr, mean_ptr, rstd_ptr, x_stride, residual_stride, rows, width, eps,
             ONE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # rows x stride passes 2^31 at long sequences
    col = tl.arange(0, BLOCK)[None, :]
    there = row < rows
    live = there[:, None] & (col < width)
    at = row[:, None] * width + col
    h = _row_sum(x_ptr, residual_ptr, total_ptr, row[:, None] * x_stride + col, row[:, None] * residual_stride + col, at, live)
    if mean_ptr is not None:
        mean = tl.sum(h, 1) / width
        tl.store(mean_ptr + row, mean, mask=there)
        h = tl.where(live, h - mean[:, None], 0.0)  # deviations first, then their squares: E[h^2] - mean^2 would cancel
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(h * h, 1) / width + eps))
    tl.store(rstd_ptr + row, rstd, mask=there)
    y = h * rstd[:, None] * _gain(weight_ptr, col, col < width, ONE)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + col, mask=col < width, other=0.0, eviction_policy="evict_last").to(tl.float32)
    tl.store(y_ptr + at, narrow(y, y_ptr.dtype.element_ty), mask=live)


@triton.jit
def _forward_loop(x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, total_ptr, mean_ptr, rstd_ptr, x_stride, residual_stride, rows, width, eps,
                  ONE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        col = start + tl.arange(0, BLOCK)
        h = _row_sum(x_ptr, residual_ptr, total_ptr, row * x_stride + col, row * residual_stride + col, row * width + col, col < width)
        first += h if mean_ptr is not None else h * h
    h_ptr = x_ptr + row * x_stride
    if residual_ptr is not None:
        h_ptr = total_ptr + row * width
        tl.debug_barrier()  # other threads of this program may have stored what this one reads
    mean = 0.0
    square = tl.sum(first, 0)
    if mean_ptr is not None:
        mean = square / width
        tl.store(mean_ptr + row, mean)
        second = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, width, BLOCK):
            col = start + tl.arange(0, BLOCK)
            h = tl.load(h_ptr + col, mask=col < width, other=0.0).to(tl.float32)
            h = tl.where(col < width, h - mean, 0.0)
            second += h * h
        square = tl.sum(second, 0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(square / width + eps))
    tl.store(rstd_ptr + row, rstd)
    for start in range(0, width, BLOCK):
        col = start + tl.arange(0, BLOCK)
        live = col < width
        y = (tl.load(h_ptr + col, mask=live, other=0.0).to(tl.float32) - mean) * rstd * _gain(weight_ptr, col, live, ONE)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + col, mask=live, other=0.0, eviction_policy="evict_last").to(tl.float32)
        tl.store(y_ptr + row * width + col, narrow(y, y_ptr.dtype.element_ty), mask=live)


@triton.jit
def _store_dh(dh_ptr, dx_ptr, dtotal_ptr, out, dtotal_at, live, h, gdy, rstd, along, offset):
    """dh of a piece of a row, in h's dtype, and in dx's where that is another. h: less its mean; along: mean(gain dy h) rstd^2."""
    # One rounding of xn less than by xn mean(gain dy xn): in rows of a few columns the two terms all but cancel.
    dh = (gdy - h * along - offset) * rstd
    if dtotal_ptr is not None:
        dh += tl.load(dtotal_ptr + dtotal_at, mask=live, other=0.0).to(tl.float32)
    tl.store(dh_ptr + out, narrow(dh, dh_ptr.dtype.element_ty), mask=live)
    if dx_ptr is not None:
        tl.store(dx_ptr + out, narrow(dh, dx_ptr.dtype.element_ty), mask=live)


@triton.jit
def _backward(dy_ptr, h_ptr, weight_ptr, mean_ptr, rstd_ptr, dtotal_ptr, dh_ptr, dx_ptr, dweight_ptr, dbias_ptr, dy_stride, h_stride, dtotal_stride,
              rows, width, ONE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    program = tl.program_id(0)
    col = tl.arange(0, BLOCK)[None, :]
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), tl.float32)
    gain = _gain(weight_ptr, col, col < width, ONE)
    # Stages: while these rows are worked on, the next are on their way to shared memory.
    for first in tl.range(program * ROWS, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        there = row < rows
        live = there[:, None] & (col < width)
        rstd = tl.load(rstd_ptr + row, mask=there, other=0.0)[:, None]
        h = tl.load(h_ptr + row[:, None] * h_stride + col, mask=live, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + col, mask=live, other=0.0).to(tl.float32)
        gdy = gain * dy
        offset = 0.0
        if mean_ptr is not None:
            h -= tl.load(mean_ptr + row, mask=there, other=0.0)[:, None]  # beyond the row dy is 0, and nothing is stored
            offset = (tl.sum(gdy, 1) / width)[:, None]
        along = (tl.sum(gdy * h, 1) / width)[:, None] * rstd * rstd
        _store_dh(dh_ptr, dx_ptr, dtotal_ptr, row[:, None] * width + col, row[:, None] * dtotal_stride + col, live, h, gdy, rstd, along, offset)
        dweight += dy * (h * rstd)
        if dbias_ptr is not None:
            dbias += dy
    out = program * width + col
    tl.store(dweight_ptr + out, tl.sum(dweight.to(tl.float64), 0).to(tl.float32)[None, :], mask=col < width)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + out, tl.sum(dbias.to(tl.float64), 0).to(tl.float32)[None, :], mask=col < width)


@triton.jit
def _backward_parts(dy_ptr, h_ptr, weight_ptr, mean_ptr, rstd_ptr, dtotal_ptr, dh_ptr, dx_ptr, dweight_ptr, dbias_ptr, dy_stride, h_stride,
                    dtotal_stride, rows, width, ONE: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, FIRST: tl.constexpr):
    # The row in parts: only dweight and dbias stay in registers, and the rest is read again, from L1. A branch around each part (which also
    # skips those beyond the row) keeps the compiler from working on all of them at once, which would spill.
    program = tl.program_id(0).to(tl.int64)
    dweight, dbias = (), ()
    for part in tl.static_range(PARTS):
        dweight = dweight + (tl.zeros((BLOCK,), tl.float32),)
        dbias = dbias + (tl.zeros((BLOCK,), tl.float32),)
    for row in tl.range(program, rows, tl.num_programs(0), disable_licm=True):
        rstd = tl.load(rstd_ptr + row)
        mean = 0.0
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + row)
        along, offset = tl.zeros((FIRST,), tl.float32), tl.zeros((FIRST,), tl.float32)
        for start in range(0, width, FIRST):
            col = start + tl.arange(0, FIRST)
            live = col < width
            h = tl.load(h_ptr + row * h_stride + col, mask=live, other=0.0, eviction_policy="evict_last").to(tl.float32) - mean
            gdy = tl.load(dy_ptr + row * dy_stride + col, mask=live, other=0.0, eviction_policy="evict_last").to(tl.float32)
            gdy *= _gain(weight_ptr, col, live, ONE)
            along += gdy * h
            offset += gdy
        along_mean, offset_mean = tl.sum(along, 0) / width * rstd * rstd, 0.0
        if mean_ptr is not None:
            offset_mean = tl.sum(offset, 0) / width
        dweights, dbiases = (), ()
        for part in tl.static_range(PARTS):
            dweight_part, dbias_part = dweight[part], dbias[part]
            if part * BLOCK < width:
                col = part * BLOCK + tl.arange(0, BLOCK)
                live = col < width
                h = tl.load(h_ptr + row * h_stride + col, mask=live, other=0.0, eviction_policy="evict_first").to(tl.float32) - mean
                dy = tl.load(dy_ptr + row * dy_stride + col, mask=live, other=0.0, eviction_policy="evict_first").to(tl.float32)
                _store_dh(dh_ptr, dx_ptr, dtotal_ptr, row * width + col, row * dtotal_stride + col, live, h, dy * _gain(weight_ptr, col, live, ONE),
                          rstd, along_mean, offset_mean)
                dweight_part += dy * (h * rstd)
                dbias_part += dy
            dweights = dweights + (dweight_part,)
            dbiases = dbiases + (dbias_part,)
        dweight, dbias = dweights, dbiases
    for part in tl.static_range(PARTS):
        col = part * BLOCK + tl.arange(0, BLOCK)
        tl.store(dweight_ptr + program * width + col, dweight[part], mask=col < width)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + program * width + col, dbias[part], mask=col < width)


@triton.jit
def _backward_loop(dy_ptr, h_ptr, weight_ptr, mean_ptr, rstd_ptr, dtotal_ptr, dh_ptr, dx_ptr, dweight_ptr, dbias_ptr, dy_stride, h_stride,
                   dtotal_stride, rows, width, ONE: tl.constexpr, BLOCK: tl.constexpr):
    # The program's row of dweight is too wide for registers: it lies in memory (in L2: 108 rows of 65,536 are 28 MB) and is added to.
    program = tl.program_id(0).to(tl.int64)
    for row in range(program, rows, tl.num_programs(0)):
        rstd = tl.load(rstd_ptr + row)
        mean = 0.0
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + row)
        along, offset = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
        for start in range(0, width, BLOCK):
            col = start + tl.arange(0, BLOCK)
            live = col < width
            h = tl.load(h_ptr + row * h_stride + col, mask=live, other=0.0).to(tl.float32) - mean
            gdy = _gain(weight_ptr, col, live, ONE) * tl.load(dy_ptr + row * dy_stride + col, mask=live, other=0.0).to(tl.float32)
            along += gdy * h
            offset += gdy
        along_mean, offset_mean = tl.sum(along, 0) / width * rstd * rstd, 0.0
        if mean_ptr is not None:
            offset_mean = tl.sum(offset, 0) / width
        tl.debug_barrier()  # what other threads of this program added to dweight for the row before is there
        for start in range(0, width, BLOCK):
            col = start + tl.arange(0, BLOCK)
            live = col < width
            h = tl.load(h_ptr + row * h_stride + col, mask=live, other=0.0).to(tl.float32) - mean
            dy = tl.load(dy_ptr + row * dy_stride + col, mask=live, other=0.0).to(tl.float32)
            _store_dh(dh_ptr, dx_ptr, dtotal_ptr, row * width + col, row * dtotal_stride + col, live, h, dy * _gain(weight_ptr, col, live, ONE), rstd,
                      along_mean, offset_mean)
            mine = program * width + col
            begun = live & (row != program)  # the first row finds nothing to add to
            tl.store(dweight_ptr + mine, tl.load(dweight_ptr + mine, mask=begun, other=0.0) + dy * (h * rstd), mask=live)
            if dbias_ptr is not None:
                tl.store(dbias_ptr + mine, tl.load(dbias_ptr + mine, mask=begun, other=0.0) + dy, mask=live)


@triton.jit
def _add_up(partial_ptr, out_ptr, programs, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out = sum over programs of partial [programs, width], in a fixed order; torch.sum's order depends on the GPU's size."""
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float64)
    for first in range(0, programs, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        total += tl.load(partial_ptr + row * width + col, mask=(row < programs) & (col < width), other=0.0).to(tl.float64)
    tl.store(out_ptr + col, narrow(tl.sum(total, 0).to(tl.float32), out_ptr.dtype.element_ty)[None, :], mask=col < width)


def check(op: str, x: Tensor, residual: Tensor | None, **per_column: Tensor | None) -> None:
    """Raises as the ops say. `per_column`: weight and bias, by name."""
    check_dtype(op, "x", x)
    rows_of(op, "x", x)
    for name, tensor in per_column.items():
        if tensor is not None:
            check_dtype(op, name, tensor, (x.dtype, torch.float32))
            check_shape(op, name, tensor, x.shape[-1:])
            check_device(op, name, tensor, x.device)
            check_last_dense(op, name, tensor)
    if residual is not None:
        check_dtype(op, "residual", residual, (x.dtype, torch.float32))
        check_shape(op, "residual", residual, x.shape)
        check_device(op, "residual", residual, x.device)
        rows_of(op, "residual", residual)


def rows(tensor: Tensor | None) -> Tensor | None:
    """[..., N] as [rows, N]. The inputs of an op have been checked to be views of that form; a gradient is autograd's own (an expanded scalar
    after .sum(), a transpose), and a copy of it is no caller's surprise."""
    if tensor is None:
        return None
    count = math.prod(tensor.shape[:-1])
    return tensor.reshape(count, tensor.shape[-1]) if tensor.stride(-1) == 1 else tensor.contiguous().view(count, tensor.shape[-1])


def forward(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, zero_centered: bool,
            center: bool) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """y, x + residual, mean, rstd of x [rows, width]; the mean is taken off where `center`."""
    rows, width = x.shape
    y, rstd = x.new_empty(x.shape), x.new_empty(rows, dtype=torch.float32)
    total = None if residual is None else residual.new_empty(x.shape)
    mean = torch.empty_like(rstd) if center else None
    if x.numel():
        choice = tiles.norm_forward(width)
        arguments = (x, residual, weight, bias, y, total, mean, rstd, x.stride(0), 0 if residual is None else residual.stride(0), rows, width, eps)
        with on_device_of(x):
            if "ROWS" in choice:
                _forward[(triton.cdiv(rows, choice["ROWS"]),)](*arguments, ONE=zero_centered, **choice)
            else:
                _forward_loop[(rows,)](*arguments, ONE=zero_centered, **choice)
    return y, total, mean, rstd


def backward(dy: Tensor, dtotal: Tensor | None, h: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor, bias_dtype: torch.dtype | None,
             zero_centered: bool) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """dh, the same in dy's dtype (None where that is h's), dweight, dbias (None without a dtype for it); `dtotal` is what arrives at h itself."""
    rows, width = h.shape
    dh, dx = h.new_empty(h.shape), None if dy.dtype == h.dtype else dy.new_empty(h.shape)
    dweight = torch.zeros_like(weight) if not h.numel() else torch.empty_like(weight)
    dbias = None if bias_dtype is None else dweight.to(bias_dtype, copy=True)
    if h.numel():
        choice = tiles.norm_backward(width, centered=mean is not None, itemsize=h.element_size())
        programs = min(choice.pop("programs"), triton.cdiv(rows, choice.get("ROWS", 1)))
        shares = [None if g is None else weight.new_empty(programs, width, dtype=torch.float32) for g in (dweight, dbias)]
        with on_device_of(h):
            _backward_kernel(choice)[(programs,)](dy, h, weight, mean, rstd, dtotal, dh, dx, *shares, dy.stride(0), h.stride(0),
                                                  0 if dtotal is None else dtotal.stride(0), rows, width, ONE=zero_centered, **choice)
        last = tiles.norm_add_up(width)
        for share, out in zip(shares, (dweight, dbias), strict=True):
            if out is not None:
                with on_device_of(h):
                    _add_up[(triton.cdiv(width, last["BLOCK"]),)](share, out, programs, width, **last)
    return dh, dx, dweight, dbias


def _backward_kernel(choice: dict[str, int]):
    return _backward if "ROWS" in choice else _backward_parts if "PARTS" in choice else _backward_loop


def every_launch(op: str, centered: bool) -> list[Launch]:
    """Every configuration of the tile table that `op` can ask for, with everything switched on that takes registers; for the static check."""
    found = []
    for x, h, weight in (("bf16", "bf16", "bf16"), ("bf16", "fp32", "fp32"), ("fp32", "fp32", "fp32")):
        types = {"eps": "fp32"} | {n: "i32" for n in ("x_stride", "residual_stride", "dy_stride", "h_stride", "dtotal_stride", "rows", "width")}
        types |= {f"{n}_ptr": f"*{x}" for n in ("x", "y", "dy", "dx")}
        types |= {f"{n}_ptr": f"*{h}" for n in ("residual", "total", "h", "dh", "dtotal")}
        types |= {f"{n}_ptr": f"*{weight}" for n in ("weight", "bias")}
        types |= {f"{n}_ptr": "*fp32" for n in ("mean", "rstd", "dweight", "dbias")}
        absent = (() if centered else ("mean_ptr", "bias_ptr", "dbias_ptr")) + (("dx_ptr",) if x == h else ())
        made = []
        for width in (64, 1024, 2048, 4096, 8192, 16384, 32768):
            choice = tiles.norm_forward(width)
            made.append(("forward", width, _forward if "ROWS" in choice else _forward_loop, choice))
        for width in (64, 1024, 2048, 4096, 8192, 16384, 32768, 65536):
            choice = tiles.norm_backward(width, centered=centered, itemsize=4 if h == "fp32" else 2)
            del choice["programs"]
            made.append(("backward", width, _backward_kernel(choice), choice))
        for direction, width, kernel, choice in made:
            warps, names = choice.pop("num_warps"), kernel.arg_names
            constants = {"ONE": True} | choice | {n: None for n in absent if n in names}
            found.append(Launch(op, f"{direction} N={width} {x}" + ("" if x == h else f" h {h}"), kernel,
                                {n: types[n] for n in names if n not in constants}, constants, warps,
                                multiples_of_16=("x_stride", "residual_stride", "dy_stride", "h_stride", "dtotal_stride", "width")))
    for width, dtype in ((4096, "bf16"), (4096, "fp32"), (16384, "bf16"), (16384, "fp32")):
        choice = tiles.norm_add_up(width)
        warps = choice.pop("num_warps")
        types = {"partial_ptr": "*fp32", "out_ptr": f"*{dtype}", "programs": "i32", "width": "i32"}
        found.append(Launch(op, f"add up dweight N={width} {dtype}", _add_up, types, choice, warps, multiples_of_16=("width",)))
    return found
