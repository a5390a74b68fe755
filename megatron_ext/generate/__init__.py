"""Completions from the training model: `generate(engine, prompts, settings, ...) -> list[Completion]`."""
from megatron_ext.generate.decode import Completion, generate

__all__ = ["Completion", "generate"]
