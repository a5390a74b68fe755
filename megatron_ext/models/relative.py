"""Relative positions as a bias of the scores (Raffel et al. 2019, arXiv 1910.10683, section 2.1), learnt for each head and shared by a stack's layers.

    score_ij = scale q_i . k_j + T[head, bucket(j - i)]

Near distances have a bucket each; from half of them on buckets grow with the logarithm of the distance, up to `relative_distance`, behind which all is
one. A stack that looks both ways has half of its buckets for what lies ahead (`_relative_position_bucket` of T5's code).
"""
import math
from types import MappingProxyType

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor

from megatron_ext.models.own import OwnParameters, matrix


def buckets(length: int, count: int, furthest: int, *, both_ways: bool, device: torch.device) -> Tensor:
    """int64 [length, length]: the bucket of key j (column) as query i (row) sees it."""
    places = torch.arange(length, device=device)
    ahead = places[None, :] - places[:, None]
    found = torch.zeros_like(ahead)
    if both_ways:
        count //= 2
        found, distance = (ahead > 0) * count, ahead.abs()
    else:
        distance = (-ahead).clamp(min=0)
    near = count // 2
    grown = near + (torch.log(distance.clamp(min=1).float() / near) / math.log(furthest / near) * (count - near)).long()
    return found + torch.where(distance < near, distance, grown.clamp(max=count - 1))


class RelativePositions(OwnParameters):
    """The table T of one stack, of this tensor-parallel rank's heads: [heads / TP, buckets]."""

    split = MappingProxyType({"weight": 0})

    def __init__(self, config, count: int, groups):
        super().__init__(config, groups.tp)
        self.weight = torch.nn.Parameter(matrix(config, config.num_attention_heads // groups.tp.size(), count))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self) -> Tensor:
        """A call, since hooks that wait for the newest weights hang on it."""
        return self.weight.clone()


def bias_of(table: Tensor, length: int, furthest: int, *, causal: bool) -> Tensor:
    """[1, heads, length, length] from a table [heads, buckets], in its dtype; with `causal` -inf where the key comes later."""
    index = buckets(length, table.shape[1], furthest, both_ways=not causal, device=table.device)
    bias = table[:, index]
    if causal:
        bias = bias.masked_fill(torch.ones(length, length, dtype=torch.bool, device=table.device).triu(1), -torch.inf)
    return bias[None]


def biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, scale: float, dropout: float) -> Tensor:
    """softmax(scale q k^T + bias) v by torch's op; the gradient of the bias too. q, k, v [seq or keys, batch, heads, d] -> [seq, batch, heads, d]."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale).permute(2, 0, 1, 3)
