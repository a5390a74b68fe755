"""FP8 quantisation: q = round(x s) in e4m3fn or e5m2, and 1/s in fp32 (formats and scales: `fp8_scaling.py`).

One scale a tensor (current scaling: two passes, amax then cast; delayed scaling: one pass with a given scale, which returns the amax of
this tensor as well), or one a block: 1 x 128 (activations, gradients) or 128 x 128 (weights), in one pass. The transpose that the
backward products need (FP8 matrix products want both operands dense along the contracted dimension) is written in the same pass; with 1 x
128 it is quantised anew, along the other dimension, because the product contracts over rows then.

Rounding: to nearest, ties to even; finite values saturate. NaN *and infinity become NaN*: e4m3fn has no infinity, and saturating one
would turn an overflow into a plausible number. Such a tensor's amax is inf or NaN and its scale 1. NaN keeps no sign. (torch's own cast
saturates infinity in e4m3fn, and does not saturate at all in e5m2.)

Memory traffic for [M, N] in b bytes an element: current scaling reads 2 b M N, the others b M N; each orientation writes M N. Shapes: x
[..., N]; data like x; data_t [N, M]; scale_inverse [1], [M, ceil(N/128)] (column-major, as `torch._scaled_mm` asks), or [ceil(M/128),
ceil(N/128)].
"""
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.backend import serving
from kernels.checks import check_device, check_dtype, rows_of
from kernels.fp8_scaling import BLOCK, E4M3, LARGEST, scale_of
from kernels.fp8_triton import fp8_launches, triton_amax, triton_quantise
from kernels.jit import Launch

SCALINGS = ("tensor", "1x128", "128x128")
PIECE = 1 << 18  # elements that the torch path handles at a time: its fp32 temporary stays in the cache


class Quantised(NamedTuple):
    """Attributes: data, scale_inverse; data_t, scale_inverse_t: of the transpose (as for `data` of x.t()), or None; figures: fp32 [3]
    amax, scale, 1 / scale of the tensor, None with blocks. With `transpose="only"` data and scale_inverse are None."""

    data: Tensor | None
    scale_inverse: Tensor | None
    data_t: Tensor | None
    scale_inverse_t: Tensor | None
    figures: Tensor | None

    @property
    def amax(self) -> Tensor | None:
        """fp32 [1]; None with blocks."""
        return None if self.figures is None else self.figures[:1]


