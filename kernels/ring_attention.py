"""Ring attention (Liu et al. 2023, arXiv 2310.01889): sequences are split over ranks, queries stay, keys and values travel around the ring.

Attention over the part p of the keys that is here gives out_p and L_p (attention_torch.py), joined in fp32:
    L = log(exp L_old + exp L_p),      out = exp(L_old - L) out + exp(L_p - L) out_p.
In zig-zag order (zigzag.py) no causal part is cut: of an earlier rank's keys all queries see the first chunk alone, of a later
rank's keys the second chunk of queries sees all; what is hidden is not computed. Backward sends keys and values around again, and their
gradients with them in fp32, which come home after n steps.

Messages travel while a step computes: n-1 of k and v forward; n-1 of k and v and n of fp32 gradients backward, to the next rank each.
Shapes are those of `kernels.attention`, of this rank's tokens. An autograd.Function, not a registered op: that could not hold the process
group, and the compiler would gain nothing from seeing messages from point to point; `torch.compile` breaks the graph around it.
"""
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import attention_libraries as libraries
from kernels import attention_torch
from kernels.attention_choice import serving
from kernels.attention_libraries import documents_of
from kernels.zigzag import check_split

KEYS, GRADIENTS = 1, 2  # tags: gloo tells messages between the same two ranks apart by them, NCCL by their order, the same on all ranks


