"""The core of attention, softmax(q k^T / sqrt(d)) v, on `kernels.attention`: dense, packed documents, over context-parallel ranks.

It stands where megatron-core's `SelfAttention` keeps `core_attention`: projections, heads over tensor-parallel ranks and rotary positions
are megatron-core's; grouped key/value heads arrive unexpanded. While decoding it owns the cache of its layer: keys are stored with their
rotary position applied, at the row's own position, so that rows of unequal length lie in one batch without padding on the left.
"""
import math
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from kernels.attention import attention, cu_seqlens_of
from kernels.context_parallel import ring_attention, ulysses_attention
from kernels.gather_attention import gather_attention
from megatron_ext.models.relative import biased_attention


@dataclass
class LayerCache:
    """Keys and values of one layer, [batch, groups, max_len, head_dim] each; `positions` [batch, new] says where the next ones go."""

    keys: Tensor
    values: Tensor
    positions: Tensor | None = None
    length: int = 0  # keys beyond this are not looked at: the longest row so far
    start: int | None = None  # the next ones go to columns [start, length) in every row: a copy instead of a scatter

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k, v [batch, groups, new, head_dim] at `positions`; returns views of all keys and values up to `length`."""
        if self.start is not None:
            self.keys[:, :, self.start : self.length].copy_(k)
            self.values[:, :, self.start : self.length].copy_(v)
        else:
            index = self.positions[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
            self.keys.scatter_(2, index, k)
            self.values.scatter_(2, index, v)
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class CoreAttention(MegatronModule):
    """Attention over the heads of this tensor-parallel rank.

    Without a mask it is causal, or over the whole sequence in the layers of encoders. A boolean mask is broadcast to [batch, heads, query, key]; True hides, as in megatron-core.
    """

    def __init__(self, config, layer_number: int, attn_mask_type, softmax_scale=None, pg_collection=None, **_):
        super().__init__(config=config)
        self.tp_group = pg_collection.tp  # else megatron-core looks for a global one when it makes the sharded state dict
        self.cp_group = pg_collection.cp
        self.layer_number, self.mask_type = layer_number, attn_mask_type
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.dropout = config.attention_dropout
        self.cache: LayerCache | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None = None, /, *,
                packed_seq_params: PackedSeqParams | None = None, attention_bias: Tensor | None = None, **_) -> Tensor:
        """q [query, batch, heads, head_dim], k and v [key, batch, groups, head_dim] -> [query, batch, heads * head_dim].

        packed_seq_params: of `pack`; with context parallelism the documents of whole sequences, else of q's tokens.
        attention_bias: [1, heads, query, key], added to the scores; it also says what is hidden (-inf).
        """
        queries, batch = q.shape[:2]
        causal = attention_mask is None and self.mask_type == AttnMaskType.causal
        options = {"causal": causal, "scale": self.scale, "backend": self.config.kernels.attention}
        masked = attention_mask is not None or self.cp_group.size() > 1 and packed_seq_params is not None
        if masked and options["backend"] != "torch":
            options["backend"] = "auto"  # the libraries take no mask: decoding and gathered documents are served by what does
        if self.cache is not None:
            k, v = (x.permute(2, 0, 1, 3) for x in self.cache.append(k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3)))
            if causal and q.shape[0] != k.shape[0]:
                raise ValueError("a cache needs an explicit mask: the rows' own positions decide what they see")
        if self.dropout and self.training and not self.config.sequence_parallel:
            # Ranks of a tensor-parallel group hold different heads, and must drop different weights; with sequence parallelism the block forks already.
            with get_cuda_rng_tracker().fork():
                out = self._attend(q, k, v, attention_mask, packed_seq_params, attention_bias, options)
        else:
            out = self._attend(q, k, v, attention_mask, packed_seq_params, attention_bias, options)
        return out.reshape(queries, batch, -1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, packed_seq_params: PackedSeqParams | None,
                attention_bias: Tensor | None, options: dict) -> Tensor:
        """[query, batch, heads, head_dim]."""
        queries, batch = q.shape[:2]
        if attention_bias is not None:
            return biased_attention(q, k, v, attention_bias, scale=self.scale, dropout=self.dropout if self.training else 0.0)
        if self.cp_group.size() > 1:
            if attention_mask is not None:
                raise ValueError("context parallelism takes documents (packed_seq_params), not a mask: a rank holds part of the rows only")
            return self._context_parallel(q, k, v, packed_seq_params, options)
        if packed_seq_params is not None:
            cu_seqlens, longest = packed_seq_params.cu_seqlens_q, packed_seq_params.max_seqlen_q
            # Documents are runs of tokens in a row of the batch, so the rows have to lie one after the other.
            q, k, v = (x.transpose(0, 1).reshape(-1, *x.shape[2:]) for x in (q, k, v))
            out = attention(q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=longest, max_seqlen_k=longest,
                            dropout=self.dropout if self.training else 0.0, **options)
            return out.view(batch, queries, *out.shape[1:]).transpose(0, 1)
        return attention(q, k, v, mask=attention_mask, dropout=self.dropout if self.training else 0.0, **options)

    def _context_parallel(self, q: Tensor, k: Tensor, v: Tensor, packed: PackedSeqParams | None, options: dict) -> Tensor:
        if packed is not None:  # documents of any length end anywhere in a rank's chunks
            return gather_attention(q, k, v, group=self.cp_group, documents=packed.documents, **options)
        method = {"ring": ring_attention, "ulysses": ulysses_attention, "gather": gather_attention}[self.config.cp_method]
        return method(q, k, v, group=self.cp_group, **options)


@dataclass
class Documents(PackedSeqParams):
    """megatron-core's description of packed sequences, and `documents` [batch, seq]: the document that each token belongs to."""

    documents: Tensor | None = None


def pack(documents: Tensor) -> Documents:
    """What the layers take to keep documents apart.

    Args:
        documents: [batch, seq] int, the document of each token; a document is a run of tokens in its row.
    """
    cu_seqlens = cu_seqlens_of(documents)
    # A bound without looking at the data: no document is longer than a row.
    return Documents(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=documents.shape[1],
                     max_seqlen_kv=documents.shape[1], documents=documents)


def document_mask(documents: Tensor, *, causal: bool = True) -> Tensor:
    """The mask that hides other documents, and what comes later.

    Args:
        documents: [batch, seq], the document that each token belongs to.
        causal: False leaves what comes later in the same document.
    Returns:
        [batch, 1, seq, seq] bool, True where the query (row) must not see the key (column).
    """
    length = documents.shape[1]
    others = documents[:, :, None] != documents[:, None, :]
    if causal:
        others = others | torch.ones(length, length, dtype=torch.bool, device=documents.device).triu(1)
    return others[:, None]
