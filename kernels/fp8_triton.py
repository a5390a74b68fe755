"""The Triton kernels of FP8 quantisation, and how they are launched. What they compute: `fp8.py`.

The bits are made by integer arithmetic, the same in compiled code and in Triton's interpreter, whose own casts are wrong (`jit.py`); from
sm_90 on the hardware's conversion does it in one instruction for two values (on sm_89 Triton goes through fp16, which rounds twice).
Triton's maxima drop NaN, so amax is a maximum over the bits of |x|.
"""
import functools

import torch
from torch import Tensor

from kernels import jit, tiles
from kernels.fp8_scaling import E4M3, E5M2, LARGEST, LARGEST_SCALE
from kernels.jit import Launch, on_device_of, tl, triton


@triton.jit
def _magnitude(x):
    """The bits of |x|, which order like the numbers, NaN above infinity."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale(amax_bits, largest, largest_scale, POWER_OF_2: tl.constexpr):
    """`fp8_scaling.scale_of`; the division rounds correctly, so that every path has the same scale."""
    amax = amax_bits.to(tl.float32, bitcast=True)
    scale = tl.minimum(tl.div_rn(tl.zeros_like(amax) + largest, amax), largest_scale)
    if POWER_OF_2:
        scale = (scale.to(tl.int32, bitcast=True) & -0x800000).to(tl.float32, bitcast=True)
    return tl.where((amax_bits > 0) & (amax_bits < 0x7F800000), scale, 1.0)


@triton.jit
def _round(x, scaled, largest, E5M2_: tl.constexpr, HARDWARE: tl.constexpr):
    """uint8 codes of `scaled`, NaN where x is not finite."""
    broken = _magnitude(x) >= 0x7F800000
    if HARDWARE:
        safe = tl.where(broken, float("nan"), scaled)
        return (safe.to(tl.float8e5) if E5M2_ else safe.to(tl.float8e4nv)).to(tl.uint8, bitcast=True)
    SHIFT: tl.constexpr = 21 if E5M2_ else 20  # mantissa bits that go
    SMALLEST: tl.constexpr = 0x38800000 if E5M2_ else 0x3C800000  # the smallest normal number, 2^-14 or 2^-6
    MAGIC: tl.constexpr = 128.0 if E5M2_ else 16384.0  # its last place is the smallest step: adding it rounds there
    MAGIC_BITS: tl.constexpr = 0x43000000 if E5M2_ else 0x46800000
    BIAS: tl.constexpr = (127 - 15) << 2 if E5M2_ else (127 - 7) << 3
    sign = (scaled.to(tl.int32, bitcast=True) >> 24) & 0x80
    magnitude = tl.minimum(tl.abs(scaled), largest)
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = ((bits + ((1 << (SHIFT - 1)) - 1) + ((bits >> SHIFT) & 1)) >> SHIFT) - BIAS
    small = (magnitude + MAGIC).to(tl.int32, bitcast=True) - MAGIC_BITS
    code = tl.where(bits >= SMALLEST, normal, small) | sign
    return tl.where(broken, 0x7F, code).to(tl.uint8)


@triton.jit
def _amax_tiles(x_ptr, partial_ptr, x_stride, rows, width, ROWS: tl.constexpr, COLS: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)  # rows x stride passes 2^31 at long sequences
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    live = (row < rows)[:, None] & (col < width)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=live, other=0.0).to(tl.float32)
    tl.store(partial_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.max(tl.max(_magnitude(x), 1), 0))


@triton.jit
def _finish(partial_ptr, scale_ptr, out_ptr, count, largest, largest_scale, GIVEN: tl.constexpr, POWER_OF_2: tl.constexpr,
            SIZE: tl.constexpr):
    """out = amax, scale, 1 / scale from the maxima of the tiles, or with the scale that is given: one program, and no atomics."""
    best = tl.zeros([SIZE], tl.int32)
    for start in range(0, count, SIZE):
        at = start + tl.arange(0, SIZE)
        best = tl.maximum(best, tl.load(partial_ptr + at, mask=at < count, other=0))
    bits = tl.max(best, 0)
    scale = tl.load(scale_ptr) if GIVEN else _scale(bits, largest, largest_scale, POWER_OF_2)
    tl.store(out_ptr, bits.to(tl.float32, bitcast=True))
    tl.store(out_ptr + 1, scale)
    tl.store(out_ptr + 2, tl.div_rn(scale * 0 + 1.0, scale))


@triton.jit
def _cast(x_ptr, scale_ptr, data_ptr, data_t_ptr, partial_ptr, x_stride, rows, width, largest, E5M2_: tl.constexpr, STRAIGHT: tl.constexpr,
          TRANSPOSED: tl.constexpr, AMAX: tl.constexpr, HARDWARE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """One scale for the tensor; with AMAX the maximum of each tile is left for `_finish`."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    live = (row < rows)[:, None] & (col < width)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=live, other=0.0).to(tl.float32)
    code = _round(x, x * tl.load(scale_ptr), largest, E5M2_, HARDWARE)
    if STRAIGHT:
        tl.store(data_ptr + row[:, None] * width + col[None, :], code, mask=live)
    if TRANSPOSED:
        live_t = (col < width)[:, None] & (row < rows)[None, :]
        tl.store(data_t_ptr + col.to(tl.int64)[:, None] * rows + row[None, :], tl.trans(code), mask=live_t)
    if AMAX:
        tl.store(partial_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.max(tl.max(_magnitude(x), 1), 0))


