"""Attention through flash-attention 2, 3 and 4, Transformer Engine, and torch's varlen and flex: their calls, and nothing else.

Signatures were read in the sources: flash_attn/flash_attn_interface.py (2.7 and later), hopper/flash_attn_interface.py (3),
flash_attn/cute/interface.py (4), transformer_engine/pytorch/attention/dot_product_attention (2.x), torch/nn/attention/varlen.py (2.13).
Apart from flex these need a GPU; they have been written and not yet executed (`kernels.backend`: executed=False).

Dense tensors are [seq, batch, heads, d] as everywhere outside; flash-attention wants [batch, seq, heads, d] of any strides with d dense, so
they go in as views. All of them align a causal mask to the bottom right and give 0 to a query that sees no key.
Log-sum-exp: [batch, heads, seq], packed [heads, tokens]; -inf where no key is seen (flash-attention 2 says +inf).
"""
from functools import cache

import torch
from torch import Tensor

FLASH = ("flash-attn-2", "flash-attn-3", "flash-attn-4")


def _lse(lse: Tensor) -> Tensor:
    return lse.masked_fill(lse == torch.inf, -torch.inf)


def dense(name: str, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, dropout: float,
          return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """(out [seq, batch, heads, d], log-sum-exp or None) of the library `name`."""
    if name == "transformer-engine":
        module = _te_module(q.shape[-2], q.shape[-1], k.shape[-2], scale, dropout)
        mask = "no_mask" if not causal else "causal" if q.shape[0] == k.shape[0] else "causal_bottom_right"
        return module(q, k, v, qkv_format="sbhd", attn_mask_type=mask).view(q.shape), None
    batched = [x.transpose(0, 1) for x in (q, k, v)]
    if name == "flash-attn-2":
        from flash_attn import flash_attn_func

        found = flash_attn_func(*batched, dropout_p=dropout, softmax_scale=scale, causal=causal, return_attn_probs=return_lse)
    elif name == "flash-attn-3":
        from flash_attn_interface import flash_attn_func

        found = flash_attn_func(*batched, softmax_scale=scale, causal=causal, **({"return_attn_probs": True} if return_lse else {}))
    else:
        from flash_attn.cute import flash_attn_func

        found = flash_attn_func(*batched, softmax_scale=scale, causal=causal, return_lse=return_lse)
    out, *rest = found if isinstance(found, tuple) else (found,)  # early releases of 3 return a pair whatever is asked
    return out.transpose(0, 1), _lse(rest[0]) if return_lse else None


def packed(name: str, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *, causal: bool, scale: float,
           dropout: float, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """(out [tokens, heads, d], log-sum-exp or None); `cu_q`, `cu_k` int32 on the GPU."""
    if name == "flex":
        return _flex(q, k, v, cu_q, cu_k, causal=causal, scale=scale, return_lse=return_lse)
    if name == "varlen":
        from torch.nn.attention.varlen import AuxRequest, varlen_attn

        found = varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=(-1, 0) if causal else (-1, -1),
                            enable_gqa=q.shape[1] != k.shape[1], return_aux=AuxRequest(lse=True) if return_lse else None)
    elif name == "transformer-engine":
        module = _te_module(q.shape[-2], q.shape[-1], k.shape[-2], scale, dropout)
        return module(q, k, v, qkv_format="thd", cu_seqlens_q=cu_q, cu_seqlens_kv=cu_k, max_seqlen_q=max_q, max_seqlen_kv=max_k,
                      attn_mask_type="padding_causal_bottom_right" if causal else "padding").view(q.shape), None
    elif name == "flash-attn-2":
        from flash_attn import flash_attn_varlen_func

        found = flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p=dropout, softmax_scale=scale, causal=causal,
                                       return_attn_probs=return_lse)
    elif name == "flash-attn-3":
        from flash_attn_interface import flash_attn_varlen_func

        found = flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=scale, causal=causal,
                                       **({"return_attn_probs": True} if return_lse else {}))
    else:
        from flash_attn.cute import flash_attn_varlen_func

        found = flash_attn_varlen_func(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=max_q, max_seqlen_k=max_k,
                                       softmax_scale=scale, causal=causal, return_lse=return_lse)
    out, *rest = found if isinstance(found, tuple) else (found,)
    return out, _lse(rest[0]) if return_lse else None


@cache
def _te_module(heads: int, head_size: int, groups: int, scale: float, dropout: float):
    """It has no weights; heads are those of this tensor-parallel rank, so that it is told of no group."""
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(heads, head_size, num_gqa_groups=groups, attention_dropout=dropout, softmax_scale=scale, attention_type="self")


