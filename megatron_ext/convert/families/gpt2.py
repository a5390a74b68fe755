"""GPT-2 (Radford et al. 2019): LayerNorm, learned positions, biases everywhere, tied words; its weights lie [in, out] (transformers' Conv1D)."""
from collections.abc import Mapping

from megatron_ext.config import sizes
from megatron_ext.config.schema import ModelConfig
from megatron_ext.convert.family import Family, Line, linear, norm
from megatron_ext.convert.forms import BLOCKS, SAME, TRANSPOSED, TRANSPOSED_BLOCKS
from megatron_ext.convert.ours import HEAD, LAST_NORM, POSITIONS, WORDS
from megatron_ext.convert.settings import Settings

LAYER = "h.{layer}."
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
LINES = (
    Line.of(WORDS, "wte.weight"),
    Line.of(POSITIONS, "wpe.weight"),
    *norm("input_layernorm", LAYER + "ln_1"),
    *linear("self_attention.linear_qkv", LAYER + "attn.c_attn", form=TRANSPOSED_BLOCKS, bias=BLOCKS),
    *linear("self_attention.linear_proj", LAYER + "attn.c_proj", form=TRANSPOSED, bias=SAME),
    *norm("pre_mlp_layernorm", LAYER + "ln_2"),
    *linear("mlp.linear_fc1", LAYER + "mlp.c_fc", form=TRANSPOSED, bias=SAME),
    *linear("mlp.linear_fc2", LAYER + "mlp.c_proj", form=TRANSPOSED, bias=SAME),
    *norm(LAST_NORM, "ln_f"),
    Line.of(HEAD, "lm_head.weight"),
)


def read_dropout(settings: Settings) -> dict[str, float]:
    """`resid_pdrop` and `embd_pdrop` are one number here."""
    dropout = settings.number("resid_pdrop", 0.0)
    settings.ignore("embd_pdrop")
    return {"hidden_dropout": dropout, "attention_dropout": settings.number("attn_pdrop", 0.0), "init_std": settings.number("initializer_range", 0.02)}


def written_dropout(model: ModelConfig) -> dict[str, float]:
    """The other way."""
    return {"resid_pdrop": model.hidden_dropout, "embd_pdrop": model.hidden_dropout, "attn_pdrop": model.attention_dropout,
            "initializer_range": model.init_std}


def activation_name(model: ModelConfig, choices: Mapping[str, str] = ACTIVATIONS) -> str:
    """As transformers calls it."""
    return next((theirs for theirs, ours in choices.items() if ours == model.activation), model.activation)


def _read(settings: Settings) -> ModelConfig:
    settings.must("scale_attn_weights", True)
    settings.must("scale_attn_by_inverse_layer_idx", False)
    settings.ignore("reorder_and_upcast_attn", "n_ctx")  # in which order scores are scaled, for fp16
    hidden = settings.size("n_embd")
    return ModelConfig(
        name="gpt2", num_layers=settings.size("n_layer"), hidden_size=hidden, num_attention_heads=settings.size("n_head"),
        ffn_hidden_size=settings.whole("n_inner", None) or 4 * hidden, max_sequence_length=settings.whole("n_positions", 1024),
        position_embedding="learned", norm="layernorm", norm_eps=settings.number("layer_norm_epsilon", 1e-5),
        activation=settings.choice("activation_function", ACTIVATIONS, "gelu_new"), bias=True,
        tied_embeddings=settings.flag("tie_word_embeddings", True), **read_dropout(settings),
    )


def _written(model: ModelConfig, vocab: int) -> dict:
    return {
        "n_embd": model.hidden_size, "n_layer": model.num_layers, "n_head": model.num_attention_heads, "n_inner": sizes.ffn_size(model),
        "n_positions": model.max_sequence_length, "layer_norm_epsilon": model.norm_eps, "activation_function": activation_name(model),
        "tie_word_embeddings": model.tied_embeddings, **written_dropout(model),
    }


GPT2 = Family("gpt2", "GPT2LMHeadModel", "transformer.", LINES, _read, _written, (r"attn\.bias", r"attn\.masked_bias"))
