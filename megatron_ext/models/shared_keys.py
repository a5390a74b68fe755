"""Fewer key/value heads than tensor-parallel ranks: multi-query attention (Shazeer 2019, arXiv 1911.02150; PaLM) at TP 2 and more.

The rows of the joined projection are dealt to the ranks evenly, wherever heads begin. What the ranks computed is gathered, each takes its own queries and
the key and value of their group, and on the way back the gradients of a key that several ranks used are added up. megatron-core does the same with a
global group; layouts are values here.
"""
from megatron.core.tensor_parallel import all_gather_last_dim_from_tensor_parallel_region
from torch import Tensor


class SharedKeys:
    """In front of megatron-core's self-attention."""

    def get_query_key_value_tensors(self, hidden_states: Tensor, *args, **kwargs) -> tuple[Tensor, ...]:
        """[seq (/ TP with sequence parallel), batch, hidden] -> queries [seq, batch, heads / TP, d], key and value [seq, batch, 1, d]."""
        groups, ranks = self.config.num_query_groups, self.tp_group.size()
        if groups >= ranks:
            return super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        joined = all_gather_last_dim_from_tensor_parallel_region(self.linear_qkv(hidden_states)[0], group=self.tp_group)
        joined = joined.unflatten(-1, (groups, -1, self.hidden_size_per_attention_head))
        own, place = divmod(self.tp_group.rank(), ranks // groups)
        heads = self.config.num_attention_heads // ranks
        q = joined[:, :, own, place * heads : (place + 1) * heads]
        k, v = joined[:, :, own, -2:-1], joined[:, :, own, -1:]
        if self.q_layernorm is not None:
            q, k = self.q_layernorm(q), self.k_layernorm(k)
        return q, k, v
