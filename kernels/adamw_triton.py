"""AdamW's update in Triton: one launch for all tensors of a kind (`kernels/adamw.py` has the maths and the interface).

Memory traffic a parameter: weights, both moments read and written, the gradient read: 28 bytes in fp32; beside bf16 weights with fp32 main weights
and bf16 gradients 28 bytes too (12 + 2 read, 12 + 2 written). What the step decides (decay, step size, bias corrections) comes as numbers, or from
the device where a CUDA graph replays the launch (`capturable`).
"""
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import multi_tensor
from kernels.jit import Launch, narrow, on_device_of, tl, triton
from kernels.multi_tensor import address, tables, torch_type


@triton.jit
def _piece(p_ptr, g_ptr, m_ptr, v_ptr, low_ptr, at, left, keep, size, root2, beta1, rest1, beta2, rest2, eps, decay, unscale,
           LOW: tl.constexpr, MASTER: tl.constexpr, DECOUPLED: tl.constexpr, FULL: tl.constexpr):
    live = at >= 0 if FULL else at < left
    if FULL:  # unmasked, for its own sake: a mask whose end is unknown allows no 16-byte loads and stores
        p, g, m, v = tl.load(p_ptr + at), tl.load(g_ptr + at).to(tl.float32), tl.load(m_ptr + at), tl.load(v_ptr + at)
    else:
        p, g = tl.load(p_ptr + at, mask=live, other=0.0), tl.load(g_ptr + at, mask=live, other=0.0).to(tl.float32)
        m, v = tl.load(m_ptr + at, mask=live, other=0.0), tl.load(v_ptr + at, mask=live, other=0.0)
    g = g * unscale
    if DECOUPLED:
        p = p * keep
    else:
        g = g + decay * p
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    p = p - size * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root2) + eps)
    if FULL:
        tl.store(p_ptr + at, p)
        tl.store(m_ptr + at, m)
        tl.store(v_ptr + at, v)
        if MASTER:
            tl.store(low_ptr + at, narrow(p, LOW))
    else:
        tl.store(p_ptr + at, p, mask=live)
        tl.store(m_ptr + at, m, mask=live)
        tl.store(v_ptr + at, v, mask=live)
        if MASTER:
            tl.store(low_ptr + at, narrow(p, LOW), mask=live)


