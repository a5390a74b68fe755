"""What a checkpoint says of its model stays comparable with what older versions of this program have written."""
from megatron_ext.config.schema import ModelConfig
from megatron_ext.train.record import architecture

# Of a checkpoint written before there were other families and blocks (November 2026).
OLD = {
    "num_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "num_query_groups": 4, "head_dim": 64, "ffn_hidden_size": 704, "position_embedding": "rope",
    "rotary_percent": 1.0, "rotary_base": 10000.0, "rotary_interleaved": False, "rope_scaling_factor": None, "norm": "rmsnorm", "norm_eps": 1e-05,
    "activation": "swiglu", "bias": False, "qkv_bias": False, "tied_embeddings": False, "vocab_size": 500,
}


def test_an_older_record_of_the_same_model_says_the_same():
    assert architecture(ModelConfig(), 500) == OLD


def test_what_came_later_counts_where_it_is_used():
    assert architecture(ModelConfig(block="parallel", family="encoder"), 500) == OLD | {"block": "parallel", "family": "encoder"}
