"""Llama 1 to 3.3 (Touvron et al. 2023, arXiv 2302.13971; The Llama 3 Herd of Models, arXiv 2407.21783), and what Mistral and Qwen share with it:
RMSNorm, rotary positions in halves, SwiGLU, grouped heads, no biases."""
from megatron_ext.config import sizes
from megatron_ext.config.schema import ModelConfig
from megatron_ext.convert.families import rotary
from megatron_ext.convert.family import Family, Line, linear, norm
from megatron_ext.convert.forms import APART, HALVES
from megatron_ext.convert.ours import HEAD, LAST_NORM, WORDS
from megatron_ext.convert.settings import Settings

LAYER = "layers.{layer}."
LINES = (
    Line.of(WORDS, "embed_tokens.weight"),
    *norm("input_layernorm", LAYER + "input_layernorm"),
    *linear("self_attention.linear_qkv", *(f"{LAYER}self_attn.{name}_proj" for name in "qkv"), form=APART),
    *linear("self_attention.linear_proj", LAYER + "self_attn.o_proj"),
    *norm("pre_mlp_layernorm", LAYER + "post_attention_layernorm"),
    *linear("mlp.linear_fc1", LAYER + "mlp.gate_proj", LAYER + "mlp.up_proj", form=HALVES),
    *linear("mlp.linear_fc2", LAYER + "mlp.down_proj"),
    *norm(LAST_NORM, "norm"),
    Line.of(HEAD, "lm_head.weight"),
)
BUFFERS = (r"rotary_emb\.inv_freq",)


def read_sizes(settings: Settings, **more: object) -> ModelConfig:
    """What the four families have in common. `more`: fields of their own."""
    heads, hidden = settings.size("num_attention_heads"), settings.size("hidden_size")
    settings.choice("hidden_act", {"silu": "swiglu"}, "silu")
    rope, rest = rotary.read(settings)
    if rest.get("partial_rotary_factor", 1.0) != 1.0:
        raise settings.wrong("rope_parameters.partial_rotary_factor", rest["partial_rotary_factor"], "is not supported in this family; only 1.0")
    width = settings.whole("head_dim", None)
    fields: dict[str, object] = {
        "num_layers": settings.size("num_hidden_layers"), "hidden_size": hidden, "num_attention_heads": heads,
        "num_query_groups": settings.whole("num_key_value_heads", heads), "head_dim": width, "ffn_hidden_size": settings.size("intermediate_size"),
        "max_sequence_length": settings.whole("max_position_embeddings", 2048), "norm": "rmsnorm", "norm_eps": settings.number("rms_norm_eps", 1e-6),
        "activation": "swiglu", "tied_embeddings": settings.flag("tie_word_embeddings", False),
        "attention_dropout": settings.number("attention_dropout", 0.0), "init_std": settings.number("initializer_range", 0.02),
    }
    return ModelConfig(**{**fields, **rope, **more})


def written_sizes(model: ModelConfig) -> dict:
    """The other way."""
    return {
        "hidden_size": model.hidden_size, "intermediate_size": sizes.ffn_size(model), "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads, "num_key_value_heads": sizes.query_groups(model), "head_dim": sizes.head_dim(model),
        "hidden_act": "silu", "max_position_embeddings": model.max_sequence_length, "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tied_embeddings, "attention_dropout": model.attention_dropout, "initializer_range": model.init_std,
        **rotary.written(model),
    }


def _read(settings: Settings) -> ModelConfig:
    settings.ignore("pretraining_tp")  # how training was split; the sums are the same
    attention, mlp = settings.flag("attention_bias", False), settings.flag("mlp_bias", False)
    biases = {"bias": True} if attention and mlp else {"qkv_bias": attention, "proj_bias": attention, "mlp_bias": mlp}
    return read_sizes(settings, name="llama", **biases)


def _written(model: ModelConfig, vocab: int) -> dict:
    _, proj, mlp = sizes.biases(model)
    return {**written_sizes(model), "attention_bias": proj, "mlp_bias": mlp}


LLAMA = Family("llama", "LlamaForCausalLM", "model.", LINES, _read, _written, BUFFERS)
