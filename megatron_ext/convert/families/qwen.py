"""Qwen2 and 2.5 (arXiv 2407.10671, 2412.15115): Llama's layers with biases of queries, keys and values. Qwen3 (arXiv 2505.09388): without them, with RMSNorm
of each head's queries and keys."""
from megatron_ext.config import sizes
from megatron_ext.config.schema import ModelConfig
from megatron_ext.convert.families.llama import BUFFERS, LAYER, LINES, read_sizes, written_sizes
from megatron_ext.convert.family import Family, norm
from megatron_ext.convert.settings import Settings

NORMS = tuple(line for name in "qk" for line in norm(f"self_attention.{name}_layernorm", f"{LAYER}self_attn.{name}_norm"))


def _full_attention(settings: Settings) -> None:
    """Windows are off in all published sizes; `layer_types` says the same again."""
    settings.must("use_sliding_window", False)
    settings.ignore("sliding_window", "max_window_layers")
    kinds = settings.get("layer_types") or ()
    if any(kind != "full_attention" for kind in kinds):
        raise settings.wrong("layer_types", sorted(set(kinds)), "is not supported; only full_attention")


def _read2(settings: Settings) -> ModelConfig:
    _full_attention(settings)
    settings.must("use_mrope", False)
    return read_sizes(settings, name="qwen2", qkv_bias=True)


def _written2(model: ModelConfig, vocab: int) -> dict:
    return {**written_sizes(model), "use_sliding_window": False}


def _read3(settings: Settings) -> ModelConfig:
    _full_attention(settings)
    bias = settings.flag("attention_bias", False)
    settings.values.setdefault("head_dim", 128)  # transformers' default, which is not hidden / heads
    return read_sizes(settings, name="qwen3", qk_norm=True, qkv_bias=bias, proj_bias=bias)


def _written3(model: ModelConfig, vocab: int) -> dict:
    return {**written_sizes(model), "attention_bias": sizes.biases(model)[1], "use_sliding_window": False}


QWEN2 = Family("qwen2", "Qwen2ForCausalLM", "model.", LINES, _read2, _written2, BUFFERS)
QWEN3 = Family("qwen3", "Qwen3ForCausalLM", "model.", LINES + NORMS, _read3, _written3, BUFFERS)
