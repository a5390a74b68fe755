"""Rotary position embedding of queries and keys in one launch (Su et al. 2021, arXiv 2104.09864).

Each pair of a head's first r channels is turned by the angle position x frequency: with c = cos, s = sin,
    y1 = x1 c - x2 s,      y2 = x2 c + x1 s.
Channels r .. d pass through (partial rotary). A pair is (i, i + r/2) in half-rotation (GPT-NeoX, Llama), (2i, 2i + 1) interleaved (the paper,
GPT-J). The gradient is the rotation by the negative angle: the same kernel with -s. Nothing is kept for it but the tables.

Angles come from `rope_tables`, per token: packed documents, an offset while decoding and rows of unequal length are its positions.
Memory traffic for [tokens, heads, d]: reads and writes q and k once each way; the tables (4 r bytes a token) are read once from memory and then
lie in cache for all heads. Arithmetic is fp32 whatever the dtype.
Shapes: q [seq, batch, heads, d], k [seq, batch, groups, d] (megatron-core's) or packed [tokens, heads, d], [tokens, groups, d].
"""
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import tiles
from kernels.backend import serving
from kernels.checks import check_device, check_dtype, check_last_dense, check_shape
from kernels.jit import Launch, narrow, on_device_of, tl, triton


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's: wavelengths over original_max_position / low_freq_factor are stretched by `factor`, those under
    original_max_position / high_freq_factor stay, those between are interpolated (section 3.2 of arXiv 2407.21783 and its released code)."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (Chen et al. 2023, arXiv 2306.15595): every wavelength is stretched by `factor`."""

    factor: float


def inverse_frequencies(rotary_dim: int, base: float = 10000.0, *, scaling: Llama3Scaling | LinearScaling | None = None,
                        device: torch.device | str | None = None) -> Tensor:
    """The angle a position adds to each pair: base^(-2i/r), scaled.

    fp64: an fp32 frequency is off by 2^-24 of itself, which at position 1,000,000 is up to 0.06 of a radian. `.float()` gives what transformers and
    megatron-core hold, for checkpoints that were trained so.

    Args:
        rotary_dim: r, the even number of rotated channels.
    Returns:
        [r/2], fp64, radians a position.
    Raises:
        ValueError: an odd or negative rotary_dim, a base or factor that is not positive, factors of Llama 3.1 out of order.
    """
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"inverse_frequencies: rotary_dim is {rotary_dim}; channels turn in pairs, so it must be even and positive")
    if not base > 0:
        raise ValueError(f"inverse_frequencies: base is {base}; it must be positive")
    if scaling is not None and not scaling.factor > 0:
        raise ValueError(f"inverse_frequencies: scaling.factor is {scaling.factor}; it must be positive")
    inverse = 1.0 / base ** (torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=device) / rotary_dim)
    if isinstance(scaling, LinearScaling):
        return inverse / scaling.factor
    if scaling is None:
        return inverse
    if not 0 < scaling.low_freq_factor < scaling.high_freq_factor:
        raise ValueError(f"inverse_frequencies: scaling.low_freq_factor is {scaling.low_freq_factor} and scaling.high_freq_factor "
                         f"{scaling.high_freq_factor}; they must be positive and rise")
    turns = scaling.original_max_position * inverse / (2 * math.pi)  # full turns within the context of the pretraining
    kept = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return inverse * (kept + (1 - kept) / scaling.factor)


