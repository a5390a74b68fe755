"""The elementwise half of `linear_cross_entropy` in Triton: what happens to one tile of logits between two matrix products.

The products are cuBLAS's: a tile [tokens, words] is written by one, is read here while it lies in the L2 cache, and is gone. A kernel that keeps
the tile in registers (cut-cross-entropy) saves that trip, and pays with a slower product; the tile of `tiles.head` is already under a hundredth of
the unfused path's memory.

`statistics` walks a tile with one warp a token, and folds it into the token's running state (online softmax, Milakov & Gimelshein 2018,
arXiv 1805.02867), so no program waits for another and nothing is added atomically. `gradient` is elementwise.
Memory traffic: statistics reads the tile once; gradient reads it once and writes it once, in the dtype of the products that follow.
"""
from torch import Tensor

from kernels import tiles
from kernels.jit import Launch, narrow, on_device_of, tl, triton


@triton.jit
def _statistics(x_ptr, target_ptr, state_ptr, x_stride, state_stride, tokens, width, first, inverse_temperature, ROWS: tl.constexpr,
                BLOCK: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < tokens
    target = (tl.load(target_ptr + row, mask=there, other=0) - first).to(tl.int32)
    state = state_ptr + row
    top = tl.load(state, mask=there, other=0.0)
    total = tl.load(state + state_stride, mask=there, other=0.0)
    moment = tl.load(state + 2 * state_stride, mask=there, other=0.0)
    plain = tl.load(state + 3 * state_stride, mask=there, other=0.0)
    picked = tl.load(state + 4 * state_stride, mask=there, other=0.0)
    start_of_row = x_ptr + row.to(tl.int64)[:, None] * x_stride
    for start in range(0, width, BLOCK):
        col = start + tl.arange(0, BLOCK)
        live = there[:, None] & (col < width)[None, :]
        x = tl.load(start_of_row + col[None, :], mask=live, other=0.0) * inverse_temperature
        higher = tl.maximum(top, tl.max(tl.where(live, x, -3.0e38), 1))
        drop = top - higher
        shifted = tl.where(live, x - higher[:, None], -1000.0)
        e = tl.exp(shifted)
        moment = tl.exp(drop) * (moment + total * drop) + tl.sum(e * shifted, 1)
        total = tl.exp(drop) * total + tl.sum(e, 1)
        plain += tl.sum(tl.where(live, x, 0.0), 1)
        picked += tl.sum(tl.where(live & (col[None, :] == target[:, None]), x, 0.0), 1)
        top = higher
    tl.store(state, top, mask=there)
    tl.store(state + state_stride, total, mask=there)
    tl.store(state + 2 * state_stride, moment, mask=there)
    tl.store(state + 3 * state_stride, plain, mask=there)
    tl.store(state + 4 * state_stride, picked, mask=there)


@triton.jit
def _gradient(x_ptr, target_ptr, plan_ptr, out_ptr, x_stride, out_stride, plan_stride, tokens, width, first, inverse_temperature,
              HAS_ENTROPY: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    there = row < tokens
    live = there[:, None] & (col < width)
    far = row.to(tl.int64)[:, None]
    x = tl.load(x_ptr + far * x_stride + col, mask=live, other=0.0) * inverse_temperature
    target = (tl.load(target_ptr + row, mask=there, other=0) - first).to(tl.int32)
    plan = plan_ptr + row
    logp = (x - tl.load(plan, mask=there, other=0.0)[:, None]) - tl.load(plan + plan_stride, mask=there, other=0.0)[:, None]
    factor = tl.load(plan + 2 * plan_stride, mask=there, other=0.0)[:, None]
    if HAS_ENTROPY:
        factor = factor + tl.load(plan + 3 * plan_stride, mask=there, other=0.0)[:, None] * logp
    grad = tl.exp(logp) * factor + tl.load(plan + 5 * plan_stride, mask=there, other=0.0)[:, None]
    grad += tl.where(col == target[:, None], tl.load(plan + 4 * plan_stride, mask=there, other=0.0)[:, None], 0.0)
    tl.store(out_ptr + far * out_stride + col, narrow(grad, out_ptr.dtype.element_ty), mask=live)


def statistics(x: Tensor, target: Tensor, state: Tensor, first: int, temperature: float) -> None:
    """Folds a tile into the state.

    Args:
        x: [n, w] fp32, raw logits. target: [n] int64, global ids. first: global id of the tile's first word.
        state: [5, n] fp32: the maximum m, sum e^(l - m), sum e^(l - m) (l - m), sum l, l_target.
    """
    rows, width = x.shape
    if rows and width:
        choice = tiles.head_rows(width)
        with on_device_of(x):
            _statistics[(triton.cdiv(rows, choice["ROWS"]),)](
                x, target, state, x.stride(0), state.stride(0), rows, width, first, 1 / temperature, **choice)


def gradient(x: Tensor, target: Tensor, plan: Tensor, out: Tensor, first: int, temperature: float, entropy: bool) -> None:
    """out [n, w] = the gradient of the raw logits x; `out` may be x. plan [6, n]: m, log sum, the factors of p, p log p, [v = target] and 1."""
    rows, width = x.shape
    if rows and width:
        choice = tiles.head_rows(width)
        with on_device_of(x):
            _gradient[(triton.cdiv(rows, choice["ROWS"]), triton.cdiv(width, choice["BLOCK"]))](
                x, target, plan, out, x.stride(0), out.stride(0), plan.stride(0), rows, width, first, 1 / temperature, entropy, **choice)


def launches() -> list[Launch]:
    """Every configuration of the tile table, for the static check."""
    found = []
    integers = {"tokens": "i32", "width": "i32", "first": "i32", "inverse_temperature": "fp32"}
    for width in (128, 1024):
        choice = tiles.head_rows(width)
        warps = choice.pop("num_warps")
        found.append(Launch(
            "linear_cross_entropy", f"statistics W={width}", _statistics,
            {"x_ptr": "*fp32", "target_ptr": "*i64", "state_ptr": "*fp32", "x_stride": "i32", "state_stride": "i32", **integers}, choice, warps,
            multiples_of_16=("x_stride", "width", "first")))
    for width in (128, 1024):
        choice = tiles.head_rows(width)
        warps = choice.pop("num_warps")
        for dtype in ("fp32", "bf16", "fp16"):
            for entropy in (False, True):
                found.append(Launch(
                    "linear_cross_entropy", f"gradient W={width} {dtype}" + " entropy" * entropy, _gradient,
                    {"x_ptr": "*fp32", "target_ptr": "*i64", "plan_ptr": "*fp32", "out_ptr": f"*{dtype}", "x_stride": "i32", "out_stride": "i32",
                     "plan_stride": "i32", **integers}, {"HAS_ENTROPY": entropy, **choice}, warps,
                    multiples_of_16=("x_stride", "out_stride", "width", "first")))
    return found
