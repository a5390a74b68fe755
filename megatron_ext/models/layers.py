"""Of what a layer is made, and megatron-core's configuration of it: the one place where `ModelConfig` meets `TransformerConfig`.

Four kinds of layers, with the same parameters and the same checkpoints: `fused` (our kernels), `plain` (torch and megatron-core alone),
`te` (Transformer Engine, with its FP8 recipes), `fp8` (fused, with our FP8 linear layers).
"""
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from kernels.fp8_scaling import Fp8Recipe
from megatron_ext.config.schema import KernelsConfig, ModelConfig, ParallelConfig, PrecisionConfig
from megatron_ext.config.sizes import biases, ffn_size, head_dim, layers, query_groups
from megatron_ext.models.blocks import BLOCKS
from megatron_ext.models.fp8 import fp8_linears, is_edge
from megatron_ext.models.fused import FusedNorm, FusedSelfAttention, HeadNorm, PlainSelfAttention
from megatron_ext.models.norm import Norm
from megatron_ext.models.spec import layer_spec
from megatron_ext.models.te import fp8_settings, te_layer
from megatron_ext.models.te import missing as transformer_engine_missing


def _gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


# activation -> (function, gated)
ACTIVATIONS = {
    "gelu": (F.gelu, False),
    "gelu_tanh": (_gelu_tanh, False),
    "relu": (F.relu, False),
    "swiglu": (F.silu, True),
    "geglu": (F.gelu, True),
    "geglu_tanh": (_gelu_tanh, True),
}
DEFAULTS = KernelsConfig()
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class LayerConfig(TransformerConfig):
    """megatron-core's configuration, and what our modules ask beside it (they are handed nothing else)."""

    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    layers: str = "fused"
    activation: str = "swiglu"
    block: str = "serial"
    proj_bias: bool = False
    cp_method: str = "ring"
    causal: bool = True  # of self-attention
    fp8_precision: PrecisionConfig = field(default_factory=PrecisionConfig)


def layers_kind(kernels: KernelsConfig, precision: PrecisionConfig, parallel: ParallelConfig, model: ModelConfig) -> str:
    """`kernels.layers` with auto resolved: fused, te, fp8 or plain."""
    if kernels.layers != "auto":
        return kernels.layers
    if precision.fp8 is None:
        return "fused"
    if model.block != "serial" or model.qk_norm:
        return "fp8"
    # What te cannot do with delayed scaling, ours can (config/precision.py).
    ours = precision.fp8 == "delayed" and (parallel.pp > 1 or precision.fp8_edge_layers > 0)
    return "te" if precision.fp8 == "mxfp8" or not ours and transformer_engine_missing() is None else "fp8"


def transformer_config(model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig, kernels: KernelsConfig = DEFAULTS, *,
                       on_cpu: bool, accumulate: bool = False) -> LayerConfig:
    """megatron-core's configuration of a model in a layout.

    Args:
        accumulate: weight gradients are added straight into the main gradients, which must then exist (`DistributedDataParallel`).
    """
    activation, gated = ACTIVATIONS[model.activation]
    dtype = DTYPES[precision.dtype]
    recompute = {}
    if parallel.recompute == "selective":
        recompute = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    elif parallel.recompute == "full":
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": parallel.recompute_layers}
    kind = layers_kind(kernels, precision, parallel, model)
    qkv_bias, proj_bias, mlp_bias = biases(model)
    return LayerConfig(
        kernels=kernels,
        layers=kind,
        fp8_precision=precision,
        activation=model.activation,
        block=model.block,
        proj_bias=proj_bias,
        qk_layernorm=model.qk_norm,
        cp_method=parallel.cp_method,
        causal=model.family == "decoder",
        num_layers=layers(model),
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=query_groups(model),
        kv_channels=head_dim(model),
        ffn_hidden_size=ffn_size(model),
        normalization={"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}[model.norm],
        layernorm_epsilon=model.norm_eps,
        activation_func=activation,
        gated_linear_unit=gated,
        add_bias_linear=mlp_bias,  # attention's output has a word of its own (fused.OwnBias)
        add_qkv_bias=qkv_bias,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        rotary_interleaved=model.rotary_interleaved,
        init_method_std=model.init_std,
        softmax_scale=model.attention_scale,
        perform_initialization=False,  # models/initialise.py draws the weights, the same for every layout
        use_cpu_initialization=on_cpu,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision.dtype == "bf16",
        fp16=precision.dtype == "fp16",
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp,
        context_parallel_size=parallel.cp,
        sequence_parallel=parallel.sp,
        calculate_per_token_loss=True,  # gradients are divided by the tokens of the global batch, however it is cut
        # gloo sends from the tensor's own memory while the next micro-batch runs; NCCL keeps what it still needs.
        deallocate_pipeline_outputs=not on_cpu,
        # Of two stages each is the other's next and previous: batched sends of the interleaved schedule would be taken for each other.
        overlap_p2p_comm=parallel.vpp is not None,
        batch_p2p_comm=parallel.vpp is None,
        gradient_accumulation_fusion=accumulate and kind != "plain",
        # megatron-core's own fusions, for which it needs CUDA extensions or scripted kernels: kernels/ stands in their place.
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        **recompute,
        **(fp8_settings(precision) if kind == "te" else {}),
    )


def block_spec(config: LayerConfig, stage: int = 0) -> TransformerBlockSubmodules:
    """The layers of one stage, and the norm after the last.

    Args:
        stage: number of this model chunk in the order of the layers, from 0.
    """
    count = config.num_layers // (config.pipeline_model_parallel_size * (config.virtual_pipeline_model_parallel_size or 1))
    made = {"plain": plain_layer, "fused": fused_layer, "te": te_layer, "fp8": fp8_layer}[config.layers]
    layers = [made(config, layer) for layer in range(stage * count, (stage + 1) * count)]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=Norm if config.layers == "plain" else FusedNorm)


def _spec(config: LayerConfig, fused: bool, column: type, row: type) -> ModuleSpec:
    attention, norm, head_norm = (FusedSelfAttention, FusedNorm, HeadNorm) if fused else (PlainSelfAttention, Norm, Norm)
    return layer_spec(BLOCKS[config.block][fused], attention, norm, column, row, head_norm=head_norm if config.qk_layernorm else IdentityOp,
                      one_norm=config.block == "parallel_one_norm", causal=config.causal)


def plain_layer(config: LayerConfig, layer: int) -> ModuleSpec:
    """megatron-core's layer with torch's operations: what the others are compared with."""
    return _spec(config, False, ColumnParallelLinear, RowParallelLinear)


def fused_layer(config: LayerConfig, layer: int) -> ModuleSpec:
    """The layer on `kernels/`."""
    return _spec(config, True, ColumnParallelLinear, RowParallelLinear)


def fp8_layer(config: LayerConfig, layer: int) -> ModuleSpec:
    """The fused layer with FP8 matrix products; the first and last `precision.fp8_edge_layers` stay in their own dtype."""
    precision = config.fp8_precision
    recipe = Fp8Recipe(kind=precision.fp8, format=precision.fp8_format, margin=precision.fp8_margin, history=precision.fp8_history)
    edge = is_edge(layer, config.num_layers, precision.fp8_edge_layers)
    return _spec(config, True, *fp8_linears(recipe, high_precision=edge, backend=config.kernels.fp8_linear))
