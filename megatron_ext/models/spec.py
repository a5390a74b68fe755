"""What all kinds of layers have in common: megatron-core's description of a transformer layer, with the modules that differ left open."""
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_ext.models.attention import CoreAttention


def layer_spec(layer: type, attention: type, norm: type, column: type, row: type, names: dict[str, str] | None = None, *,
               head_norm: type = IdentityOp, one_norm: bool = False, causal: bool = True) -> ModuleSpec:
    """A layer.

    Args:
        layer, attention: the modules whose forward passes they are; norm: before attention and before the MLP.
        column, row: the parallel linear layers into and out of each of the two.
        names: prefixes of parameters -> their prefixes in a checkpoint, where the modules call them otherwise.
        head_norm: of each head's queries and keys. one_norm: there is none before the MLP.
        causal: a token sees those before it and itself; False: all of the sequence.
    """
    return ModuleSpec(
        module=layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=attention,
                params={"attn_mask_type": AttnMaskType.causal if causal else AttnMaskType.no_mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=column, core_attention=CoreAttention, linear_proj=row, q_layernorm=head_norm, k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=IdentityOp if one_norm else norm,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row)),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=names or {},
        ),
    )
