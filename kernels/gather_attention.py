"""Attention over context-parallel ranks by gathering keys and values: the way for documents of any length.

Each rank holds its queries (zig-zag order, `context_parallel.zigzag_split`) and gathers the keys and values of all ranks; on the way back
their gradients are summed over the ranks and each keeps its own part (Llama 3, arXiv 2407.21783, section 3.3.2, chooses this for document
masks). Memory: keys and values of the whole sequence and a boolean mask [batch, queries / n, keys]; with grouped heads they are small beside
the queries. Ring and Ulysses (`context_parallel.py`) hold neither, and need whole chunks.
"""
import torch
import torch.distributed as dist
from torch import Tensor

from kernels.attention import attention
from kernels.checks import check_group, check_shape
from kernels.context_parallel import zigzag_positions


class _Gather(torch.autograd.Function):
    """[n, ...] of this rank -> [size n, ...] of all, in the order of ranks; backward sums over the ranks and takes the own part."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        # Summed in fp32: n bf16 roundings of a sum would be the largest error of the layer.
        total, size = grad.float().contiguous(), ctx.group.size()
        own = total.new_empty(total.shape[0] // size, *total.shape[1:])
        if total.is_cuda:
            dist.reduce_scatter_tensor(own, total, group=ctx.group)
        else:  # gloo reduces and scatters as long as all-reduce takes, and not in every version
            dist.all_reduce(total, group=ctx.group)
            own = total.chunk(size)[ctx.group.rank()]
        return own.to(grad.dtype), None


def gather_attention(q: Tensor, k: Tensor, v: Tensor, *, group: dist.ProcessGroup, causal: bool, scale: float | None = None,
                     documents: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Attention of this rank's queries over the whole sequence.

    Args:
        q: [seq / n, batch, heads, d], k, v: [seq / n, batch, groups, d]: this rank's tokens in zig-zag order.
        group: the n context-parallel ranks.
        documents: [batch, seq] int, the document of every token of the whole sequence, the same on all ranks; attention stays within one.
    Returns:
        [seq / n, batch, heads, d].
    Raises:
        ValueError: `documents` does not fit the sequence, or this rank is not in `group`.
    """
    check_group("gather_attention", "group", group)
    size, length = group.size(), q.shape[0] * group.size()
    rows = torch.cat([zigzag_positions(length, rank, size, device=q.device) for rank in range(size)])
    queries = zigzag_positions(length, group.rank(), size, device=q.device)
    mask = None
    if causal:
        mask = (rows[None, :] > queries[:, None])[None, None]
    if documents is not None:
        check_shape("gather_attention", "documents", documents, (q.shape[1], length))
        other = (documents[:, queries, None] != documents[:, None, rows])[:, None]
        mask = other if mask is None else mask | other
    return attention(q, _Gather.apply(k, group), _Gather.apply(v, group), causal=False, scale=scale, mask=mask, backend=backend)
