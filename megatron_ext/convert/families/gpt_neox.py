"""GPT-NeoX (Black et al. 2022, arXiv 2204.06745) and Pythia (arXiv 2304.01373): attention beside the MLP with a norm each, rotary positions on a part of each
head, LayerNorm. Its joined projection lies as ours does: a head's queries, keys and values, then the next head's."""
from megatron_ext.config import sizes
from megatron_ext.config.schema import ModelConfig
from megatron_ext.convert.families import rotary
from megatron_ext.convert.families.gpt2 import ACTIVATIONS, activation_name
from megatron_ext.convert.family import Family, Line, linear, norm
from megatron_ext.convert.ours import HEAD, LAST_NORM, WORDS
from megatron_ext.convert.settings import Settings

LAYER = "layers.{layer}."
HEAD_NAME = "embed_out.weight"
LINES = (
    Line.of(WORDS, "embed_in.weight"),
    *norm("input_layernorm", LAYER + "input_layernorm"),
    *linear("self_attention.linear_qkv", LAYER + "attention.query_key_value"),
    *linear("self_attention.linear_proj", LAYER + "attention.dense"),
    *norm("pre_mlp_layernorm", LAYER + "post_attention_layernorm"),
    *linear("mlp.linear_fc1", LAYER + "mlp.dense_h_to_4h"),
    *linear("mlp.linear_fc2", LAYER + "mlp.dense_4h_to_h"),
    *norm(LAST_NORM, "final_layer_norm"),
    Line.of(HEAD, HEAD_NAME),
)


def _read(settings: Settings) -> ModelConfig:
    hidden, heads = settings.size("hidden_size"), settings.size("num_attention_heads")
    rope, rest = rotary.read(settings, base_key="rotary_emb_base")
    percent = rest.get("partial_rotary_factor", settings.number("rotary_pct", 0.25))
    width = hidden // heads
    attention = settings.flag("attention_bias", True)
    return ModelConfig(
        name="gpt_neox", num_layers=settings.size("num_hidden_layers"), hidden_size=hidden, num_attention_heads=heads,
        ffn_hidden_size=settings.size("intermediate_size"), max_sequence_length=settings.whole("max_position_embeddings", 2048), norm="layernorm",
        norm_eps=settings.number("layer_norm_eps", 1e-5), activation=settings.choice("hidden_act", ACTIVATIONS, "gelu"),
        block="parallel" if settings.flag("use_parallel_residual", True) else "serial", bias=attention, mlp_bias=not attention,
        rotary_percent=rotary.percent(int(width * percent), width), tied_embeddings=settings.flag("tie_word_embeddings", False),
        hidden_dropout=settings.number("hidden_dropout", 0.0), attention_dropout=settings.number("attention_dropout", 0.0),
        init_std=settings.number("initializer_range", 0.02), **rope,
    )


def _written(model: ModelConfig, vocab: int) -> dict:
    rope = rotary.written(model)
    return {
        "hidden_size": model.hidden_size, "num_hidden_layers": model.num_layers, "num_attention_heads": model.num_attention_heads,
        "intermediate_size": sizes.ffn_size(model), "max_position_embeddings": model.max_sequence_length, "layer_norm_eps": model.norm_eps,
        "hidden_act": activation_name(model), "use_parallel_residual": model.block == "parallel", "attention_bias": sizes.biases(model)[0],
        "rotary_pct": model.rotary_percent, "rotary_emb_base": rope["rope_theta"], "rope_scaling": rope["rope_scaling"],
        "tie_word_embeddings": model.tied_embeddings, "hidden_dropout": model.hidden_dropout, "attention_dropout": model.attention_dropout,
        "initializer_range": model.init_std,
    }


GPT_NEOX = Family("gpt_neox", "GPTNeoXForCausalLM", "gpt_neox.", LINES, _read, _written,
                  (r"attention\.bias", r"attention\.masked_bias", r"rotary_emb\.inv_freq"), head=HEAD_NAME)
