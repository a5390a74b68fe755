"""The core of attention, softmax(q k^T / sqrt(d)) v, on torch's scaled_dot_product_attention.

It stands where megatron-core's `SelfAttention` keeps `core_attention`: projections, heads over tensor-parallel ranks and rotary positions
are megatron-core's; grouped key/value heads arrive unexpanded. While decoding it owns the cache of its layer: keys are stored with their
rotary position applied, at the row's own position, so that rows of unequal length lie in one batch without padding on the left.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


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

    Without a mask it is causal. A boolean mask is broadcast to [batch, heads, query, key]; True hides, as in megatron-core.
    """

    def __init__(self, config, layer_number: int, attn_mask_type, softmax_scale=None, pg_collection=None, **_):
        super().__init__(config=config)
        self.tp_group = pg_collection.tp  # else megatron-core looks for a global one when it makes the sharded state dict
        self.layer_number, self.mask_type = layer_number, attn_mask_type
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.dropout = config.attention_dropout
        self.cache: LayerCache | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None = None, /, **_) -> Tensor:
        """q [query, batch, heads, head_dim], k and v [key, batch, groups, head_dim] -> [query, batch, heads * head_dim]."""
        queries, batch = q.shape[:2]
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        if self.cache is not None:
            k, v = self.cache.append(k, v)
        causal = attention_mask is None and self.mask_type == AttnMaskType.causal
        if causal and q.shape[2] != k.shape[2]:
            raise ValueError("a cache needs an explicit mask: the rows' own positions decide what they see")
        out = F.scaled_dot_product_attention(
            q, k, v,
            attn_mask=None if attention_mask is None else ~attention_mask,
            is_causal=causal,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out.permute(2, 0, 1, 3).reshape(queries, batch, -1)


def document_mask(documents: Tensor) -> Tensor:
    """The causal mask that also hides other documents.

    Args:
        documents: [batch, seq], the document that each token belongs to.
    Returns:
        [batch, 1, seq, seq] bool, True where the query (row) must not see the key (column).
    """
    length = documents.shape[1]
    later = torch.ones(length, length, dtype=torch.bool, device=documents.device).triu(1)
    return (later | (documents[:, :, None] != documents[:, None, :]))[:, None]
