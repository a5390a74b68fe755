"""Attention: softmax(scale q k^T) v, causal or not, grouped heads, packed sequences, a mask, and the log-sum-exp on request.

For a query i and the keys j that it may see, with s_ij = scale q_i . k_j:
    L_i = log sum_j exp(s_ij),      out_i = sum_j exp(s_ij - L_i) v_j.
L is what is needed to join attention over parts of the keys: out = sum_p exp(L_p - L) out_p with L = log sum_p exp(L_p) (ring attention,
kernels/context_parallel.py), and what backward recomputes the scores from (FlashAttention, Dao et al. 2022, arXiv 2205.14135).

Causal is aligned to the bottom right: the last query sees all keys, query i sees keys j <= i + keys - seq. A query that sees no key gives 0
(and L = -inf), never NaN. Grouped heads: heads is a multiple of groups, head h reads group h // (heads / groups); nothing is expanded.

Memory traffic: q, k, v and out once; never seq x keys. Libraries: flash-attention 2, 3, 4, Transformer Engine, torch's own
(attention_choice.py says which serves a call, attention_libraries.py calls them, attention_torch.py is the path that runs everywhere).
Views of a fused projection are taken as they are, whatever their strides, as long as the head dimension is dense.

Shapes: dense q [seq, batch, heads, d], k, v [keys, batch, groups, d] (megatron-core's); packed q [tokens, heads, d], k, v [tokens, groups, d]
with cu_seqlens [sequences + 1], the cumulative lengths.
"""
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import attention_libraries as libraries
from kernels import attention_torch
from kernels.attention_choice import serving
from kernels.autocast import outside_autocast
from kernels.checks import FLOATS, check_device, check_dtype, check_last_dense, check_shape


def attention_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool, scale: float | None = None,
                        return_lse: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """The definition in plain PyTorch, differentiable, in q's own dtype, for dense tensors: what the op is compared with in fp64."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    s = q @ k.mT * (scale if scale is not None else 1.0 / math.sqrt(q.shape[-1]))
    hidden = torch.zeros(s.shape[-2:], dtype=torch.bool, device=q.device) if mask is None else mask
    if causal:
        hidden = hidden | torch.ones(s.shape[-2:], dtype=torch.bool, device=q.device).triu(1 + s.shape[-1] - s.shape[-2])
    blind = hidden.all(-1, keepdim=True)
    p = s.masked_fill(hidden & ~blind, -torch.inf).softmax(-1).masked_fill(blind, 0.0)
    out = (p @ v).permute(2, 0, 1, 3)
    return (out, s.masked_fill(hidden & ~blind, -torch.inf).logsumexp(-1).masked_fill(blind[..., 0], -torch.inf)) if return_lse else out


# ---- torch's path where the log-sum-exp is wanted or sequences are packed, registered ------------------------------------------------


@torch.library.custom_op("kernels::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None, causal: bool,
               scale: float) -> tuple[Tensor, Tensor]:
    """q [batch, heads, seq, d], or packed [tokens, heads, d] with cu_q and cu_k -> (out, log-sum-exp fp32)."""
    if cu_q is None:
        out, lse = attention_torch.forward(q, k, v, mask=mask, causal=causal, scale=scale)
        like = torch.empty_like(q)
        return out if out.stride() == like.stride() else like.copy_(out), lse
    ends = [_on_host(name, cu, x) for name, cu, x in (("cu_seqlens_q", cu_q, q), ("cu_seqlens_k", cu_k, k))]
    return attention_torch.packed_forward(q, k, v, *ends, causal=causal, scale=scale)


def _on_host(name: str, cu_seqlens: Tensor, x: Tensor) -> list[int]:
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != x.shape[0] or any(a > b for a, b in itertools.pairwise(ends)):
        raise ValueError(f"attention: {name} must rise from 0 to the {x.shape[0]} tokens, it is {ends if len(ends) < 20 else ends[:20] + ['...']}")
    return ends


@_attention.register_fake
def _(q, k, v, mask, cu_q, cu_k, causal, scale):
    if cu_q is not None:
        return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("kernels::attention_backward", mutates_args=())
def _attention_backward(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None,
                        cu_q: Tensor | None, cu_k: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    if cu_q is not None:
        return attention_torch.packed_backward(dout, dlse, q, k, v, out, lse, cu_q.tolist(), cu_k.tolist(), causal=causal, scale=scale)
    grads = attention_torch.backward(dout, dlse, q, k, v, out, lse, mask=mask, causal=causal, scale=scale)
    return tuple(_heads_inside(grad) for grad in grads)


@_attention_backward.register_fake
def _(dout, dlse, q, k, v, out, lse, mask, cu_q, cu_k, causal, scale):
    if cu_q is not None:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    return tuple(x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k, v))


def _heads_inside(x: Tensor) -> Tensor:
    """[batch, heads, seq, d] laid out in memory as [batch, seq, heads, d]: what torch's kernels return anyway."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _setup(ctx, inputs, output):
    q, k, v, mask, cu_q, cu_k, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, mask, cu_q, cu_k)
    ctx.set_materialize_grads(False)


