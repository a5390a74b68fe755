"""The order in which the tokens of sequences are split over context-parallel ranks, and what the ways of attention over them check alike.

Zig-zag order: a sequence is cut into 2n chunks, and rank r of n holds the chunks r and 2n-1-r, in this order. Under a causal mask each rank
then has the same work, and it is what megatron-core assumes where it cuts rotary positions. Packed sequences are split one by one, so that the
length of each must be a multiple of 2n.
"""
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.attention import check_arguments
from kernels.attention_libraries import documents_of
from kernels.checks import check_group


def zigzag_positions(seq: int, rank: int, size: int, device: torch.device | str | None = None) -> Tensor:
    """int64 [seq / size]: where in the sequence the tokens of `rank` stand. ValueError unless seq is a multiple of 2 size."""
    if seq % (2 * size):
        raise ValueError(f"zigzag_positions: seq is {seq}; {size} ranks hold two chunks each, so it must be a multiple of {2 * size}")
    chunk = torch.arange(seq // (2 * size), device=device)
    return torch.cat((rank * len(chunk) + chunk, (2 * size - 1 - rank) * len(chunk) + chunk))


def zigzag_split(x: Tensor, dim: int, rank: int, size: int) -> Tensor:
    """The part of `x` along `dim` that `rank` holds. ValueError unless the dimension is a multiple of 2 size."""
    if x.shape[dim] % (2 * size):
        raise ValueError(f"zigzag_split: dimension {dim} of x is {x.shape[dim]}; {size} ranks hold two chunks each, so it must be a multiple "
                         f"of {2 * size}")
    chunk = x.shape[dim] // (2 * size)
    return torch.cat((x.narrow(dim, rank * chunk, chunk), x.narrow(dim, (2 * size - 1 - rank) * chunk, chunk)), dim)


def zigzag_join(parts: Sequence[Tensor], dim: int) -> Tensor:
    """The whole along `dim` of the parts of all ranks, in their order: undoes `zigzag_split`."""
    halves = [part.chunk(2, dim) for part in parts]
    return torch.cat([half[0] for half in halves] + [half[1] for half in reversed(halves)], dim)


def zigzag_packed_positions(cu_seqlens: Tensor, rank: int, size: int, tokens: int | None = None) -> Tensor:
    """int64 [tokens]: which of all packed tokens `rank` holds, sequence after sequence, each in zig-zag order.

    Args:
        cu_seqlens: [sequences + 1], cumulative lengths of the whole sequences, each a multiple of 2 size.
        tokens: how many they are; None = read from cu_seqlens.
    """
    tokens = int(cu_seqlens[-1]) // size if tokens is None else tokens
    local = cu_seqlens // size
    sequence = documents_of(local, tokens)
    start, chunk = local[sequence], (local[sequence + 1] - local[sequence]) // 2
    offset = torch.arange(tokens, device=cu_seqlens.device) - start
    return cu_seqlens[sequence] + torch.where(offset < chunk, rank * chunk + offset, (2 * size - 2 - rank) * chunk + offset)


def check_split(op: str, q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup, cu_seqlens: Tensor | None) -> None:
    """TypeError or ValueError, naming the argument, unless q, k and v are parts of sequences in zig-zag order over `group`."""
    if group is None:
        raise TypeError(f"{op}: group is None; it must be the process group of the ranks that share the sequences")
    check_group(op, "group", group)
    check_arguments(op, q, k, v, None, cu_seqlens, None, cu_seqlens is not None)
    size = group.size()
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"{op}: k holds {k.shape[0]} tokens, q {q.shape[0]}; each rank brings as many of both")
    if cu_seqlens is None:
        if q.shape[0] % 2:
            raise ValueError(f"{op}: q holds {q.shape[0]} tokens; in zig-zag order a rank has two chunks of one length, so it must be even")
        return
    lengths = cu_seqlens.diff()
    if q.is_cuda:  # reading them would wait for the GPU in every layer
        torch._assert_async((lengths % (2 * size) == 0).all() & (cu_seqlens[-1] == size * q.shape[0]))
    elif (lengths % (2 * size)).any() or int(cu_seqlens[-1]) != size * q.shape[0]:
        raise ValueError(f"{op}: cu_seqlens has lengths {lengths.tolist()[:20]} for {size} ranks with {q.shape[0]} tokens each; every length must be "
                         f"a multiple of {2 * size}, and all of them together {size * q.shape[0]}")
