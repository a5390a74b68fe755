"""Layers on NVIDIA's Transformer Engine: its linear layers (the norm fused into those that follow one) and its FP8 recipes.

Rotary positions, attention and the activation are ours, as in the `fused` layers; parameters keep the names of the other kinds of layers, so that
checkpoints go both ways. Written against Transformer Engine's and megatron-core's sources; it has not been executed yet, for want of a GPU.
"""
from importlib.util import find_spec

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from kernels.backend import default_device
from megatron_ext.config.schema import PrecisionConfig
from megatron_ext.errors import UserError
from megatron_ext.models.fused import FusedLayer, FusedSelfAttention
from megatron_ext.models.spec import layer_spec

INSTALL = "pip install --no-build-isolation 'transformer-engine[pytorch]'"
# megatron-core calls our `current` tensorwise.
RECIPES = {"delayed": "delayed", "current": "tensorwise", "blockwise": "blockwise", "mxfp8": "mxfp8"}
# The gain of a norm lies in the linear layer that follows it; a checkpoint has it under the norm's own name.
NORM_NAMES = {"self_attention.linear_qkv.layer_norm_": "input_layernorm.", "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm."}


def missing() -> str | None:
    """None where Transformer Engine can serve; else why not."""
    if find_spec("transformer_engine") is None:
        return "transformer_engine is not installed"
    return None if default_device() == "cuda" else "transformer_engine needs a GPU, and torch sees none"


def fp8_settings(precision: PrecisionConfig) -> dict[str, object]:
    """megatron-core's settings of Transformer Engine's FP8."""
    if precision.fp8 is None:
        return {}
    edge = precision.fp8_edge_layers
    return {
        "fp8": precision.fp8_format, "fp8_recipe": RECIPES[precision.fp8], "fp8_margin": precision.fp8_margin,
        "fp8_amax_history_len": precision.fp8_history, "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": edge > 0, "num_layers_at_start_in_bf16": edge, "num_layers_at_end_in_bf16": edge,
    }


class TransformerEngineLayer(FusedLayer):
    """The norms lie in the linear layers, so the sum after attention is a pass of its own."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, rotary_pos_emb: Tensor | None = None,
                packed_seq_params=None, **_) -> tuple[Tensor, None]:
        """[seq, batch, hidden] -> ([seq, batch, hidden], None)."""
        residual = hidden_states + self._dropped(*self.self_attention(hidden_states, attention_mask, rotary_pos_emb=rotary_pos_emb,
                                                                      packed_seq_params=packed_seq_params))
        return residual + self._dropped(*self.mlp.linear_fc2(self.activate(*self.mlp.linear_fc1(residual)))), None


def te_layer(config, layer: int) -> ModuleSpec:
    """The layer (megatron-core says which of them have FP8). Raises UserError where Transformer Engine cannot serve."""
    reason = missing()
    if reason is not None:
        if config.kernels.layers != "te":
            raise UserError("precision.fp8", config.fp8_precision.fp8, f"comes from Transformer Engine alone: {reason}; install it with: {INSTALL}")
        raise UserError("kernels.layers", "te", f"{reason}; install it with: {INSTALL}, or leave it to kernels.layers=auto")
    from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear, TERowParallelLinear

    return layer_spec(TransformerEngineLayer, FusedSelfAttention, IdentityOp, TELayerNormColumnParallelLinear, TERowParallelLinear, NORM_NAMES)
