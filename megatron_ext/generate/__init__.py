"""Completions from the training model: `generate(engine, prompts, settings, ...) -> list[Completion]`.

Imported when first used: the command line checks its input with the parts of this room that need no torch.
"""
from importlib import import_module

__all__ = ["Completion", "generate"]


def __getattr__(name: str):
    if name in __all__:
        return getattr(import_module(f"{__name__}.decode"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
