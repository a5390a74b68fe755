"""BERT (Devlin et al. 2018, arXiv 1810.04805) with its head for masked words: norms after the sums, a norm of the embeddings, token types.

What BERT was also trained on, whether one sentence follows another, is not learnt here: the pooler and its head, where a directory holds them, are left out.
"""
from megatron_ext.config import sizes
from megatron_ext.config.schema import ModelConfig
from megatron_ext.convert.families.gpt2 import ACTIVATIONS, activation_name
from megatron_ext.convert.family import Family, Line, linear, norm
from megatron_ext.convert.forms import APART
from megatron_ext.convert.ours import HEAD, HEAD_BIAS, POSITIONS, TYPES, WORDS
from megatron_ext.convert.settings import Settings

LAYER, PREDICTIONS = "encoder.layer.{layer}.", "cls.predictions."
LINES = (
    Line.of(WORDS, "embeddings.word_embeddings.weight"),
    Line.of(POSITIONS, "embeddings.position_embeddings.weight"),
    Line.of(TYPES, "embeddings.token_type_embeddings.weight"),
    *norm("embedding.norm", "embeddings.LayerNorm"),
    *linear("self_attention.linear_qkv", *(f"{LAYER}attention.self.{name}" for name in ("query", "key", "value")), form=APART),
    *linear("self_attention.linear_proj", LAYER + "attention.output.dense"),
    *norm("input_layernorm", LAYER + "attention.output.LayerNorm"),
    *linear("mlp.linear_fc1", LAYER + "intermediate.dense"),
    *linear("mlp.linear_fc2", LAYER + "output.dense"),
    *norm("pre_mlp_layernorm", LAYER + "output.LayerNorm"),
    *linear("transform", PREDICTIONS + "transform.dense"),
    *norm("transform.norm", PREDICTIONS + "transform.LayerNorm"),
    Line.of(HEAD, PREDICTIONS + "decoder.weight"),
    Line.of(HEAD_BIAS, PREDICTIONS + "bias"),
)
# A count of positions; the head's bias under its second name; what belongs to next sentences.
LEFT_OUT = (r"embeddings\.position_ids", r"cls\.predictions\.decoder\.bias", r"pooler\.dense\.(weight|bias)", r"cls\.seq_relationship\.(weight|bias)")

FORMERLY = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))  # Google's names, still those of the Hub's bert-base-uncased


def _read(settings: Settings) -> ModelConfig:
    settings.must("position_embedding_type", "absolute")
    settings.must("tie_word_embeddings", True, why=": the head is the table of words")
    return ModelConfig(
        name="bert", family="encoder", num_layers=settings.size("num_hidden_layers"), hidden_size=settings.size("hidden_size"),
        num_attention_heads=settings.size("num_attention_heads"), ffn_hidden_size=settings.size("intermediate_size"),
        max_sequence_length=settings.whole("max_position_embeddings", 512), position_embedding="learned", token_types=settings.whole("type_vocab_size", 2),
        embedding_norm=True, block="post_norm", norm="layernorm", norm_eps=settings.number("layer_norm_eps", 1e-12),
        activation=settings.choice("hidden_act", ACTIVATIONS, "gelu"), bias=True, head_bias=True, tied_embeddings=True,
        hidden_dropout=settings.number("hidden_dropout_prob", 0.1), attention_dropout=settings.number("attention_probs_dropout_prob", 0.1),
        init_std=settings.number("initializer_range", 0.02),
    )


def _written(model: ModelConfig, vocab: int) -> dict:
    return {
        "hidden_size": model.hidden_size, "num_hidden_layers": model.num_layers, "num_attention_heads": model.num_attention_heads,
        "intermediate_size": sizes.ffn_size(model), "max_position_embeddings": model.max_sequence_length, "type_vocab_size": model.token_types,
        "position_embedding_type": "absolute", "layer_norm_eps": model.norm_eps, "hidden_act": activation_name(model),
        "tie_word_embeddings": model.tied_embeddings, "hidden_dropout_prob": model.hidden_dropout,
        "attention_probs_dropout_prob": model.attention_dropout, "initializer_range": model.init_std,
    }


BERT = Family("bert", "BertForMaskedLM", "bert.", LINES, _read, _written, LEFT_OUT, head=PREDICTIONS + "decoder.weight", formerly=FORMERLY)