def rope_tables(positions: Tensor, inverse_frequencies: Tensor, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin of position x frequency, for `rope`.

    The angle is multiplied, and its cosine taken, in fp64: in fp32 the angle of position 1,000,000 would be off by 0.03. It is [seq, r/2] numbers a
    step, once for all layers.

    Args:
        positions: integers of any shape, [seq, batch or 1] or [tokens] for `rope`; every token its own.
        inverse_frequencies: [r/2], fp64 or fp32.
        scale: multiplies both tables (the attention factor of YaRN and LongRoPE).
    Returns:
        (cos, sin), fp32, [*positions.shape, r/2].
    """
    if positions.dtype.is_floating_point or positions.dtype.is_complex or positions.dtype == torch.bool:
        raise TypeError(f"rope_tables: positions is {str(positions.dtype).removeprefix('torch.')}; it must be an integer type")
    check_dtype("rope_tables", "inverse_frequencies", inverse_frequencies, (torch.float64, torch.float32))
    if inverse_frequencies.dim() != 1:
        raise ValueError(f"rope_tables: inverse_frequencies has shape {tuple(inverse_frequencies.shape)}, expected [r/2]")
    check_device("rope_tables", "inverse_frequencies", inverse_frequencies, positions.device)
    angle = positions.to(torch.float64).unsqueeze(-1) * inverse_frequencies.to(torch.float64)
    return (angle.cos() * scale).float(), (angle.sin() * scale).float()


def rope_reference(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor | None]:
    """The definition in plain PyTorch, differentiable, in q's own dtype, as megatron-core and transformers write it down."""
    def rotate(x: Tensor) -> Tensor:
        c, s = cos.to(x.dtype).unsqueeze(-2), sin.to(x.dtype).unsqueeze(-2)
        turned, rest = x[..., :2 * cos.shape[-1]], x[..., 2 * cos.shape[-1]:]
        if interleaved:
            c, s = c.repeat_interleave(2, -1), s.repeat_interleave(2, -1)
            swapped = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
        else:
            c, s = torch.cat((c, c), -1), torch.cat((s, s), -1)
            first, second = turned.chunk(2, dim=-1)
            swapped = torch.cat((-second, first), dim=-1)
        return torch.cat((turned * c + swapped * s, rest), dim=-1)

    return rotate(q), None if k is None else rotate(k)


@triton.jit
def _rotate(x_ptr, y_ptr, cos_ptr, sin_ptr, program, tokens, batch, heads, x_seq, x_batch, x_head, cos_seq, cos_batch, sin_seq, sin_batch,
            INVERSE: tl.constexpr, INTERLEAVED: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
            HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr):
    """ROWS heads, of one token or of neighbours."""
    row = program * ROWS + tl.arange(0, ROWS)
    live = (row < tokens * heads)[:, None]
    token, head = row // heads, (row % heads).to(tl.int64)
    seq, of_batch = (token // batch).to(tl.int64), (token % batch).to(tl.int64)
    x_row = x_ptr + (seq * x_seq + of_batch * x_batch + head * x_head)[:, None]
    y_row = y_ptr + row.to(tl.int64)[:, None] * DIM
    pair = tl.arange(0, HALF_BLOCK)[None, :]
    live_pair = live & (pair < HALF)
    cos = tl.load(cos_ptr + (seq * cos_seq + of_batch * cos_batch)[:, None] + pair, mask=live_pair, other=0.0)
    sin = tl.load(sin_ptr + (seq * sin_seq + of_batch * sin_batch)[:, None] + pair, mask=live_pair, other=0.0)
    if INVERSE:
        sin = -sin
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    if INTERLEAVED:
        # Loaded whole and split in registers: loads of every second channel would not be 16 bytes wide.
        col = tl.arange(0, 2 * HALF_BLOCK)[None, :]
        live_col = live & (col < 2 * HALF)
        x = tl.load(x_row + col, mask=live_col, other=0.0).to(tl.float32)
        x1, x2 = tl.split(tl.reshape(x, [ROWS, HALF_BLOCK, 2]))
        y = tl.reshape(tl.join(x1 * cos - x2 * sin, x2 * cos + x1 * sin), [ROWS, 2 * HALF_BLOCK])
        tl.store(y_row + col, narrow(y, dtype), mask=live_col)
    else:
        x1 = tl.load(x_row + pair, mask=live_pair, other=0.0).to(tl.float32)
        x2 = tl.load(x_row + HALF + pair, mask=live_pair, other=0.0).to(tl.float32)
        tl.store(y_row + pair, narrow(x1 * cos - x2 * sin, dtype), mask=live_pair)
        tl.store(y_row + HALF + pair, narrow(x2 * cos + x1 * sin, dtype), mask=live_pair)
    if REST_BLOCK > 0:
        col = 2 * HALF + tl.arange(0, REST_BLOCK)[None, :]
        tl.store(y_row + col, tl.load(x_row + col, mask=live & (col < DIM)), mask=live & (col < DIM))


@triton.jit
def _rope_kernel(q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, tokens, batch, heads, groups, q_seq, q_batch, q_head, k_seq, k_batch, k_head,
                 cos_seq, cos_batch, sin_seq, sin_batch, INVERSE: tl.constexpr, INTERLEAVED: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
                 ROWS: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr):
    program = tl.program_id(0)
    q_programs = tl.cdiv(tokens * heads, ROWS)
    if program < q_programs:
        _rotate(q_ptr, q_out_ptr, cos_ptr, sin_ptr, program, tokens, batch, heads, q_seq, q_batch, q_head, cos_seq, cos_batch, sin_seq, sin_batch,
                INVERSE, INTERLEAVED, DIM, HALF, ROWS, HALF_BLOCK, REST_BLOCK)
    else:
        _rotate(k_ptr, k_out_ptr, cos_ptr, sin_ptr, program - q_programs, tokens, batch, groups, k_seq, k_batch, k_head, cos_seq, cos_batch, sin_seq,
                sin_batch, INVERSE, INTERLEAVED, DIM, HALF, ROWS, HALF_BLOCK, REST_BLOCK)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [..., r] fp32 turned."""
    if interleaved:
        pairs = torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)
    y = x * torch.cat((cos, cos), dim=-1)
    (x1, x2), (y1, y2) = x.chunk(2, dim=-1), y.chunk(2, dim=-1)
    y1.addcmul_(x2, sin, value=-1)
    y2.addcmul_(x1, sin)
    return y


def _rotate_in_torch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    y, rotated = x.new_empty(x.shape), 2 * cos.shape[-1]
    cos, sin = cos.unsqueeze(-2), (-sin if inverse else sin).unsqueeze(-2)
    for piece in tiles.pieces_in_cache(x):
        y[piece, ..., :rotated] = _turn(x[piece, ..., :rotated].float(), cos[piece], sin[piece], interleaved)
    y[..., rotated:] = x[..., rotated:]
    return y


@torch.library.custom_op("kernels::rope", mutates_args=())
def _rope(xs: list[Tensor], cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool, backend: str) -> list[Tensor]:
    """xs: [q] or [q, k], 4-dimensional; cos, sin [seq, batch or 1, r/2]."""
    if serving("rope", backend, xs[0].device.type) == "torch":
        return [_rotate_in_torch(x, cos, sin, interleaved, inverse) for x in xs]
    ys = [x.new_empty(x.shape) for x in xs]
    if any(y.numel() for y in ys):
        q, k = xs[0], xs[-1]
        seq, batch, heads, dim = q.shape
        groups, half = k.shape[2] if len(xs) > 1 else 0, cos.shape[-1]
        choice = tiles.rope(dim, half)
        programs = triton.cdiv(seq * batch * heads, choice["ROWS"]) + triton.cdiv(seq * batch * groups, choice["ROWS"])
        strides = [t.stride(i) if t.shape[i] > 1 else 0 for t in (cos, sin) for i in (0, 1)]
        with on_device_of(q):
            _rope_kernel[(programs,)](q, k, ys[0], ys[-1], cos, sin, seq * batch, batch, heads, groups, *q.stride()[:3], *k.stride()[:3], *strides,
                                      INVERSE=inverse, INTERLEAVED=interleaved, DIM=dim, HALF=half, **choice)
    return ys


@_rope.register_fake
def _(xs, cos, sin, interleaved, inverse, backend):
    return [x.new_empty(x.shape) for x in xs]


def _setup(ctx, inputs, output):
    _, cos, sin, ctx.interleaved, ctx.inverse, ctx.backend = inputs
    ctx.save_for_backward(cos, sin)


def _grad(ctx, grads):
    grads = [g if g.stride(-1) == 1 else g.contiguous() for g in grads]  # autograd's own, as after .sum()
    return torch.ops.kernels.rope(grads, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse, ctx.backend), None, None, None, None, None


_rope.register_autograd(_grad, setup_context=_setup)


def rope(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, *, interleaved: bool = False, backend: str = "auto") -> tuple[Tensor, Tensor | None]:
    """Queries and keys turned by their tokens' angles.

    Args:
        q: [seq, batch, heads, d] or packed [tokens, heads, d]; fp32, bf16 or fp16; any strides but a dense last dimension (views of a fused QKV
            projection are taken as they are).
        k: [seq, batch, groups, d] or [tokens, groups, d], of q's dtype; None rotates q alone.
        cos, sin: fp32 [seq, batch or 1, r/2] ([tokens, r/2] where packed), r <= d: see `rope_tables`. Constants: they get no gradient.
        interleaved: pairs are (2i, 2i + 1) instead of (i, i + r/2).
        backend: triton, torch, or auto.
    Returns:
        (q', k'), new dense tensors of the same shapes and dtype; k' is None where k is.
    Raises:
        TypeError: a wrong dtype. ValueError: a shape, stride or device that does not fit, or tables that want a gradient.
        MissingBackend: the backend asked for cannot serve here.
    """
    check_dtype("rope", "q", q)
    if q.dim() not in (3, 4):
        raise ValueError(f"rope: q has shape {tuple(q.shape)}, expected [seq, batch, heads, d] or [tokens, heads, d]")
    check_last_dense("rope", "q", q)
    if k is not None:
        check_dtype("rope", "k", k, (q.dtype,))
        check_device("rope", "k", k, q.device)
        check_shape("rope", "k", k, (*q.shape[:-2], k.shape[-2] if k.dim() == q.dim() else "groups", q.shape[-1]))
        check_last_dense("rope", "k", k)
    for name, table in (("cos", cos), ("sin", sin)):
        check_dtype("rope", name, table, (torch.float32,))
        check_device("rope", name, table, q.device)
        if table.requires_grad:
            raise ValueError(f"rope: {name} requires a gradient, and the op gives none to its tables; detach it")
        _check_table(name, table, q)
        check_last_dense("rope", name, table)
    check_shape("rope", "sin", sin, cos.shape)
    packed = q.dim() == 3
    xs = [x.unsqueeze(1) if packed else x for x in (q, k) if x is not None]
    tables = [t.unsqueeze(1) if packed else t for t in (cos, sin)]
    ys = _rope(xs, *tables, interleaved, False, backend)
    ys = [y.squeeze(1) for y in ys] if packed else ys
    return ys[0], ys[1] if k is not None else None


def _check_table(name: str, table: Tensor, q: Tensor) -> None:
    shape, leading = tuple(table.shape), tuple(q.shape[:-2])
    fits = len(shape) == q.dim() - 1 and shape[0] == leading[0] and all(n in (1, b) for n, b in zip(shape[1:-1], leading[1:], strict=True))
    if not fits or not 2 <= 2 * shape[-1] <= q.shape[-1]:
        wanted = "[tokens, r/2]" if q.dim() == 3 else "[seq, batch or 1, r/2]"
        raise ValueError(f"rope: {name} has shape {shape}, expected {wanted} with r at most d, for q {tuple(q.shape)}")


def launches() -> list[Launch]:
    """Every configuration of the tile table, for the static check."""
    found = []
    strides = ("q_seq", "q_batch", "q_head", "k_seq", "k_batch", "k_head", "cos_seq", "cos_batch", "sin_seq", "sin_batch")
    counts = ("tokens", "batch", "heads", "groups")
    for dim, half in ((64, 32), (96, 48), (128, 64), (128, 32), (256, 128)):
        choice = tiles.rope(dim, half)
        warps = choice.pop("num_warps")
        for dtype in ("bf16", "fp32"):
            for interleaved in (False, True):
                pointers = dict.fromkeys(("q_ptr", "k_ptr", "q_out_ptr", "k_out_ptr"), f"*{dtype}") | {"cos_ptr": "*fp32", "sin_ptr": "*fp32"}
                found.append(Launch("rope", f"d={dim} r={2 * half} {'interleaved' if interleaved else 'halves'} {dtype}", _rope_kernel,
                                    pointers | dict.fromkeys((*counts, *strides), "i32"),
                                    {"INVERSE": False, "INTERLEAVED": interleaved, "DIM": dim, "HALF": half, **choice}, warps,
                                    multiples_of_16=strides))
    return found