@triton.jit
def _adamw(pointers, sizes, tensor_of, offset_of, numbers_ptr, scale_ptr, skip_ptr, tensors, keep, size, root2, beta1, rest1, beta2, rest2, eps,
           decay, GRAD: tl.constexpr, LOW: tl.constexpr, MASTER: tl.constexpr, DECOUPLED: tl.constexpr, ON_DEVICE: tl.constexpr,
           SCALED: tl.constexpr, SKIPS: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    if SKIPS:  # noqa: SIM102 a compile-time choice
        if tl.load(skip_ptr) != 0:
            return
    if ON_DEVICE:
        keep = tl.load(numbers_ptr)
        size = tl.load(numbers_ptr + 1)
        root2 = tl.load(numbers_ptr + 2)
    unscale = 1.0
    if SCALED:
        unscale = tl.div_rn(1.0, tl.load(scale_ptr))
    chunk = tl.program_id(0)
    tensor = tl.load(tensor_of + chunk)
    offset = tl.multiple_of(tl.load(offset_of + chunk), CHUNK)
    left = tl.minimum(tl.load(sizes + tensor) - offset, CHUNK).to(tl.int32)
    p_ptr = address(pointers, tensors, 0, tensor, tl.float32, ALIGNED) + offset
    g_ptr = address(pointers, tensors, 1, tensor, GRAD, ALIGNED) + offset
    m_ptr = address(pointers, tensors, 2, tensor, tl.float32, ALIGNED) + offset
    v_ptr = address(pointers, tensors, 3, tensor, tl.float32, ALIGNED) + offset
    low_ptr = g_ptr
    if MASTER:
        low_ptr = address(pointers, tensors, 4, tensor, LOW, ALIGNED) + offset
    at = tl.arange(0, BLOCK)
    if left >= CHUNK:
        for start in range(0, CHUNK, BLOCK):
            _piece(p_ptr, g_ptr, m_ptr, v_ptr, low_ptr, start + at, left, keep, size, root2, beta1, rest1, beta2, rest2, eps, decay, unscale,
                   LOW, MASTER, DECOUPLED, True)
    else:
        for start in range(0, left, BLOCK):
            _piece(p_ptr, g_ptr, m_ptr, v_ptr, low_ptr, start + at, left, keep, size, root2, beta1, rest1, beta2, rest2, eps, decay, unscale,
                   LOW, MASTER, DECOUPLED, False)


def update(
    rows: Sequence[tuple[Tensor, ...]], *, numbers: tuple[float, float, float] | Tensor, betas: tuple[float, float], eps: float,
    weight_decay: float, adam_w_mode: bool, grad_scale: Tensor | None, found_inf: Tensor | None,
) -> None:
    """Updates every row (fp32 weights, gradient, exp_avg, exp_avg_sq[, bf16 or fp16 weights to write besides]), contiguous, on one device.

    Args:
        numbers: (1 - lr decay, lr / (1 - beta1^t), sqrt(1 - beta2^t)), or the same as an fp32 tensor [3] on the device.
        grad_scale: what the gradients are to be divided by; found_inf: nothing is done where it is not 0.
    """
    kinds = defaultdict(list)
    for row in rows:
        kinds[row[1].dtype, row[4].dtype if len(row) == 5 else None].append(row)
    on_device = isinstance(numbers, Tensor)
    for (grad, low), kind in kinds.items():
        table = tables(list(zip(*kind, strict=True)))
        if table is None:
            continue
        with on_device_of(table.pointers):
            _adamw[table.grid](
                table.pointers, table.sizes, table.tensor_of, table.offset_of, numbers if on_device else table.sizes,
                table.sizes if grad_scale is None else grad_scale, table.sizes if found_inf is None else found_inf, table.sizes.numel(),
                *((0.0, 0.0, 0.0) if on_device else numbers), betas[0], 1 - betas[0], betas[1], 1 - betas[1], eps, weight_decay,
                GRAD=torch_type(grad), LOW=torch_type(low or torch.float32), MASTER=low is not None, DECOUPLED=adam_w_mode, ON_DEVICE=on_device,
                SCALED=grad_scale is not None, SKIPS=found_inf is not None, ALIGNED=table.aligned, CHUNK=multi_tensor.CHUNK,
                BLOCK=multi_tensor.BLOCK, num_warps=multi_tensor.WARPS)


def launches() -> list[Launch]:
    """Each pair of weight and gradient dtypes, with 16-byte addresses and without, with all options on; without them and with L2 decay besides."""
    names = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}
    signature = {"pointers": "*i64", "sizes": "*i64", "tensor_of": "*i32", "offset_of": "*i64", "numbers_ptr": "*fp32", "scale_ptr": "*fp32",
                 "skip_ptr": "*fp32", "tensors": "i32",
                 **dict.fromkeys(("keep", "size", "root2", "beta1", "rest1", "beta2", "rest2", "eps", "decay"), "fp32")}
    found = []
    for low, grad in ((None, "fp32"), (None, "bf16"), (None, "fp16"), ("bf16", "fp32"), ("bf16", "bf16"), ("fp16", "fp32"), ("fp16", "fp16")):
        for aligned in (True, False):
            for decoupled, options in [(True, True), *([(True, False)] if aligned else []), *([(False, False)] if aligned and not low else [])]:
                what = f"{low + ' + ' if low else ''}fp32 weights, {grad} gradients{'' if aligned else ', unaligned'}"
                what += f"{'' if decoupled else ', L2'}{', capturable, scaled' if options else ''}"
                found.append(Launch(
                    "adamw", what, _adamw, signature,
                    {"GRAD": names[grad], "LOW": names[low or "fp32"], "MASTER": low is not None, "DECOUPLED": decoupled, "ON_DEVICE": options,
                     "SCALED": options, "SKIPS": options, "ALIGNED": aligned, "CHUNK": multi_tensor.CHUNK, "BLOCK": multi_tensor.BLOCK},
                    multi_tensor.WARPS, memory_bound=aligned))
    return found