def _outputs(x: Tensor, dtype: torch.dtype, scaling: str, straight: bool, transposed: bool) -> tuple[Tensor, ...]:
    """data, scale_inverse, data_t, scale_inverse_t (of blocks), figures (of the tensor); what is not asked for is empty."""
    rows, width = x.shape
    blocks = scaling != "tensor"

    def part(wanted: bool, m: int, n: int) -> tuple[Tensor, Tensor]:
        if not wanted:
            return x.new_empty(0, dtype=dtype), x.new_empty(0, dtype=torch.float32)
        across, down = -(-n // BLOCK), -(-m // BLOCK)
        scale = x.new_empty((across, m) if scaling == "1x128" else (down, across) if blocks else 0, dtype=torch.float32)
        return x.new_empty(m, n, dtype=dtype), scale.t() if scaling == "1x128" else scale

    return *part(straight, rows, width), *part(transposed, width, rows), x.new_empty(0 if blocks else 3, dtype=torch.float32)


def _torch_amax(x: Tensor) -> Tensor:
    """max |x|, fp32 [1]; NaN and infinity come through."""
    low, high = torch.aminmax(x)
    return torch.maximum(high.float(), -low.float()).reshape(1)


@torch.library.custom_op("kernels::fp8_amax", mutates_args=())
def _amax(x: Tensor, backend: str) -> Tensor:
    if not x.numel():
        return x.new_zeros(1, dtype=torch.float32)
    if serving("fp8", backend, x.device.type) == "torch":
        return _torch_amax(x)
    return triton_amax(x)


@_amax.register_fake
def _(x, backend):
    return x.new_empty(1, dtype=torch.float32)


@torch.library.custom_op("kernels::fp8_quantise", mutates_args=())
def _quantise(x: Tensor, scale: Tensor | None, dtype: torch.dtype, scaling: str, straight: bool, transposed: bool, power_of_2: bool,
              backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    found = _, inverse, _, inverse_t, figures = _outputs(x, dtype, scaling, straight, transposed)
    if not x.numel():
        inverse.fill_(1.0), inverse_t.fill_(1.0)
        if figures.numel():
            _set_figures(figures, x.new_zeros(1, dtype=torch.float32), scale, dtype, power_of_2)
    elif serving("fp8", backend, x.device.type) == "torch":
        _torch_quantise(x, scale, dtype, scaling, power_of_2, found)
    else:
        triton_quantise(x, scale, dtype, scaling, power_of_2, found)
    return found


@_quantise.register_fake
def _(x, scale, dtype, scaling, straight, transposed, power_of_2, backend):
    return _outputs(x, dtype, scaling, straight, transposed)


def _torch_cast(x: Tensor, scale: Tensor, out: Tensor, finite: bool) -> None:
    """x [rows, ...] times its scale (broadcast) into `out`; `finite`: x is known to hold nothing else."""
    largest = LARGEST[out.dtype]
    step = x.shape[0] if x.is_cuda else max(PIECE // max(x[0].numel(), 1), 1)
    for start in range(0, x.shape[0], step):
        piece = slice(start, start + step)
        part = x[piece].float()
        scaled = torch.mul(part, scale[piece] if scale.dim() else scale).clamp_(-largest, largest)
        out[piece].copy_(scaled if finite else torch.where(torch.isfinite(part), scaled, torch.nan))


def _set_figures(figures: Tensor, amax: Tensor, scale: Tensor | None, dtype: torch.dtype, power_of_2: bool) -> None:
    scale = scale_of(amax, dtype, power_of_2=power_of_2) if scale is None else scale
    torch.cat((amax, scale, scale.reciprocal()), out=figures)


def _torch_quantise(x: Tensor, scale: Tensor | None, dtype: torch.dtype, scaling: str, power_of_2: bool, found: tuple[Tensor, ...]) -> None:
    data, inverse, data_t, inverse_t, figures = found
    if scaling == "tensor":
        _set_figures(figures, _torch_amax(x), scale, dtype, power_of_2)
        straight = data if data.numel() else x.new_empty(x.shape, dtype=dtype)
        _torch_cast(x, figures[1], straight, not x.is_cuda and bool(figures[0].isfinite()))  # asking would wait for a GPU
        if data_t.numel():
            data_t.view(torch.uint8).copy_(straight.view(torch.uint8).t())
    elif scaling == "1x128":
        if data.numel():
            _torch_blocks(x, 1, data, inverse, power_of_2)
        if data_t.numel():
            _torch_blocks(x.t().contiguous(), 1, data_t, inverse_t, power_of_2)
    else:
        straight = data if data.numel() else x.new_empty(x.shape, dtype=dtype)
        squares = inverse if data.numel() else inverse_t.new_empty(inverse_t.shape[::-1])
        _torch_blocks(x, BLOCK, straight, squares, power_of_2)
        if data_t.numel():
            data_t.view(torch.uint8).copy_(straight.view(torch.uint8).t())
            inverse_t.copy_(squares.t())


def _torch_blocks(x: Tensor, side: int, data: Tensor, inverse: Tensor, power_of_2: bool) -> None:
    rows, width = x.shape
    ragged = -rows % side, -width % BLOCK
    padded = torch.nn.functional.pad(x, (0, ragged[1], 0, ragged[0])) if any(ragged) else x
    blocks = padded.unflatten(0, (-1, side)).unflatten(2, (-1, BLOCK))  # [down, side, across, 128]
    amax = torch.maximum(blocks.amax((1, 3)).float(), -blocks.amin((1, 3)).float())
    scale = scale_of(amax, data.dtype, power_of_2=power_of_2)
    inverse.copy_(scale.reciprocal())
    out = data if not any(ragged) else data.new_empty(padded.shape)
    out_blocks = out.unflatten(0, (-1, side)).unflatten(2, (-1, BLOCK))
    _torch_cast(blocks, scale[:, None, :, None], out_blocks, not x.is_cuda and bool(amax.isfinite().all()))
    if any(ragged):
        data.view(torch.uint8).copy_(out.view(torch.uint8)[:rows, :width])


def _check(x: Tensor, dtype: torch.dtype) -> Tensor:
    check_dtype("fp8", "x", x)
    if dtype not in LARGEST:
        raise TypeError(f"fp8: dtype is {dtype}; it must be torch.float8_e4m3fn or torch.float8_e5m2")
    return rows_of("fp8", "x", x)


def amax_of(x: Tensor, *, backend: str = "auto") -> Tensor:
    """max |x| as fp32 [1]: inf or NaN where x holds one, 0 where it is empty. x as for `quantise`."""
    return torch.ops.kernels.fp8_amax(_check(x, E4M3), backend)


def quantise(x: Tensor, *, dtype: torch.dtype = E4M3, scaling: str = "tensor", scale: Tensor | None = None, transpose: bool | str = False,
             power_of_2: bool = False, backend: str = "auto") -> Quantised:
    """x in FP8, with the inverse of its scales.

    Args:
        x: [..., N], fp32, bf16 or fp16; the last dimension dense, the leading ones collapsible into rows.
        dtype: torch.float8_e4m3fn or torch.float8_e5m2.
        scaling: tensor | 1x128 | 128x128. Sizes that are not multiples of 128 have smaller blocks at their ends.
        scale: fp32 [1], of delayed scaling; None takes it from x. Only with scaling="tensor".
        transpose: True returns the transpose of the rows [M, N] as well; "only" returns nothing else.
        power_of_2: scales from x are rounded down to powers of two.
        backend: triton, torch, or auto.
    Raises:
        TypeError: another dtype. ValueError: strides that would need a copy, an unknown scaling, a scale that does not fit.
        MissingBackend: the backend asked for cannot serve here.
    """
    rows = _check(x, dtype)
    if scaling not in SCALINGS:
        raise ValueError(f"fp8: scaling is {scaling!r}; it must be one of {', '.join(SCALINGS)}")
    if transpose not in (False, True, "only"):
        raise ValueError(f"fp8: transpose is {transpose!r}; it must be False, True or 'only'")
    if scale is not None:
        if scaling != "tensor":
            raise ValueError(f"fp8: scale is given, scaling is {scaling}; blocks take their scales from x")
        check_dtype("fp8", "scale", scale, (torch.float32,))
        if scale.numel() != 1:
            raise ValueError(f"fp8: scale has shape {tuple(scale.shape)}; it must hold one number")
        check_device("fp8", "scale", scale, x.device)
    data, inverse, data_t, inverse_t, figures = torch.ops.kernels.fp8_quantise(
        rows, None if scale is None else scale.reshape(1), dtype, scaling, transpose != "only", bool(transpose), power_of_2, backend)
    if scaling == "tensor":
        inverse = inverse_t = figures[2:]
    else:
        figures = None
    if transpose == "only":
        return Quantised(None, None, data_t, inverse_t, figures)
    return Quantised(data.view(x.shape), inverse, *((data_t, inverse_t) if transpose else (None, None)), figures)


def dequantise(data: Tensor, scale_inverse: Tensor) -> Tensor:
    """fp32 [M, N] from FP8 `data` [M, N] and the scales that came with it: [1], [M, ceil(N/128)] or [ceil(M/128), ceil(N/128)]."""
    values = data.float()
    if scale_inverse.numel() == 1:
        return values.mul_(scale_inverse.reshape(()))
    if scale_inverse.shape[0] != data.shape[0]:
        scale_inverse = scale_inverse.repeat_interleave(BLOCK, 0)[: data.shape[0]]
    return values.mul_(scale_inverse.repeat_interleave(BLOCK, 1)[:, : data.shape[1]])


def launches() -> list[Launch]:
    """Every configuration of the tile table, for the static check; with the hardware's conversion where there is one."""
    return fp8_launches()
