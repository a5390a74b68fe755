"""OPT (Zhang et al. 2022, arXiv 2205.01068): GPT-3's shape with ReLU and a table of positions that begins two rows late. Its 350M has norms after the sums and
words half as wide as its layers."""
from megatron_ext.config import sizes
from megatron_ext.config.schema import ModelConfig
from megatron_ext.convert.families.gpt2 import ACTIVATIONS, activation_name
from megatron_ext.convert.family import Family, Line, linear, norm
from megatron_ext.convert.forms import APART
from megatron_ext.convert.ours import HEAD, LAST_NORM, POSITIONS, PROJECT_IN, PROJECT_OUT, WORDS
from megatron_ext.convert.settings import Settings

LAYER = "layers.{layer}."
OFFSET = 2  # positions of padding and of nothing, in fairseq
LINES = (
    Line.of(WORDS, "embed_tokens.weight"),
    Line.of(POSITIONS, "embed_positions.weight"),
    Line.of(PROJECT_IN, "project_in.weight"),
    *norm("input_layernorm", LAYER + "self_attn_layer_norm"),
    *linear("self_attention.linear_qkv", *(f"{LAYER}self_attn.{name}_proj" for name in "qkv"), form=APART),
    *linear("self_attention.linear_proj", LAYER + "self_attn.out_proj"),
    *norm("pre_mlp_layernorm", LAYER + "final_layer_norm"),
    *linear("mlp.linear_fc1", LAYER + "fc1"),
    *linear("mlp.linear_fc2", LAYER + "fc2"),
    *norm(LAST_NORM, "final_layer_norm"),
    Line.of(PROJECT_OUT, "project_out.weight"),
    Line.of(HEAD, "lm_head.weight"),
)


def _read(settings: Settings) -> ModelConfig:
    hidden = settings.size("hidden_size")
    settings.must("_remove_final_layer_norm", False)
    settings.must("layer_norm_elementwise_affine", True)
    settings.must("layerdrop", 0.0, 0)
    words = settings.whole("word_embed_proj_dim", None) or hidden
    before = settings.flag("do_layer_norm_before", True)
    return ModelConfig(
        name="opt", num_layers=settings.size("num_hidden_layers"), hidden_size=hidden, num_attention_heads=settings.size("num_attention_heads"),
        ffn_hidden_size=settings.size("ffn_dim"), max_sequence_length=settings.whole("max_position_embeddings", 2048), position_embedding="learned",
        position_offset=OFFSET, embedding_size=None if words == hidden else words, block="serial" if before else "post_norm", norm="layernorm",
        norm_eps=1e-5, activation=settings.choice("activation_function", ACTIVATIONS, "relu"), bias=settings.flag("enable_bias", True),
        tied_embeddings=settings.flag("tie_word_embeddings", True), hidden_dropout=settings.number("dropout", 0.1),
        attention_dropout=settings.number("attention_dropout", 0.0), init_std=settings.number("init_std", 0.02),
    )


def _written(model: ModelConfig, vocab: int) -> dict:
    return {
        "hidden_size": model.hidden_size, "num_hidden_layers": model.num_layers, "num_attention_heads": model.num_attention_heads,
        "ffn_dim": sizes.ffn_size(model), "max_position_embeddings": model.max_sequence_length, "word_embed_proj_dim": sizes.embedding_size(model),
        "do_layer_norm_before": model.block == "serial", "_remove_final_layer_norm": False, "layer_norm_elementwise_affine": True, "layerdrop": 0.0,
        "activation_function": activation_name(model), "enable_bias": model.bias, "tie_word_embeddings": model.tied_embeddings,
        "dropout": model.hidden_dropout, "attention_dropout": model.attention_dropout, "init_std": model.init_std,
    }


OPT = Family("opt", "OPTForCausalLM", "model.decoder.", LINES, _read, _written, (r"version",), licence="opt-175b")
