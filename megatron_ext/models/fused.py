"""The transformer layer on our kernels: norms with the residual added in the same pass, rotary positions of queries and keys in one
launch, the activation with its gate, attention of packed documents.

The parallel linear layers, the split of heads over tensor-parallel ranks and the layout of weights are megatron-core's: each class here is
one of its modules with another `forward`, so that `fused` and `plain` layers have the same parameters and the same checkpoints.
Which backend serves an op stands in `config.kernels` (`LayerConfig`); Triton on GPUs and torch on CPU by default.
"""
import copy
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from kernels.bias_gelu import bias_gelu
from kernels.geglu import geglu
from kernels.layer_norm import layer_norm
from kernels.rms_norm import rms_norm
from kernels.rope import rope
from kernels.swiglu import swiglu
from megatron_ext.models.norm import Norm
from megatron_ext.models.shared_keys import SharedKeys


class FusedNorm(Norm):
    """RMSNorm or LayerNorm; with a residual, of the sum."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__(config, hidden_size, eps)
        self.backend = config.kernels.rms_norm if self.rms else config.kernels.layer_norm

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """[..., hidden] -> [..., hidden]; with `residual`: (norm of x + residual, x + residual)."""
        if self.rms:
            return rms_norm(x, self.weight, eps=self.eps, residual=residual, backend=self.backend)
        return layer_norm(x, self.weight, self.bias, eps=self.eps, residual=residual, backend=self.backend)


class HeadNorm(FusedNorm):
    """Of each head's queries or keys: views of the joined projection, whose rows the kernels want one after the other."""

    def forward(self, x: Tensor, residual: None = None) -> Tensor:
        """[seq, batch, heads, d] -> the same."""
        return super().forward(x.contiguous())


def activation(name: str, kernels) -> Callable[[Tensor, Tensor | None], Tensor]:
    """`model.activation` as a function of the first projection [..., 2 ffn] or [..., ffn] and its bias (or None)."""

    def gated(function: Callable, backend: str) -> Callable:
        return lambda x, bias: function(x if bias is None else x + bias, backend=backend)

    return {
        "swiglu": gated(swiglu, kernels.swiglu),
        "geglu": gated(geglu, kernels.geglu),
        "geglu_tanh": gated(functools.partial(geglu, approximate="tanh"), kernels.geglu),
        "gelu": lambda x, bias: bias_gelu(x, bias, backend=kernels.bias_gelu),
        "gelu_tanh": lambda x, bias: bias_gelu(x, bias, approximate="tanh", backend=kernels.bias_gelu),
        "relu": lambda x, bias: F.relu(x if bias is None else x + bias),
    }[name]


class OwnBias:
    """In front of an attention: whether its output has a bias is its own matter, where megatron-core has one word for it and for the MLP."""

    def __init__(self, config, *args, **kwargs):
        own = config
        if config.proj_bias != config.add_bias_linear:
            own = copy.copy(config)
            own.add_bias_linear = config.proj_bias
        super().__init__(own, *args, **kwargs)
        self.config = config


class PlainSelfAttention(OwnBias, SharedKeys, SelfAttention):
    """megatron-core's self-attention."""


class FusedSelfAttention(OwnBias, SharedKeys, SelfAttention):
    """megatron-core's self-attention with our rotary kernel. `rotary_pos_emb` holds cosines and sines, [2, seq, batch or 1, rotated / 2]."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, rotary_pos_emb: Tensor | None = None,
                packed_seq_params=None, attention_bias: Tensor | None = None, needed: Tensor | None = None, **_) -> tuple[Tensor, Tensor | None]:
        """[seq, batch, hidden] -> ([seq, batch, hidden], bias that is not yet added or None); with `needed` [n] as `rows` of that, [n, 1, hidden].
        attention_bias: [1, heads / TP, seq, seq], added to the scores."""
        q, k, v = self.get_query_key_value_tensors(hidden_states)[:3]
        if rotary_pos_emb is not None:
            q, k = rope(q, k, rotary_pos_emb[0], rotary_pos_emb[1], interleaved=self.config.rotary_interleaved,
                        backend=self.config.kernels.rope)

        def core(q, k, v, bias):
            return self.core_attention(q, k, v, attention_mask, packed_seq_params=packed_seq_params, attention_bias=bias)

        inputs = q, k, v, attention_bias
        attended = tensor_parallel.checkpoint(core, False, *inputs) if self.checkpoint_core_attention and self.training else core(*inputs)
        return self.linear_proj(attended if needed is None else rows(attended, needed))


def rows(x: Tensor, index: Tensor) -> Tensor:
    """[seq, batch, hidden] -> [n, 1, hidden]: of the tokens `index` [n], numbered position x batch + row."""
    return x.flatten(0, 1).index_select(0, index).unsqueeze(1)


class FusedLayer(TransformerLayer):
    """Pre-norm layer; the sum after attention is made by the norm before the MLP, which reads it anyway.

    Attributes:
        needed: of the last layer, while a head reads some tokens only: their numbers [n] (see `rows`). The others give their keys and values; their
            part of the projection and of the MLP, three quarters of a layer, would be computed for nobody.
    """

    needed: Tensor | None = None

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.activate = activation(config.activation, config.kernels)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, rotary_pos_emb: Tensor | None = None,
                packed_seq_params=None, **_) -> tuple[Tensor, None]:
        """[seq, batch, hidden] -> ([seq, batch, hidden], None), or ([n, 1, hidden], None) of the tokens needed."""
        attended = self.self_attention(self.input_layernorm(hidden_states), attention_mask, rotary_pos_emb=rotary_pos_emb,
                                       packed_seq_params=packed_seq_params, needed=self.needed)
        if self.needed is not None:
            hidden_states = rows(hidden_states, self.needed)
        normed, residual = self.pre_mlp_layernorm(self._dropped(*attended), residual=hidden_states)
        return residual + self._feed_forward(normed), None

    def _feed_forward(self, x: Tensor) -> Tensor:
        """megatron-core's MLP: its two projections, with the bias and the activation between them in one pass."""
        return self._dropped(*self.mlp.linear_fc2(self.activate(*self.mlp.linear_fc1(x))))

    def _dropped(self, x: Tensor, bias: Tensor | None) -> Tensor:
        x = x if bias is None else x + bias
        return F.dropout(x, self.hidden_dropout, self.training) if self.hidden_dropout else x


def rotary_tables(positions: Tensor, inverse: Tensor) -> Tensor:
    """Cosines and sines [2, seq, batch or 1, rotated / 2] fp32 of positions [seq, batch or 1]: one tensor, as recomputation wants it."""
    from kernels.rope import rope_tables

    return torch.stack(rope_tables(positions, inverse))