@triton.jit
def _cast_blocks(x_ptr, data_ptr, scale_ptr, data_t_ptr, scale_t_ptr, x_stride, rows, width, largest, largest_scale, E5M2_: tl.constexpr,
                 SQUARE: tl.constexpr, STRAIGHT: tl.constexpr, TRANSPOSED: tl.constexpr, POWER_OF_2: tl.constexpr, HARDWARE: tl.constexpr,
                 SIDE: tl.constexpr):
    """A 128 x 128 tile: one scale (SQUARE), or one for each of its rows, and for the transpose one for each of its columns."""
    row = (tl.program_id(0) * SIDE + tl.arange(0, SIDE)).to(tl.int64)
    col = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    live = (row < rows)[:, None] & (col < width)[None, :]
    live_t = (col < width)[:, None] & (row < rows)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=live, other=0.0).to(tl.float32)
    if SQUARE:
        scale = _scale(tl.max(tl.max(_magnitude(x), 1), 0), largest, largest_scale, POWER_OF_2)
        code = _round(x, x * scale, largest, E5M2_, HARDWARE)
        inverse = tl.div_rn(scale * 0 + 1.0, scale)
        if STRAIGHT:
            tl.store(data_ptr + row[:, None] * width + col[None, :], code, mask=live)
            tl.store(scale_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), inverse)
        if TRANSPOSED:
            tl.store(data_t_ptr + col.to(tl.int64)[:, None] * rows + row[None, :], tl.trans(code), mask=live_t)
            tl.store(scale_t_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), inverse)
    else:
        if STRAIGHT:
            scale = _scale(tl.max(_magnitude(x), 1), largest, largest_scale, POWER_OF_2)
            code = _round(x, x * scale[:, None], largest, E5M2_, HARDWARE)
            tl.store(data_ptr + row[:, None] * width + col[None, :], code, mask=live)
            tl.store(scale_ptr + tl.program_id(1) * rows + row, tl.div_rn(scale * 0 + 1.0, scale), mask=row < rows)
        if TRANSPOSED:
            scale = _scale(tl.max(_magnitude(x), 0), largest, largest_scale, POWER_OF_2)
            code = _round(x, x * scale[None, :], largest, E5M2_, HARDWARE)
            tl.store(data_t_ptr + col.to(tl.int64)[:, None] * rows + row[None, :], tl.trans(code), mask=live_t)
            tl.store(scale_t_ptr + tl.program_id(0) * width + col, tl.div_rn(scale * 0 + 1.0, scale), mask=col < width)


@functools.cache
def _hardware(index: int | None) -> bool:
    return not jit.interpreted() and torch.cuda.get_device_capability(index) >= (9, 0)


def _grid(rows: int, width: int, rows_a_tile: int, cols_a_tile: int) -> tuple[int, int]:
    return triton.cdiv(rows, rows_a_tile), triton.cdiv(width, cols_a_tile)


