"""FP8 as the definition has it, in fp64 on the CPU: what the kernels and torch's own conversions are compared with, bit for bit.

The 256 codes are decoded from sign, exponent and mantissa; a value is rounded to the nearest of them, ties to the even code, saturating.
Values that are not finite become NaN: e4m3fn has no infinity, and a saturated one would turn an overflow into a plausible number.
"""
import torch
from torch import Tensor

from kernels.fp8_scaling import BLOCK, E4M3, LARGEST, scale_of


def codes(dtype: torch.dtype) -> Tensor:
    """fp64 [256]: what each code means. NaN and infinities of the format are NaN here."""
    mantissa_bits, bias = (3, 7) if dtype == E4M3 else (2, 15)
    values = []
    for code in range(256):
        exponent, mantissa = (code & 0x7F) >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
        if exponent:
            magnitude = 2.0 ** (exponent - bias) * (1 + mantissa / (1 << mantissa_bits))
        else:
            magnitude = 2.0 ** (1 - bias) * mantissa / (1 << mantissa_bits)
        values.append(float("nan") if magnitude > LARGEST[dtype] else -magnitude if code & 0x80 else magnitude)
    return torch.tensor(values, dtype=torch.float64)


def round_to_codes(scaled: Tensor, finite: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 codes of fp32 `scaled`; 0x7F (NaN) where `finite` is False."""
    positive = codes(dtype)[:128]
    positive = positive[~positive.isnan()]
    magnitude = scaled.abs().double().nan_to_num(nan=0.0).clamp(max=LARGEST[dtype]).contiguous()
    above = torch.searchsorted(positive, magnitude)
    below = (above - 1).clamp(min=0)
    up, down = positive[above] - magnitude, magnitude - positive[below]
    code = torch.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    code = code | (torch.signbit(scaled).long() << 7)
    return torch.where(finite, code, 0x7F).to(torch.uint8)


def _spread(per_block: Tensor, shape: torch.Size, block: tuple[int, int]) -> Tensor:
    """Each block's number at each of its elements."""
    return per_block.repeat_interleave(block[0], 0)[: shape[0]].repeat_interleave(block[1], 1)[:, : shape[1]]


def _amax(x: Tensor, block: tuple[int, int]) -> Tensor:
    """max |x| of each block of [rows, width]."""
    rows, width = -(-x.shape[0] // block[0]), -(-x.shape[1] // block[1])
    return torch.stack([
        torch.stack([x[r * block[0]: (r + 1) * block[0], c * block[1]: (c + 1) * block[1]].float().abs().max() for c in range(width)])
        for r in range(rows)])


def quantise_reference(x: Tensor, *, dtype: torch.dtype, scaling: str = "tensor", scale: Tensor | None = None,
                       power_of_2: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """What `quantise` must return for [rows, width] that is not empty: (uint8 codes, scale_inverse, amax of each block). Slow."""
    block = {"tensor": tuple(x.shape), "1x128": (1, BLOCK), "128x128": (BLOCK, BLOCK)}[scaling]
    amax = _amax(x, block)
    scales = scale_of(amax, dtype, power_of_2=power_of_2) if scale is None else scale.reshape(1, 1)
    scaled = x.float() * _spread(scales, x.shape, block)
    inverse = scales.reciprocal()
    flat = scaling == "tensor"
    return round_to_codes(scaled, torch.isfinite(x), dtype), inverse.reshape(1) if flat else inverse, amax.reshape(1) if flat else amax


def dequantise_reference(codes_: Tensor, scale_inverse: Tensor, *, dtype: torch.dtype, scaling: str = "tensor") -> Tensor:
    """fp64 values of uint8 `codes_`."""
    block = {"tensor": tuple(codes_.shape), "1x128": (1, BLOCK), "128x128": (BLOCK, BLOCK)}[scaling]
    per_block = scale_inverse.double().reshape(1, 1) if scaling == "tensor" else scale_inverse.double()
    return codes(dtype)[codes_.long()] * _spread(per_block, codes_.shape, block)