@dataclass
class _Tokens:
    """This rank's tokens and their two halves (the earlier and the later chunk of each sequence), dense or packed.

    Attributes:
        half: chunk length where dense.
        cu, cu_half: cumulative local lengths, of whole sequences and of a half of each; None where dense.
        halves: indices of the tokens of the first and the second halves, where packed.
        longest: of the local sequences.
    """

    half: int
    cu: Tensor | None = None
    cu_half: Tensor | None = None
    halves: tuple[Tensor, Tensor] | None = None
    longest: int = 0

    def at(self, part: int | None) -> slice | Tensor:
        """Where the first (0), the second (1) or both (None) halves stand among the tokens."""
        if part is None:
            return slice(None)
        if self.halves is not None:
            return self.halves[part]
        return slice(self.half) if part == 0 else slice(self.half, None)

    def lengths(self, part: int | None) -> tuple[Tensor | None, int]:
        return (self.cu, self.longest) if part is None else (self.cu_half, self.longest // 2)


def _tokens(q: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None, size: int, name: str) -> _Tokens:
    if cu_seqlens is None:
        return _Tokens(q.shape[0] // 2)
    cu, cu_half = cu_seqlens // size, cu_seqlens // (2 * size)
    tokens = q.shape[0]
    sequence = documents_of(cu, tokens)
    second = torch.arange(tokens, device=q.device) - cu[sequence] >= (cu_half[1:] - cu_half[:-1])[sequence]
    order = second.int().argsort(stable=True)  # first halves, then second halves, half of the tokens each: known without reading `second`
    if max_seqlen is None and name != "torch":
        max_seqlen = int(cu_seqlens.diff().max())
    longest = 0 if max_seqlen is None else max_seqlen // size
    if name == "torch":  # its path for packed sequences wants lengths on the host: read once, not at each step
        cu, cu_half = cu.cpu(), cu_half.cpu()
    return _Tokens(0, cu, cu_half, (order[: tokens // 2], order[tokens // 2 :]), longest)


def _seen(step: int, owner: int, rank: int, causal: bool) -> tuple[int | None, int | None, bool]:
    """(half of the queries, half of the keys, causal) that take part when the keys of `owner` are here; None = both halves."""
    if not causal or step == 0:
        return None, None, causal
    return (None, 0, False) if owner < rank else (1, None, False)


def _forward_part(name: str, tokens: _Tokens, q: Tensor, k: Tensor, v: Tensor, q_half, k_half, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """(out, L) of these queries over these keys; L [seq, batch, heads] or [tokens, heads] here, so that it is indexed like out."""
    (cu_q, max_q), (cu_k, max_k) = tokens.lengths(q_half), tokens.lengths(k_half)
    if cu_q is not None:
        if name == "torch":
            out, lse = attention_torch.packed_forward(q, k, v, cu_q.tolist(), cu_k.tolist(), causal=causal, scale=scale)
        else:
            out, lse = libraries.part_forward(name, q, k, v, cu_q, cu_k, max_q, max_k, causal=causal, scale=scale)
        return out, lse.t()
    if name == "torch":
        out, lse = attention_torch.forward(*(x.permute(1, 2, 0, 3) for x in (q, k, v)), causal=causal, scale=scale)
        return out.permute(2, 0, 1, 3), lse.permute(2, 0, 1)
    out, lse = libraries.part_forward(name, *(x.transpose(0, 1) for x in (q, k, v)), None, None, 0, 0, causal=causal, scale=scale)
    return out.transpose(0, 1), lse.permute(2, 0, 1)


def _backward_part(name: str, tokens: _Tokens, dout, q, k, v, out, lse, q_half, k_half, causal: bool, scale: float) -> tuple[Tensor, ...]:
    (cu_q, max_q), (cu_k, max_k) = tokens.lengths(q_half), tokens.lengths(k_half)
    if cu_q is not None:
        if name == "torch":
            return attention_torch.packed_backward(dout, None, q, k, v, out, lse.t(), cu_q.tolist(), cu_k.tolist(), causal=causal, scale=scale)
        return libraries.part_backward(name, dout, q, k, v, out, lse.t(), cu_q, cu_k, max_q, max_k, causal=causal, scale=scale)
    if name == "torch":
        dout, q, k, v, out = (x.permute(1, 2, 0, 3) for x in (dout, q, k, v, out))
        grads = attention_torch.backward(dout, None, q, k, v, out, lse.permute(1, 2, 0).contiguous(), causal=causal, scale=scale)
        return tuple(grad.permute(2, 0, 1, 3) for grad in grads)
    inside = (x.transpose(0, 1) for x in (dout, q, k, v, out))
    grads = libraries.part_backward(name, *inside, lse.permute(1, 2, 0), None, None, 0, 0, causal=causal, scale=scale)
    return tuple(grad.transpose(0, 1) for grad in grads)


def _shift(send: Tensor, group: dist.ProcessGroup, tag: int) -> tuple[Tensor, list[dist.Work]]:
    """Starts to send to the next rank of the ring and to receive from the previous one; (what will arrive, what to wait for)."""
    rank, size, arriving = group.rank(), group.size(), torch.empty_like(send)
    return arriving, dist.batch_isend_irecv([
        dist.P2POp(dist.isend, send, dist.get_global_rank(group, (rank + 1) % size), group, tag),
        dist.P2POp(dist.irecv, arriving, dist.get_global_rank(group, (rank - 1) % size), group, tag),
    ])


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, tokens, group, causal, scale, name):
        rank, size = group.rank(), group.size()
        kv = torch.stack((k, v))  # the buffer that travels: a copy is needed whatever the strides
        out = lse = None
        for step in range(size):
            arriving, works = _shift(kv, group, KEYS) if step < size - 1 else (None, [])
            q_half, k_half, part_causal = _seen(step, (rank - step) % size, rank, causal)
            at, of = tokens.at(q_half), tokens.at(k_half)
            o, found = _forward_part(name, tokens, q[at], kv[0][of], kv[1][of], q_half, k_half, part_causal, scale)
            if out is None:
                out, lse = o.float(), found
            else:
                joined = torch.logaddexp(lse[at], found)
                out[at] = out[at] * (lse[at] - joined).exp()[..., None] + o * (found - joined).exp()[..., None]
                lse[at] = joined
            _wait(works)
            kv = arriving
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = tokens, group, causal, scale, name
        return out

    @staticmethod
    @once_differentiable  # L is a constant here, so that a second derivative would be wrong
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        tokens, group, causal, scale, name = ctx.rest
        rank, size = group.rank(), group.size()
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        kv, dq = torch.stack((k, v)), torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        dkv, coming = torch.zeros(kv.shape, dtype=torch.float32, device=q.device), []
        for step in range(size):
            arriving, works = _shift(kv, group, KEYS) if step < size - 1 else (None, [])
            q_half, k_half, part_causal = _seen(step, (rank - step) % size, rank, causal)
            at, of = tokens.at(q_half), tokens.at(k_half)
            grads = _backward_part(name, tokens, dout[at], q[at], kv[0][of], kv[1][of], out[at], lse[at], q_half, k_half, part_causal, scale)
            dq[at] += grads[0]
            _wait(coming)  # the gradients of these keys and values, from the ranks that had them before
            dkv[0][of] += grads[1]
            dkv[1][of] += grads[2]
            if size > 1:
                sent = dkv  # held until it has left
                dkv, coming = _shift(sent, group, GRADIENTS)
            _wait(works)
            kv = arriving
        _wait(coming)
        return dq.to(q.dtype), dkv[0].to(k.dtype), dkv[1].to(v.dtype), None, None, None, None, None


def ring_attention(q: Tensor, k: Tensor, v: Tensor, *, group: dist.ProcessGroup, causal: bool, scale: float | None = None,
                   cu_seqlens: Tensor | None = None, max_seqlen: int | None = None, backend: str = "auto") -> Tensor:
    """Attention of this rank's queries over the keys of all ranks of `group`; all of them call it, with as many tokens each.

    Args:
        q: [seq / n, batch, heads, d], this rank's tokens in zig-zag order; packed: [tokens / n, heads, d].
        k, v: [seq / n, batch, groups, d]; packed: [tokens / n, groups, d].
        cu_seqlens: int32 [sequences + 1] of the whole sequences, each a multiple of 2n long (asserted on the device where that is a GPU).
        max_seqlen: the longest whole sequence; None = read from cu_seqlens where a library asks for it.
        backend: flash-attn-2, flash-attn-3, flash-attn-4, torch, or auto.
    Returns:
        out of q's shape and dtype.
    Raises:
        TypeError, ValueError: naming the argument. MissingBackend: the backend cannot serve this call.
    """
    check_split("ring_attention", q, k, v, group, cu_seqlens)
    if not q.numel():
        return q * 0 + 0 * (k.sum() + v.sum())
    scale = scale if scale is not None else 1.0 / math.sqrt(q.shape[-1])
    name = serving(backend, q, packed=cu_seqlens is not None, mask=False, return_lse=True, partial=True)
    return _Ring.apply(q, k, v, _tokens(q, cu_seqlens, max_seqlen, group.size(), name), group, causal, scale, name)
