"""Of what a layer is made, and megatron-core's configuration of it: the one place where `ModelConfig` meets `TransformerConfig`."""
import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_ext.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_ext.config.sizes import ffn_size, head_dim, query_groups
from megatron_ext.models.attention import CoreAttention
from megatron_ext.models.norm import Norm


def _gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


# activation -> (function, gated)
ACTIVATIONS = {
    "gelu": (F.gelu, False),
    "gelu_tanh": (_gelu_tanh, False),
    "relu": (F.relu, False),
    "swiglu": (F.silu, True),
    "geglu": (F.gelu, True),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def transformer_config(model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig, *, on_cpu: bool) -> TransformerConfig:
    """megatron-core's configuration of a decoder in a layout."""
    activation, gated = ACTIVATIONS[model.activation]
    dtype = DTYPES[precision.dtype]
    recompute = {}
    if parallel.recompute == "selective":
        recompute = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    elif parallel.recompute == "full":
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": parallel.recompute_layers}
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=query_groups(model),
        kv_channels=head_dim(model),
        ffn_hidden_size=ffn_size(model),
        normalization={"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}[model.norm],
        layernorm_epsilon=model.norm_eps,
        activation_func=activation,
        gated_linear_unit=gated,
        add_bias_linear=model.bias,
        add_qkv_bias=model.qkv_bias,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        rotary_interleaved=model.rotary_interleaved,
        init_method_std=model.init_std,
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
        # Fusions that need CUDA extensions or scripted kernels; kernels/ will take their place.
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        **recompute,
    )


def block_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    """The layers of one stage, and the norm after the last."""
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=CoreAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=IdentityOp,
            k_layernorm=IdentityOp,
        ),
    )
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=Norm,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    chunks = config.pipeline_model_parallel_size * (config.virtual_pipeline_model_parallel_size or 1)
    return TransformerBlockSubmodules(layer_specs=[layer] * (config.num_layers // chunks), layer_norm=Norm)
