"""Attention in torch that also gives the log-sum-exp, and its gradient from it: for parts of the keys (ring attention) and packed sequences.

With S = scale q k^T (hidden places -inf), L = logsumexp(S) and P = exp(S - L), forward is out = P v. Backward needs out and L alone
(FlashAttention, Dao et al. 2022, arXiv 2205.14135): with D = rowsum(dout out) - dL,
    dv = P^T dout,      dP = dout v^T,      dS = P (dP - D),      dq = scale dS k,      dk = scale dS^T q.
This stays right for a part of the keys when out and L are those of all keys: what ring attention rests on.

Shapes: q [batch, heads, seq, d], k and v [batch, groups, keys, d] of any strides with d dense; L [batch, heads, seq] fp32.
Packed: q [tokens, heads, d], L [heads, tokens]. A query that sees no key gives 0 and L = -inf.
Kernels: torch's flash attention for CPU; on CUDA in 16 bits its flash attention; else matrix products over blocks of queries.
"""
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.autocast import outside_autocast

SCORES = 1 << 24  # scores held at once by the path of matrix products: 64 MiB in fp32
GATHER = 1 << 13  # packed sequences of one length are copied together up to so many elements of q or k each: beyond, a call costs less than the copies


def hidden_by(mask: Tensor | None, causal: bool, queries: int, keys: int, device: torch.device) -> tuple[Tensor | None, bool]:
    """(mask, causal) with causal left only where the matrix is square: kernels do not agree on which corner it starts from otherwise."""
    if not causal or queries == 1:  # the last query sees every key
        return mask, False
    if queries == keys and mask is None:
        return None, True
    later = torch.ones(queries, keys, dtype=torch.bool, device=device).triu(1 + keys - queries)
    return later if mask is None else mask | later, False


def _bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask as what is added to the scores, with four dimensions."""
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, -torch.inf)[(None,) * (4 - mask.dim())]


def _flash_on_gpu(q: Tensor, mask: Tensor | None) -> bool:
    return q.is_cuda and mask is None and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def forward(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """(out, L). The mask is bool, True hides, broadcastable to [batch, heads, seq, keys]; causal is aligned to the bottom right."""
    if not q.numel() or not k.numel():
        return torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    mask, causal = hidden_by(mask, causal, q.shape[2], k.shape[2], q.device)
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=_bias(mask, q.dtype), scale=scale)
        if mask is not None:  # the kernel's L of a query that sees nothing is 0
            lse = lse.masked_fill(mask.all(-1), -torch.inf)
        return out, lse.contiguous()
    if _flash_on_gpu(q, mask):
        out, lse = torch.ops.aten._flash_attention_forward(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, None, q.shape[2], k.shape[2], 0.0, causal, False, scale=scale)[:2]
        return out.transpose(1, 2), lse
    return by_products(q, k, v, mask=mask, causal=causal, scale=scale)


def backward(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, mask: Tensor | None = None,
             causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of the keys given; `out` and `lse` may be those of more keys."""
    if not q.numel() or not k.numel():
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    mask, causal = hidden_by(mask, causal, q.shape[2], k.shape[2], q.device)
    if dlse is not None or q.device.type != "cpu" and not _flash_on_gpu(q, mask):  # the kernels form D themselves
        return by_products_backward(dout, dlse, q, k, v, out, lse, mask=mask, causal=causal, scale=scale)
    if q.device.type == "cpu":
        if mask is not None:
            lse = lse.masked_fill(lse == -torch.inf, 0.0)  # exp(-inf - 0) is the 0 that exp(-inf + inf) is not
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, causal, attn_mask=_bias(mask, q.dtype), scale=scale)
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of the dropout, which is 0
    grads = torch.ops.aten._flash_attention_backward(
        *(x.transpose(1, 2) for x in (dout, q, k, v, out)), lse, None, None, q.shape[2], k.shape[2], 0.0, causal, state,
        torch.empty(0, device=q.device), scale=scale)
    return tuple(g.transpose(1, 2) for g in grads)


# ---- matrix products over blocks of queries: any device and dtype, memory bounded by SCORES ----------------------------------------


