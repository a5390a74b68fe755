"""Ulysses attention (Jacobs et al. 2023, arXiv 2309.14509): sequences are split over n ranks, and heads are exchanged for tokens.

One all-to-all gives each rank all tokens of heads / n heads, `attention` runs as on one rank, whatever its library, and another all-to-all
brings the tokens home; backward is the same in reverse. Messages: (heads + 2 groups) d and heads d a token, in the tensors' dtype.
Tokens come and go in zig-zag order (zigzag.py), which is undone between the two. Shapes are those of `kernels.attention`, of this
rank's tokens. An autograd.Function, not a registered op, which could not hold the process group.
"""
import torch
import torch.distributed as dist
from torch import Tensor

from kernels.attention import attention
from kernels.attention_choice import serving
from kernels.zigzag import check_split, zigzag_packed_positions


class _Exchange(torch.autograd.Function):
    """Block i of dimension 0 goes to rank i of the group; what comes from rank i is block i. Backward is the same again."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        x = x.contiguous()  # blocks are cut from heads: the copy is the packing of the message
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=group)
        return received

    @staticmethod
    def backward(ctx, grad):
        return _Exchange.apply(grad, ctx.group), None


def ulysses_attention(q: Tensor, k: Tensor, v: Tensor, *, group: dist.ProcessGroup, causal: bool, scale: float | None = None,
                      cu_seqlens: Tensor | None = None, max_seqlen: int | None = None, dropout: float = 0.0, backend: str = "auto") -> Tensor:
    """As `ring_attention`, by exchanging heads for tokens: heads must be a multiple of n, and groups a multiple or a divisor of n
    (a group that several ranks need is sent to each). Takes every backend of `attention`, and dropout (each rank draws its own)."""
    check_split("ulysses_attention", q, k, v, group, cu_seqlens)
    serving(backend, q, packed=cu_seqlens is not None, mask=False, dropout=dropout > 0.0)  # refuses before anything is sent
    n, heads, groups = group.size(), q.shape[-2], k.shape[-2]
    if heads % n:
        raise ValueError(f"ulysses_attention: q has {heads} heads, which {n} ranks do not share evenly; use ring_attention")
    if groups % n:
        if n % groups:
            raise ValueError(f"ulysses_attention: k has {groups} groups, neither a multiple nor a divisor of the {n} ranks; use ring_attention")
        k, v = (x.repeat_interleave(n // groups, dim=-2) for x in (k, v))
    mine = heads // n, k.shape[-2] // n, k.shape[-2] // n
    mixed = torch.cat([x.unflatten(-2, (n, -1)) for x in (q, k, v)], dim=-2)  # [tokens, (batch,) n, heads + 2 groups over n, d]
    mixed = _Exchange.apply(mixed.movedim(-3, 0), group)  # [n, tokens of rank n, ...]
    if cu_seqlens is None:
        first, second = mixed.unflatten(1, (2, -1)).unbind(1)
        whole = torch.cat((first, second.flip(0))).flatten(0, 1)
    else:
        place = torch.cat([zigzag_packed_positions(cu_seqlens, rank, n, q.shape[0]) for rank in range(n)])
        whole = mixed.flatten(0, 1)[place.argsort()]
    out = attention(*whole.split(mine, dim=-2), causal=causal, scale=scale, cu_seqlens_q=cu_seqlens, max_seqlen_q=max_seqlen,
                    max_seqlen_k=max_seqlen, dropout=dropout, backend=backend)
    if cu_seqlens is None:
        first, second = out.unflatten(0, (2, n, -1)).unbind(0)
        parts = torch.stack((first, second.flip(0)), dim=1).flatten(1, 2)
    else:
        parts = out[place].unflatten(0, (n, -1))
    return _Exchange.apply(parts, group).movedim(0, -3).flatten(-3, -2)