# ---- flex ---------------------------------------------------------------------------------------------------------------------------


def _flex(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *, causal: bool, scale: float, return_lse: bool):
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask

    if not torch.is_grad_enabled():
        q, k, v = q.detach(), k.detach(), v.detach()  # on CPU it looks at requires_grad alone
    document_q, document_k = documents_of(cu_q, q.shape[0]), documents_of(cu_k, k.shape[0])
    ends_q, ends_k = cu_q[1:].long(), cu_k[1:].long()

    def sees(batch, head, query, key):
        together = document_q[query] == document_k[key]
        if not causal:
            return together
        left_q, left_k = ends_q[document_q[query]] - query, ends_k[document_k[key]] - key  # counted from the end: bottom right
        return together & (left_k >= left_q)

    mask = create_block_mask(sees, None, None, q.shape[0], k.shape[0], device=q.device, BLOCK_SIZE=128)
    found = _flex_function(q.device.type)(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=True) if return_lse else None)
    out, lse = (found[0], found[1].lse[0]) if return_lse else (found, None)
    return out[0].transpose(0, 1), lse


@cache
def _flex_function(device: str):
    """Compiled, it skips the blocks that are hidden; on CPU its backward exists unfused only, which serves tests."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention


def documents_of(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """[tokens] int64: the sequence that each packed token belongs to."""
    return torch.searchsorted(cu_seqlens[1:].contiguous(), torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype), right=True)


# ---- parts of the keys: forward with log-sum-exp, backward from it (ring attention) ------------------------------------------------


def part_forward(name: str, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, max_q: int, max_k: int, *,
                 causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """flash-attention's forward outside autograd: q [batch, seq, heads, d], or packed [tokens, heads, d] with cu_q, cu_k."""
    if name == "flash-attn-2":
        from flash_attn.flash_attn_interface import _flash_attn_forward, _flash_attn_varlen_forward

        options = {"dropout_p": 0.0, "softmax_scale": scale, "causal": causal, "window_size_left": -1, "window_size_right": -1, "softcap": 0.0,
                   "alibi_slopes": None, "return_softmax": False}
        if cu_q is None:
            out, lse = _flash_attn_forward(q, k, v, **options)[:2]
        else:
            out, lse = _flash_attn_varlen_forward(q, k, v, cu_q, cu_k, max_q, max_k, **options)[:2]
    elif name == "flash-attn-3":
        from flash_attn_interface import _flash_attn_forward

        packed = {} if cu_q is None else {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": max_q, "max_seqlen_k": max_k}
        out, lse = _flash_attn_forward(q, k, v, softmax_scale=scale, causal=causal, **packed)[:2]
    else:
        from flash_attn.cute.interface import _flash_attn_fwd

        packed = {} if cu_q is None else {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": max_q, "max_seqlen_k": max_k}
        out, lse = _flash_attn_fwd(q, k, v, softmax_scale=scale, causal=causal, return_lse=True, **packed)[:2]
    return out, _lse(lse)


def part_backward(name: str, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor | None, cu_k: Tensor | None,
                  max_q: int, max_k: int, *, causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of these keys, from the output and log-sum-exp of all keys; flash-attention's deterministic backward."""
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    lse = lse.contiguous()
    if name == "flash-attn-2":
        from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_varlen_backward

        options = {"dropout_p": 0.0, "softmax_scale": scale, "causal": causal, "window_size_left": -1, "window_size_right": -1, "softcap": 0.0,
                   "alibi_slopes": None, "deterministic": True}
        if cu_q is None:
            _flash_attn_backward(dout, q, k, v, out, lse, *grads, **options)
        else:
            _flash_attn_varlen_backward(dout, q, k, v, out, lse, *grads, cu_q, cu_k, max_q, max_k, **options)
        return tuple(grads)
    packed = {} if cu_q is None else {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": max_q, "max_seqlen_k": max_k}
    if name == "flash-attn-3":
        from flash_attn_interface import _flash_attn_backward

        _flash_attn_backward(dout, q, k, v, out, lse, dq=grads[0], dk=grads[1], dv=grads[2], softmax_scale=scale, is_causal=causal,
                             deterministic=True, **packed)
        return tuple(grads)
    from flash_attn.cute.interface import _flash_attn_bwd

    return tuple(_flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=scale, causal=causal, deterministic=True, **packed)[:3])