def _grad(ctx, dout, dlse):
    q, k, v, out, lse, mask, cu_q, cu_k = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    elif dout.stride(-1) != 1:
        dout = dout.contiguous()
    grads = torch.ops.kernels.attention_backward(dout, dlse, q, k, v, out, lse, mask, cu_q, cu_k, ctx.causal, ctx.scale)
    return *grads, None, None, None, None, None


_attention.register_autograd(_grad, setup_context=_setup)


# ---- the function --------------------------------------------------------------------------------------------------------------------


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None = None, mask: Tensor | None = None,
              cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None,
              max_seqlen_k: int | None = None, dropout: float = 0.0, return_lse: bool = False,
              backend: str = "auto") -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v over the keys that a query may see.

    Args:
        q: [seq, batch, heads, d]; packed: [tokens, heads, d]. fp32, bf16 or fp16, the last dimension dense.
        k, v: [keys, batch, groups, d]; packed: [tokens, groups, d].
        causal: query i sees keys j <= i + keys - seq (of its own sequence, where packed).
        scale: of the scores; None = 1 / sqrt(d).
        mask: bool, broadcastable to [batch, heads, seq, keys], True hides (megatron-core's convention); with `causal` both hide.
        cu_seqlens_q, cu_seqlens_k: int32 [sequences + 1], cumulative lengths from 0 to tokens; sequences may be empty and never see one
            another. `cu_seqlens_k` None = as the queries'. On the tensors' device; libraries
            for GPUs trust their values, torch's path checks them.
        max_seqlen_q, max_seqlen_k: the longest sequence; None = read from cu_seqlens (waits for the GPU where a library asks for it).
        dropout: of the weights; not with `return_lse`.
        return_lse: also return L in fp32: [batch, heads, seq]; packed [heads, tokens]. On torch's path gradients flow through it.
        backend: flash-attn-2, flash-attn-3, flash-attn-4, transformer-engine, varlen, flex, torch, or auto.
    Returns:
        out of q's shape and dtype, or (out, L). In memory it is ordered as q is, so that `.flatten(2)` of what came as [seq, batch, heads, d] is a
        view (flash-attention's and Transformer Engine's results excepted).
    Raises:
        TypeError, ValueError: naming the argument. MissingBackend: the backend asked for is not here or cannot do this call.
    """
    packed = cu_seqlens_q is not None
    check_arguments("attention", q, k, v, mask, cu_seqlens_q, cu_seqlens_k, packed)
    if dropout and return_lse:
        raise ValueError("attention: dropout is on and return_lse too; parts with dropped weights cannot be joined")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"attention: dropout is {dropout}; it must be in [0, 1)")
    scale = scale if scale is not None else 1.0 / math.sqrt(q.shape[-1])
    name = serving(backend, q, packed=packed, mask=mask is not None, dropout=dropout > 0.0, return_lse=return_lse,
                   grad=backend == "flex" and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
    if not packed:
        if name != "torch" and q.numel() and k.numel():
            out, lse = libraries.dense(name, q, k, v, causal=causal, scale=scale, dropout=dropout, return_lse=return_lse)
        else:
            q, k, v = q.permute(1, 2, 0, 3), k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3)
            if return_lse or not q.numel() or not k.numel():
                out, lse = _attention(q, k, v, mask, None, None, causal, scale)
            else:
                out, lse = _sdpa(q, k, v, mask, causal, scale, dropout), None
            out = out.permute(2, 0, 1, 3)
        return (out, lse) if return_lse else out
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    if name == "torch" or not q.numel() or not k.numel():
        if dropout:
            return _packed_with_dropout(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, scale, dropout)
        out, lse = _attention(q, k, v, None, cu_seqlens_q, cu_seqlens_k, causal, scale)
    else:
        if q.is_cpu and not torch.compiler.is_compiling():  # flex, which trusts them as the libraries for GPUs do; looking costs nothing here
            _on_host("cu_seqlens_q", cu_seqlens_q, q), _on_host("cu_seqlens_k", cu_seqlens_k, k)
        longest = (_longest(cu_seqlens_q) if max_seqlen_q is None else max_seqlen_q, _longest(cu_seqlens_k) if max_seqlen_k is None else max_seqlen_k)
        out, lse = libraries.packed(name, q, k, v, cu_seqlens_q, cu_seqlens_k, *longest, causal=causal, scale=scale, dropout=dropout,
                                    return_lse=return_lse)
    return (out, lse) if return_lse else out


@outside_autocast
def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, dropout: float) -> Tensor:
    """torch's op, which `torch.compile` and autograd know: [batch, heads, seq, d]."""
    mask, causal = attention_torch.hidden_by(mask, causal, q.shape[2], k.shape[2], q.device)
    grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}  # a branch: a comparison of dynamic sizes is no bool to torch.compile
    return F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else ~mask, dropout_p=dropout, is_causal=causal, scale=scale, **grouped)


