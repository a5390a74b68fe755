"""Flat tensors of episodes of unequal lengths.

The responses of an iteration lie one after another in [tokens]; `cu_seqlens` [n + 1] (int32 or int64) rises from 0 to tokens, and episode i is
positions cu_seqlens[i] to cu_seqlens[i + 1]. Only response tokens are in there: no prompt and no padding, so nothing can be put on either.
Sums are taken one episode at a time, in the order of its tokens: the same bits whatever else is in the batch.
"""
import torch
from torch import Tensor

from kernels.checks import check_device, check_dtype, check_shape

FLOATS = (torch.float32, torch.float64)
OFFSETS = (torch.int32, torch.int64)


def check_packed(op: str, cu_seqlens: Tensor, **tensors: Tensor | None) -> int:
    """How many episodes there are, when all that is given fits together.

    Args:
        op: who asks, for the message. tensors: each [tokens], fp32 or fp64; None is passed over.
    Raises:
        TypeError: a dtype. ValueError: a shape, a device, or offsets that do not rise from 0 to tokens (on a GPU the stream fails instead:
            looking would wait for it).
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    check_dtype(op, "cu_seqlens", cu_seqlens, OFFSETS)
    if cu_seqlens.dim() != 1 or not cu_seqlens.numel():
        raise ValueError(f"{op}: cu_seqlens has shape {tuple(cu_seqlens.shape)}, expected (n + 1,)")
    tokens = int(cu_seqlens[-1]) if not given else next(iter(given.values())).numel()
    for name, tensor in given.items():
        check_dtype(op, name, tensor, FLOATS)
        check_shape(op, name, tensor, (tokens,))
        check_device(op, name, tensor, cu_seqlens.device)
    right = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == tokens) & (cu_seqlens.diff() >= 0).all()
    if cu_seqlens.device.type != "cpu":
        torch._assert_async(right, f"{op}: cu_seqlens must rise from 0 to the number of tokens")
    elif not right:
        raise ValueError(f"{op}: cu_seqlens must rise from 0 to the number of tokens ({tokens}), got {cu_seqlens.tolist()[:8]} ... "
                         f"{int(cu_seqlens[-1])}")
    return cu_seqlens.numel() - 1


def segment_sum(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[tokens] -> [n], in x's dtype, differentiable; 0 for an empty segment."""
    return torch.segment_reduce(x, "sum", offsets=cu_seqlens, initial=0)


def spread(per_segment: Tensor, cu_seqlens: Tensor, tokens: int) -> Tensor:
    """[n] -> [tokens]: each segment's number at all of its positions."""
    return per_segment.repeat_interleave(cu_seqlens.diff(), output_size=tokens)
