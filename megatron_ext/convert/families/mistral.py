"""Mistral (Jiang et al. 2023, arXiv 2310.06825): Llama's layers, and in the first versions attention that sees the last `sliding_window` tokens only.

Up to that many tokens a window hides nothing: such a model is imported with its context cut to the window, where it computes what it always did.
"""
from dataclasses import replace

from megatron_ext.config.schema import ModelConfig
from megatron_ext.convert.families.llama import BUFFERS, LINES, read_sizes, written_sizes
from megatron_ext.convert.family import Family
from megatron_ext.convert.settings import Settings


def _read(settings: Settings) -> ModelConfig:
    model = read_sizes(settings, name="mistral")
    window = settings.whole("sliding_window", None)
    settings.must("layer_types", None)
    return model if window is None else replace(model, max_sequence_length=min(model.max_sequence_length, window))


def _written(model: ModelConfig, vocab: int) -> dict:
    return {**written_sizes(model), "sliding_window": None}


MISTRAL = Family("mistral", "MistralForCausalLM", "model.", LINES, _read, _written, BUFFERS)
