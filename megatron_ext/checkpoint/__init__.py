"""Checkpoints: written in the background, atomic, hashed, reshardable, and free of anything that could run when read.

The names below are the public ones. Those that need torch are imported when first used, so that `find` and `read_record` serve
`check` and the launcher in milliseconds.
"""
from importlib import import_module

from megatron_ext.checkpoint.manifest import best_of, checkpoint_hash, find, name_best, read_record, verify

__all__ = ["Checkpoints", "best_of", "checkpoint_hash", "find", "load", "name_best", "read_record", "verify"]
_LAZY = {"Checkpoints": "save", "load": "read"}


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