@outside_autocast
def _packed_with_dropout(q, k, v, cu_q, cu_k, causal, scale, dropout) -> Tensor:
    """A sequence at a time; torch keeps what it dropped."""
    parts, q_ends, k_ends = [], _on_host("cu_seqlens_q", cu_q, q), _on_host("cu_seqlens_k", cu_k, k)
    for q0, q1, k0, k1 in zip(q_ends[:-1], q_ends[1:], k_ends[:-1], k_ends[1:], strict=True):
        one = [x.transpose(0, 1)[None] for x in (q[q0:q1], k[k0:k1], v[k0:k1])]
        parts.append(_sdpa(*one, None, causal, scale, dropout)[0].transpose(0, 1))
    return torch.cat(parts) if parts else q * 0


def _longest(cu_seqlens: Tensor) -> int:
    return int(cu_seqlens.diff().max()) if cu_seqlens.numel() > 1 else 0


def check_arguments(op: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None, packed: bool) -> None:
    """What `attention` and its context-parallel forms check alike; `op` is named in the errors."""
    if not packed and cu_k is None and _dense_fits(q, k, v, mask):
        return
    layout = "[tokens, heads, d]" if packed else "[seq, batch, heads, d]"
    if q.dim() != (3 if packed else 4):
        raise ValueError(f"{op}: q has shape {tuple(q.shape)}; " + ("with" if packed else "without") + f" cu_seqlens_q it is {layout}")
    check_dtype(op, "q", q)
    if k.dim() != q.dim() or k.shape[-1] != q.shape[-1] or not packed and k.shape[1] != q.shape[1]:
        raise ValueError(f"{op}: k has shape {tuple(k.shape)}, q {tuple(q.shape)}; k is {layout.replace('heads', 'groups').replace('seq', 'keys')}"
                         " with q's d" + ("" if packed else " and batch"))
    if not k.shape[-2] or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"{op}: k has {k.shape[-2]} groups, which do not divide the {q.shape[-2]} heads of q")
    check_shape(op, "v", v, k.shape)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{op}: {name} is {x.dtype}, q is {q.dtype}; they must have one dtype")
        check_device(op, name, x, q.device)
        check_last_dense(op, name, x)
    if mask is not None:
        if packed:
            raise ValueError(f"{op}: mask is given and cu_seqlens_q too; cut the sequences in cu_seqlens_q, or pass dense tensors")
        if mask.dtype != torch.bool:
            raise TypeError(f"{op}: mask is {mask.dtype}; it must be bool, True where a key is hidden")
        check_device(op, "mask", mask, q.device)
        wanted = (q.shape[1], q.shape[2], q.shape[0], k.shape[0])
        if mask.dim() < 2 or mask.dim() > 4 or any(m not in (1, w) for m, w in zip(reversed(mask.shape), reversed(wanted))):
            raise ValueError(f"{op}: mask has shape {tuple(mask.shape)}, which does not broadcast to [batch, heads, seq, keys] = {wanted}")
    if cu_k is not None and not packed:
        raise ValueError(f"{op}: cu_seqlens_k is given without cu_seqlens_q")
    for name, cu in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        if cu is not None:
            if cu.dtype != torch.int32 or cu.dim() != 1 or not cu.numel():
                raise TypeError(f"{op}: {name} is {cu.dtype} of shape {tuple(cu.shape)}; it must be int32 [sequences + 1]")
            check_device(op, name, cu, q.device)
    if packed and (cu_q if cu_k is None else cu_k).shape != cu_q.shape:
        raise ValueError(f"{op}: cu_seqlens_k is for {cu_k.numel() - 1} sequences, cu_seqlens_q for {cu_q.numel() - 1}")
    if packed and cu_k is None and q.shape[0] != k.shape[0]:
        raise ValueError(f"{op}: k holds {k.shape[0]} tokens, q {q.shape[0]}; then cu_seqlens_k must say how they are cut")


