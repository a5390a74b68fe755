"""A part of a stack of layers, for models that have two of them: what one pipeline stage holds of an encoder, or of a decoder that looks at one.

megatron-core's `TransformerBlock` numbers its layers by the pipeline stage, and recomputes them without the gradient of a bias of the scores.

    pre-norm     y = x + A(n1 x),   z = y + C(n2 y, context),   z + M(n3 z)         T5; A self-attention, C cross-attention (decoders), M the MLP
    post-norm    y = n1(x + A x),   z = n2(y + C(y, context)),   n3(z + M z)         the Transformer; no norm after the last layer
"""
import contextlib
import copy
import functools

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.attention import CrossAttention, CrossAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_ext.models.attention import CoreAttention
from megatron_ext.models.fused import FusedLayer, FusedNorm, FusedSelfAttention
from megatron_ext.models.layers import LayerConfig
from megatron_ext.models.spec import layer_spec


class FusedCrossAttention(CrossAttention):
    """megatron-core's cross-attention: queries of the decoder, keys and values of all that the encoder gave."""

    def forward(self, hidden_states: Tensor, context: Tensor) -> tuple[Tensor, Tensor | None]:
        """[seq, batch, hidden], [keys, batch, hidden] -> ([seq, batch, hidden], bias that is not yet added or None)."""
        q, k, v = self.get_query_key_value_tensors(hidden_states, context)

        def core(q, k, v):
            return self.core_attention(q, k, v)

        return self.linear_proj(tensor_parallel.checkpoint(core, False, q, k, v) if self.checkpoint_core_attention and self.training else core(q, k, v))


class StackLayer(FusedLayer):
    """A layer with a bias of its scores, and in decoders cross-attention."""

    crosses = False

    def forward(self, hidden_states: Tensor, context: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """[seq, batch, hidden], context [keys, batch, hidden] -> [seq, batch, hidden]."""
        x = hidden_states
        if self.config.block == "post_norm":
            return self._post_norm(x, context, bias)
        y = self._dropped(*self.self_attention(self.input_layernorm(x), attention_bias=bias))
        if self.crosses:
            normed, x = self.pre_cross_attn_layernorm(y, residual=x)
            y = self._dropped(*self.cross_attention(normed, context))
        normed, x = self.pre_mlp_layernorm(y, residual=x)
        return x + self._feed_forward(normed)

    def _post_norm(self, x: Tensor, context: Tensor | None, bias: Tensor | None) -> Tensor:
        x = self.input_layernorm(self._dropped(*self.self_attention(x, attention_bias=bias)), residual=x)[0]
        if self.crosses:
            x = self.pre_cross_attn_layernorm(self._dropped(*self.cross_attention(x, context)), residual=x)[0]
        return self.pre_mlp_layernorm(self._feed_forward(x), residual=x)[0]


class CrossLayer(StackLayer):
    """Of a decoder."""

    crosses = True


def stack_layer(groups: ProcessGroupCollection, *, decoder: bool) -> ModuleSpec:
    """A layer of an encoder, which looks both ways, or of a decoder that looks at it too."""
    linear = ColumnParallelLinear, RowParallelLinear
    spec = layer_spec(CrossLayer if decoder else StackLayer, FusedSelfAttention, FusedNorm, *linear, causal=decoder)
    if decoder:
        of_keys = functools.partial(linear[0], tp_group=groups.tp)  # megatron-core's cross-attention leaves it to a global
        spec.submodules.pre_cross_attn_layernorm = FusedNorm
        spec.submodules.cross_attention = ModuleSpec(
            module=FusedCrossAttention, params={"attn_mask_type": AttnMaskType.no_mask},
            submodules=CrossAttentionSubmodules(linear_q=of_keys, linear_kv=of_keys, core_attention=CoreAttention, linear_proj=linear[1]),
        )
        spec.submodules.cross_attn_bda = get_bias_dropout_add
    return spec


class Stack(MegatronModule):
    """Layers `first` to `first + count` of a stack of `total`; the last one is followed by a norm, unless each layer ends with one.

    Args:
        decoder: causal, with cross-attention.
    """

    def __init__(self, config: LayerConfig, groups: ProcessGroupCollection, *, first: int, count: int, total: int, decoder: bool):
        super().__init__(config=config)
        one = copy.copy(config)
        one.pipeline_model_parallel_size, one.virtual_pipeline_model_parallel_size = 1, None  # the layers' numbers are given here
        self.first, self.total, self.groups = first, total, groups
        self.layers = torch.nn.ModuleList(
            build_module(stack_layer(groups, decoder=decoder), config=one, layer_number=first + i + 1, pg_collection=groups) for i in range(count)
        )
        self.final_layernorm = FusedNorm(config, config.hidden_size, config.layernorm_epsilon) if first + count == total and config.block != "post_norm" else None

    def forward(self, hidden: Tensor, context: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """[seq (/ TP with sequence parallel), batch, hidden] -> the same."""
        fork = get_cuda_rng_tracker().fork() if self.config.sequence_parallel else contextlib.nullcontext()
        with fork:  # ranks hold different tokens, and drop different numbers
            step = self.config.recompute_num_layers if self.config.recompute_granularity == "full" and self.training else 0
            if not step:
                hidden = _run(self.layers, hidden, context, bias)
            for start in range(0, len(self.layers) if step else 0, step or 1):
                part = self.layers[start : start + step]
                hidden = tensor_parallel.checkpoint(lambda *x, part=part: _run(part, *x), False, hidden, context, bias)
        return hidden if self.final_layernorm is None else self.final_layernorm(hidden)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """As megatron-core's `TransformerBlock`: one tensor for all layers, of which a layer is a slice."""
        state = {}
        for number, layer in enumerate(self.layers):
            own = f"{prefix}layers.{number}."
            part = layer.sharded_state_dict(own, [(0, self.first + number, self.total)], metadata)
            replace_prefix_for_sharding(part, own, f"{prefix}layers.")
            state |= part
        if self.final_layernorm is not None:
            state |= make_sharded_tensors_for_checkpoint(
                self.final_layernorm.state_dict(prefix="", keep_vars=True), f"{prefix}final_layernorm.", {}, (), tp_group=self.groups.tp,
                dp_cp_group=metadata["dp_cp_group"],
            )
        return state


def _run(layers, hidden: Tensor, context: Tensor | None, bias: Tensor | None) -> Tensor:
    for layer in layers:
        hidden = layer(hidden, context, bias)
    return hidden
