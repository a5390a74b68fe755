"""T5 (Raffel et al. 2019, arXiv 1910.10683): relative positions of the first layer for all, scores that are not scaled, no biases. With tied words logits
are scaled instead; version 1.1 (and Flan) scales nothing, has words and head apart, and a gate, whose GELU is the approximate one."""
from megatron_ext.config import sizes
from megatron_ext.config.schema import ModelConfig
from megatron_ext.convert.families.gpt2 import activation_name
from megatron_ext.convert.family import Family, Line
from megatron_ext.convert.forms import APART, HALVES, KEYS_VALUES, SAME, TRANSPOSED
from megatron_ext.convert.ours import ENCODER, HEAD, LAST_NORM, TABLES, WORDS
from megatron_ext.convert.settings import Settings

ACTIVATIONS = {"relu": "relu", "gated-gelu": "geglu_tanh"}
BLOCK, BIAS = ".block.{layer}.layer.", ".block.0.layer.0.SelfAttention.relative_attention_bias.weight"


def _stack(start: str, name: str, last: int, gated: bool) -> list[Line]:
    """A layer of one stack. last: number of the part that holds the MLP."""
    attention, feed = f"{name}{BLOCK}0.", f"{name}{BLOCK}{last}."
    into = [f"{feed}DenseReluDense.wi_{number}.weight" for number in (0, 1)] if gated else [f"{feed}DenseReluDense.wi.weight"]
    return [
        Line.of(f"{start}input_layernorm.weight", f"{attention}layer_norm.weight"),
        Line.of(f"{start}self_attention.linear_qkv.weight", *(f"{attention}SelfAttention.{part}.weight" for part in "qkv"), form=APART),
        Line.of(f"{start}self_attention.linear_proj.weight", f"{attention}SelfAttention.o.weight"),
        Line.of(f"{start}pre_mlp_layernorm.weight", f"{feed}layer_norm.weight"),
        Line.of(f"{start}mlp.linear_fc1.weight", *into, form=HALVES if gated else SAME),
        Line.of(f"{start}mlp.linear_fc2.weight", f"{feed}DenseReluDense.wo.weight"),
    ]


def _lines(model: ModelConfig) -> tuple[Line, ...]:
    """Which tensors the MLP has depends on its gate."""
    gated = model.activation in sizes.GATED
    crossing = f"decoder{BLOCK}1."
    return (
        Line.of(WORDS, "shared.weight"),
        *(Line.of(ours, name + BIAS, form=TRANSPOSED) for ours, name in zip(TABLES, ("encoder", "decoder"), strict=True)),
        *_stack(ENCODER, "encoder", 1, gated),
        Line.of("encoder.final_layernorm.weight", "encoder.final_layer_norm.weight"),
        *_stack("", "decoder", 2, gated),
        Line.of("pre_cross_attn_layernorm.weight", f"{crossing}layer_norm.weight"),
        Line.of("cross_attention.linear_q.weight", f"{crossing}EncDecAttention.q.weight"),
        Line.of("cross_attention.linear_kv.weight", *(f"{crossing}EncDecAttention.{part}.weight" for part in "kv"), form=KEYS_VALUES),
        Line.of("cross_attention.linear_proj.weight", f"{crossing}EncDecAttention.o.weight"),
        Line.of(f"{LAST_NORM}.weight", "decoder.final_layer_norm.weight"),
        Line.of(HEAD, "lm_head.weight"),
    )


def _read(settings: Settings) -> ModelConfig:
    settings.must("is_encoder_decoder", True)
    settings.must("tie_encoder_decoder", False)
    kind = settings.choice("feed_forward_proj", ACTIVATIONS, "relu")
    settings.ignore("dense_act_fn", "is_gated_act", "initializer_factor", "decoder_start_token_id", "n_positions", "output_past")
    hidden, tied = settings.size("d_model"), settings.flag("tie_word_embeddings", True)
    scaled = settings.flag("scale_decoder_outputs", tied)  # transformers before 5 scale where words are tied
    layers, dropout = settings.size("num_layers"), settings.number("dropout_rate", 0.1)
    return ModelConfig(
        name="t5", family="encoder_decoder", num_layers=layers, decoder_layers=settings.whole("num_decoder_layers", None) or layers, hidden_size=hidden,
        num_attention_heads=settings.size("num_heads"), head_dim=settings.size("d_kv"), ffn_hidden_size=settings.size("d_ff"),
        max_sequence_length=settings.whole("n_positions", 512), position_embedding="relative",
        relative_buckets=settings.whole("relative_attention_num_buckets", 32), relative_distance=settings.whole("relative_attention_max_distance", 128),
        attention_scale=1.0, logit_scale=hidden**-0.5 if scaled else 1.0, norm="rmsnorm", norm_eps=settings.number("layer_norm_epsilon", 1e-6),
        activation=kind, bias=False, tied_embeddings=tied, hidden_dropout=dropout, attention_dropout=dropout,
    )


def _written(model: ModelConfig, vocab: int) -> dict:
    return {
        "is_encoder_decoder": True, "d_model": model.hidden_size, "num_layers": model.num_layers, "num_decoder_layers": sizes.decoder_layers(model),
        "num_heads": model.num_attention_heads, "d_kv": sizes.head_dim(model), "d_ff": sizes.ffn_size(model), "n_positions": model.max_sequence_length,
        "relative_attention_num_buckets": model.relative_buckets, "relative_attention_max_distance": model.relative_distance,
        "layer_norm_epsilon": model.norm_eps, "feed_forward_proj": activation_name(model, ACTIVATIONS), "tie_word_embeddings": model.tied_embeddings,
        "scale_decoder_outputs": model.logit_scale != 1, "dropout_rate": model.hidden_dropout,
    }


# The words under their other names, and a table that the first T5 had and nothing reads.
COPIES = (r"(encoder|decoder)\.embed_tokens\.weight", r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight")
T5 = Family("t5", "T5ForConditionalGeneration", "", _lines, _read, _written, COPIES)