def _blocks(q: Tensor, k: Tensor) -> range:
    rows = max(1, SCORES // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    return range(0, q.shape[2], rows)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """[batch, heads, rows, d] -> fp32 [batch, groups, heads / groups * rows, d]: the queries of one key/value head in one product."""
    return x.float().unflatten(1, (groups, -1)).flatten(2, 3)


def _scores(q: Tensor, k: Tensor, start: int, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    rows = q.shape[2]
    s = (_grouped(q, k.shape[1]) @ k.float().mT).unflatten(2, (-1, rows)).flatten(1, 2).mul_(scale)
    if causal:
        s.masked_fill_(torch.arange(start, start + rows, device=q.device)[:, None] < torch.arange(k.shape[2], device=q.device), -torch.inf)
    if mask is not None:
        s.masked_fill_(mask[..., start : start + rows, :] if mask.dim() > 1 and mask.shape[-2] > 1 else mask, -torch.inf)
    return s


@outside_autocast
def by_products(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """`forward` for a square causal matrix or a mask."""
    queries, out, lse = q.shape[2], torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    step = _blocks(q, k)
    for start in step:
        part = slice(start, min(start + step.step, queries))
        s = _scores(q[:, :, part], k, start, mask, causal, scale)
        lse[:, :, part] = found = s.logsumexp(-1)
        p = s.sub_(found.masked_fill(found == -torch.inf, 0.0)[..., None]).exp_()
        out[:, :, part] = (_grouped(p, k.shape[1]) @ v.float()).unflatten(2, (-1, p.shape[2])).flatten(1, 2)
    return out, lse


@outside_autocast
def by_products_backward(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, mask: Tensor | None,
                         causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """`backward` for a square causal matrix or a mask."""
    groups, queries = k.shape[1], q.shape[2]
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
    step = _blocks(q, k)
    for start in step:
        part = slice(start, min(start + step.step, queries))
        rows, do = q[:, :, part], dout[:, :, part].float()
        found = lse[:, :, part]
        p = _scores(rows, k, start, mask, causal, scale).sub_(found.masked_fill(found == -torch.inf, 0.0)[..., None]).exp_()
        d = (do * out[:, :, part].float()).sum(-1, keepdim=True)
        if dlse is not None:
            d -= dlse[:, :, part, None].float()
        dv += _grouped(p, groups).mT @ _grouped(do, groups)
        dp = (_grouped(do, groups) @ v.float().mT).unflatten(2, (-1, do.shape[2])).flatten(1, 2)
        ds = _grouped(p.mul_(dp.sub_(d)).mul_(scale), groups)
        dq[:, :, part] = (ds @ k.float()).unflatten(2, (-1, do.shape[2])).flatten(1, 2)
        dk += ds.mT @ _grouped(rows, groups)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


# ---- packed: short sequences of one length are one batch, and those that lie side by side ------------------------------------------


def _same_lengths(cu_q: Sequence[int], cu_k: Sequence[int], width: int) -> list[tuple[int, int, list[int], list[int]]]:
    """(queries, keys, starts of the queries, starts of the keys) of the sequences that are computed together; those without keys are left out.

    Args:
        width: elements of a token.
    """
    found: dict[tuple, tuple[int, int, list[int], list[int]]] = {}
    last = None
    for i, (q0, q1, k0, k1) in enumerate(zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True)):
        queries, keys = q1 - q0, k1 - k0
        if queries and keys:
            key = (queries, keys)
            if max(queries, keys) * width > GATHER:
                key = last if last is not None and last[:2] == key and len(last) == 3 else (queries, keys, i)
            entry = found.setdefault(key, (queries, keys, [], []))
            entry[2].append(q0)
            entry[3].append(k0)
            last = key
    return list(found.values())


def _where(starts: list[int], length: int, device: torch.device) -> slice | Tensor:
    """The tokens of sequences: a slice where they stand side by side, else their indices."""
    if all(b - a == length for a, b in itertools.pairwise(starts)):
        return slice(starts[0], starts[-1] + length)
    return (torch.tensor(starts)[:, None] + torch.arange(length)).flatten().to(device)


def _batch(x: Tensor, where: slice | Tensor, length: int) -> Tensor:
    """[tokens, heads, d] -> [sequences, heads, length, d]."""
    return x[where].unflatten(0, (-1, length)).transpose(1, 2)


def packed_forward(q: Tensor, k: Tensor, v: Tensor, cu_q: Sequence[int], cu_k: Sequence[int], *, causal: bool,
                   scale: float) -> tuple[Tensor, Tensor]:
    """(out [tokens, heads, d], L [heads, tokens]); `cu_q`, `cu_k`: cumulative lengths, on the host."""
    out, lse = torch.zeros(q.shape, dtype=q.dtype, device=q.device), q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=torch.float32)
    for queries, keys, q_starts, k_starts in _same_lengths(cu_q, cu_k, q.shape[1] * q.shape[2]):
        at, of = _where(q_starts, queries, q.device), _where(k_starts, keys, q.device)
        o, found = forward(_batch(q, at, queries), _batch(k, of, keys), _batch(v, of, keys), causal=causal, scale=scale)
        out[at] = o.transpose(1, 2).flatten(0, 1)
        lse[:, at] = found.transpose(0, 1).flatten(1)
    return out, lse


def packed_backward(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Sequence[int],
                    cu_k: Sequence[int], *, causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), as `backward`."""
    grads = tuple(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))

    def rows(x: Tensor, where: slice | Tensor, length: int) -> Tensor:
        return x[:, where].unflatten(1, (-1, length)).transpose(0, 1)

    for queries, keys, q_starts, k_starts in _same_lengths(cu_q, cu_k, q.shape[1] * q.shape[2]):
        at, of = _where(q_starts, queries, q.device), _where(k_starts, keys, q.device)
        found = backward(
            _batch(dout, at, queries), None if dlse is None else rows(dlse, at, queries), _batch(q, at, queries), _batch(k, of, keys),
            _batch(v, of, keys), _batch(out, at, queries), rows(lse, at, queries), causal=causal, scale=scale)
        for grad, part, where in zip(grads, found, (at, of, of), strict=True):
            grad[where] = part.transpose(1, 2).flatten(0, 1)
    return grads
