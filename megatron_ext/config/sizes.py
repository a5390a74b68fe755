"""The sizes of a model that follow from its configuration, and its number of parameters. No torch.

With h hidden, L layers, a heads of d, g key/value heads, f feed-forward, V words, S learned positions, a layer holds
    attention  h (a + 2 g) d + a d h,    feed-forward  h f (2, or 3 with a gate),    two norms,    biases where there are any,
and around the layers stand V h (twice when untied), S h with learned positions, and a last norm. With a word table of width e (embedding_size)
these are V e and two projections h e. A parallel block of one norm has one a layer; with norms after the sums there is no last one.
An encoder has beside these a row for each token type, a norm of the embeddings where it is asked for, and before its logits a layer h h with bias and
norm (BERT's head). Of an encoder-decoder L layers are the encoder's; the decoder's have attention and a norm more; two last norms, and two tables of
relative positions.
"""
import math

from megatron_ext.config.schema import Config, ModelConfig

GATED = ("swiglu", "geglu", "geglu_tanh")


def head_dim(model: ModelConfig) -> int:
    """Width of one attention head."""
    return model.head_dim or model.hidden_size // model.num_attention_heads


def query_groups(model: ModelConfig) -> int:
    """Key/value heads."""
    return model.num_query_groups or model.num_attention_heads


def layers(model: ModelConfig) -> int:
    """Layers of all stacks."""
    return model.num_layers + (decoder_layers(model) if model.family == "encoder_decoder" else 0)


def decoder_layers(model: ModelConfig) -> int:
    """Layers of an encoder-decoder's decoder."""
    return model.decoder_layers or model.num_layers


def embedding_size(model: ModelConfig) -> int:
    """Width of the word table."""
    return model.embedding_size or model.hidden_size


def position_rows(model: ModelConfig) -> int:
    """Rows of a table of learned positions."""
    return model.max_sequence_length + model.position_offset


def biases(model: ModelConfig) -> tuple[bool, bool, bool]:
    """Whether queries, keys and values, attention's output, and the MLP have biases."""
    return model.bias or model.qkv_bias, model.bias or model.proj_bias, model.bias or model.mlp_bias


def ffn_size(model: ModelConfig) -> int:
    """Width of the feed-forward layer: 4 hidden, or with a gate 8/3 hidden rounded up to 64 (as many parameters)."""
    if model.ffn_hidden_size is not None:
        return model.ffn_hidden_size
    return 64 * math.ceil(8 * model.hidden_size / 3 / 64) if model.activation in GATED else 4 * model.hidden_size


def padded_vocabulary(vocab_size: int, multiple: int, tp: int) -> int:
    """Rows of the embedding table: the next multiple of `multiple` that also divides over the tensor-parallel ranks."""
    step = math.lcm(multiple, tp)
    return step * math.ceil(vocab_size / step)


def vocab_size(config: Config) -> int:
    """Words that the configuration alone tells of: the model's, else those of the tokenizer that `prepare` would train."""
    return config.model.vocab_size or config.data.vocab_size


def parameters(model: ModelConfig, vocab: int) -> int:
    """Number of parameters with `vocab` rows of the table (give the padded number for what memory holds)."""
    hidden, width = model.hidden_size, head_dim(model) * model.num_attention_heads
    key_value, ffn = 2 * head_dim(model) * query_groups(model), ffn_size(model)
    per_norm = 2 if model.norm == "layernorm" else 1
    into_ffn = 2 * ffn if model.activation in GATED else ffn
    qkv_bias, proj_bias, mlp_bias = biases(model)
    layer = hidden * (width + key_value) + width * hidden + hidden * into_ffn + ffn * hidden
    layer += per_norm * hidden * (1 if model.block == "parallel_one_norm" else 2) + (2 * per_norm * head_dim(model) if model.qk_norm else 0)
    layer += (width + key_value if qkv_bias else 0) + (hidden if proj_bias else 0) + (into_ffn + hidden if mlp_bias else 0)
    embedded = embedding_size(model)
    tables = vocab * embedded * (1 if model.tied_embeddings else 2) + (vocab if model.head_bias else 0)
    projections = 0 if embedded == hidden else 2 * hidden * embedded
    positions = position_rows(model) * hidden if model.position_embedding == "learned" else 0
    norm = per_norm * hidden
    last_norm, extra = 0 if model.block == "post_norm" else norm, 0
    if model.family == "encoder":
        extra = model.token_types * hidden + (norm if model.embedding_norm else 0) + hidden * hidden + hidden + norm
    if model.family == "encoder_decoder":
        crossing = 4 * hidden * width + norm + (3 * width + hidden if model.bias else 0)
        extra = decoder_layers(model) * (layer + crossing) + last_norm
        extra += 2 * model.relative_buckets * model.num_attention_heads if model.position_embedding == "relative" else 0
    return model.num_layers * layer + tables + projections + positions + last_norm + extra