def _dense_fits(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether dense tensors pass every check below, asked in a few microseconds: while decoding the checks would cost as much as the work."""
    if not q.dim() == k.dim() == v.dim() == 4:
        return False
    (queries, batch, heads, size), (keys, k_batch, groups, k_size) = q.shape, k.shape
    if not (v.shape == k.shape and k_batch == batch and k_size == size and groups and heads % groups == 0
            and q.dtype == k.dtype == v.dtype and q.dtype in FLOATS and q.device == k.device == v.device
            and (q.stride(3) == k.stride(3) == v.stride(3) == 1 or size == 1)):
        return False
    if mask is None:
        return True
    if mask.dim() != 4 or mask.dtype != torch.bool or mask.device != q.device:
        return False
    m_batch, m_heads, m_queries, m_keys = mask.shape
    return m_batch in (1, batch) and m_heads in (1, heads) and m_queries in (1, queries) and m_keys in (1, keys)


def cu_seqlens_of(documents: Tensor) -> Tensor:
    """cu_seqlens of a batch whose rows hold several documents, for its tokens in batch-major order (row after row).

    The shape of what comes back depends on the values, which costs one wait for the GPU; make it once for all layers.

    Args:
        documents: [batch, seq] int; a document is a run of equal numbers in a row, and ends with the row.
    Returns:
        int32 [documents + 1] on the same device.
    """
    if documents.dim() != 2:
        raise ValueError(f"cu_seqlens_of: documents has shape {tuple(documents.shape)}; it must be [batch, seq]")
    starts = torch.ones(documents.shape, dtype=torch.bool, device=documents.device)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return F.pad(starts.flatten().nonzero().flatten(), (0, 1), value=documents.numel()).int()
