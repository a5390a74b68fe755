"""GPT-J (Wang & Komatsuzaki 2021) and KoGPT: attention beside the MLP with one norm for both, rotary positions of neighbouring pairs on a part of each head,
biases in the MLP and of the logits alone."""
from megatron_ext.config import sizes
from megatron_ext.config.schema import ModelConfig
from megatron_ext.convert.families import rotary
from megatron_ext.convert.families.gpt2 import ACTIVATIONS, activation_name, read_dropout, written_dropout
from megatron_ext.convert.family import Family, Line, linear, norm
from megatron_ext.convert.forms import APART
from megatron_ext.convert.ours import HEAD, HEAD_BIAS, LAST_NORM, WORDS
from megatron_ext.convert.settings import Settings

LAYER = "h.{layer}."
LINES = (
    Line.of(WORDS, "wte.weight"),
    *norm("input_layernorm", LAYER + "ln_1"),
    *linear("self_attention.linear_qkv", *(f"{LAYER}attn.{name}_proj" for name in "qkv"), form=APART),
    *linear("self_attention.linear_proj", LAYER + "attn.out_proj"),
    *linear("mlp.linear_fc1", LAYER + "mlp.fc_in"),
    *linear("mlp.linear_fc2", LAYER + "mlp.fc_out"),
    *norm(LAST_NORM, "ln_f"),
    Line.of(HEAD, "lm_head.weight"),
    Line.of(HEAD_BIAS, "lm_head.bias"),
)


def _read(settings: Settings) -> ModelConfig:
    hidden, heads = settings.size("n_embd"), settings.size("n_head")
    settings.must("rotary", True)
    settings.must("scale_attn_weights", True)
    settings.ignore("n_ctx")
    width = hidden // heads
    return ModelConfig(
        name="gptj", num_layers=settings.size("n_layer"), hidden_size=hidden, num_attention_heads=heads,
        ffn_hidden_size=settings.whole("n_inner", None) or 4 * hidden, max_sequence_length=settings.whole("n_positions", 2048),
        rotary_percent=rotary.percent(settings.whole("rotary_dim", 64), width), rotary_interleaved=True, block="parallel_one_norm", norm="layernorm",
        norm_eps=settings.number("layer_norm_epsilon", 1e-5), activation=settings.choice("activation_function", ACTIVATIONS, "gelu_new"),
        mlp_bias=True, head_bias=True, tied_embeddings=settings.flag("tie_word_embeddings", False), **read_dropout(settings),
    )


def _written(model: ModelConfig, vocab: int) -> dict:
    return {
        "n_embd": model.hidden_size, "n_layer": model.num_layers, "n_head": model.num_attention_heads, "n_inner": sizes.ffn_size(model),
        "n_positions": model.max_sequence_length, "rotary_dim": round(sizes.head_dim(model) * model.rotary_percent),
        "layer_norm_epsilon": model.norm_eps, "activation_function": activation_name(model), "tie_word_embeddings": model.tied_embeddings,
        **written_dropout(model),
    }


GPTJ = Family("gptj", "GPTJForCausalLM", "transformer.", LINES, _read, _written, (r"attn\.bias", r"attn\.masked_bias", r"embed_positions"))