def triton_quantise(x: Tensor, scale: Tensor | None, dtype: torch.dtype, scaling: str, power_of_2: bool, found: tuple[Tensor, ...]) -> None:
    """x [rows, width], not empty, into `found` (data, scale_inverse, data_t, scale_inverse_t, figures); what is empty is not wanted."""
    data, inverse, data_t, inverse_t, figures = found
    flags = {"E5M2_": dtype == E5M2, "STRAIGHT": data.numel() > 0, "TRANSPOSED": data_t.numel() > 0,
             "HARDWARE": x.is_cuda and _hardware(x.device.index)}
    if scaling != "tensor":
        choice = tiles.fp8_block()
        with on_device_of(x):
            _cast_blocks[_grid(*x.shape, choice["SIDE"], choice["SIDE"])](
                x, data.view(torch.uint8), inverse, data_t.view(torch.uint8), inverse_t, x.stride(0), *x.shape, LARGEST[dtype], LARGEST_SCALE,
                SQUARE=scaling == "128x128", POWER_OF_2=power_of_2, **flags, **choice)
        return
    given = scale is not None
    choice = tiles.fp8_tile()
    grid = _grid(*x.shape, choice["ROWS"], choice["COLS"])
    partial = x.new_empty(grid, dtype=torch.int32)
    with on_device_of(x):
        finish = functools.partial(_finish[(1,)], partial, scale if given else figures, figures, partial.numel(), LARGEST[dtype], LARGEST_SCALE,
                                   GIVEN=given, POWER_OF_2=power_of_2, **tiles.fp8_finish())
        if not given:
            _amax_tiles[grid](x, partial, x.stride(0), *x.shape, **choice)
            finish()
        _cast[grid](x, scale if given else figures[1:], data.view(torch.uint8), data_t.view(torch.uint8), partial, x.stride(0), *x.shape,
                    LARGEST[dtype], AMAX=given, **flags, **choice)
        if given:
            finish()


def triton_amax(x: Tensor) -> Tensor:
    """max |x| of [rows, width] that is not empty, fp32 [1]."""
    choice = tiles.fp8_tile()
    grid = _grid(*x.shape, choice["ROWS"], choice["COLS"])
    partial, figures = x.new_empty(grid, dtype=torch.int32), x.new_empty(3, dtype=torch.float32)
    with on_device_of(x):
        _amax_tiles[grid](x, partial, x.stride(0), *x.shape, **choice)
        _finish[(1,)](partial, figures, figures, partial.numel(), LARGEST[E4M3], LARGEST_SCALE, GIVEN=False, POWER_OF_2=False,
                      **tiles.fp8_finish())
    return figures[:1].clone()


def fp8_launches() -> list[Launch]:
    """Every configuration of the tile table, for the static check; from sm_89 on with the hardware's conversion as well."""
    found = []
    tile, block, finish = tiles.fp8_tile(), tiles.fp8_block(), tiles.fp8_finish()
    warps, block_warps, finish_warps = (c.pop("num_warps") for c in (tile, block, finish))
    size = {"x_stride": "i32", "rows": "i32", "width": "i32"}
    even = ("x_stride", "rows", "width")
    for dtype in ("bf16", "fp32", "fp16"):
        x = {"x_ptr": f"*{dtype}"}
        found.append(Launch("fp8", f"amax {dtype}", _amax_tiles, x | {"partial_ptr": "*i32"} | size, tile, warps, multiples_of_16=even))
        for e5m2 in (False, True):
            for hardware in (False, True):
                name = f"{dtype} {'e5m2' if e5m2 else 'e4m3'}{' hardware' if hardware else ''}"
                options = {"E5M2_": e5m2, "HARDWARE": hardware, "STRAIGHT": True, "TRANSPOSED": True}
                since = 90 if hardware else 80
                found.append(Launch(
                    "fp8", f"cast {name}", _cast,
                    x | {"scale_ptr": "*fp32", "data_ptr": "*u8", "data_t_ptr": "*u8", "partial_ptr": "*i32"} | size | {"largest": "fp32"}, options | {"AMAX": True} | tile, warps, multiples_of_16=even, since=since))
                for square in (False, True):
                    found.append(Launch(
                        "fp8", f"{'128x128' if square else '1x128'} {name}", _cast_blocks,
                        x | {"data_ptr": "*u8", "scale_ptr": "*fp32", "data_t_ptr": "*u8", "scale_t_ptr": "*fp32"} | size
                        | {"largest": "fp32", "largest_scale": "fp32"}, options | {"SQUARE": square, "POWER_OF_2": False} | block,
                        block_warps, multiples_of_16=even, since=since))
    figures = {"partial_ptr": "*i32", "scale_ptr": "*fp32", "out_ptr": "*fp32", "count": "i32", "largest": "fp32", "largest_scale": "fp32"}
    found.append(Launch("fp8", "finish", _finish, figures,
                        {"GIVEN": False, "POWER_OF_2": False} | finish, finish_warps, multiples_of_16=("count",), memory_bound=False))
    return found
