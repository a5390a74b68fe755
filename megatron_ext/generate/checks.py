"""What cannot be generated, refused before anything is started. No torch."""
from collections.abc import Sequence

from megatron_ext.config.schema import GenerateConfig
from megatron_ext.errors import UserError


def check_settings(settings: GenerateConfig) -> None:
    """Raises UserError for settings that mean nothing."""
    rules = (
        ("max_tokens", settings.max_tokens >= 1, "must be at least 1"),
        ("temperature", 0 <= settings.temperature < float("inf"), "must be at least 0 (0 takes the most probable word)"),
        ("top_k", settings.top_k >= 0, "must be at least 0 (0 is off)"),
        ("top_p", 0 < settings.top_p <= 1, "must be greater than 0 and at most 1 (1 is off)"),
        ("samples", settings.samples >= 1, "must be at least 1"),
        ("batch_size", settings.batch_size >= 1, "must be at least 1"),
        ("stop", all(settings.stop), "a stop string must have at least one character"),
    )
    for name, holds, reason in rules:
        if not holds:
            raise UserError(f"generate.{name}", getattr(settings, name), reason)


def check_layout(layout) -> None:
    """Raises UserError for a layout that cannot generate. `layout`: a Layout, or the configuration of one."""
    if layout.vpp:
        raise UserError("parallel.vpp", layout.vpp, "generation runs without interleaved stages; leave parallel.vpp out: a checkpoint "
                                                    "loads into any layout")
    if layout.cp > 1:
        raise UserError("parallel.cp", layout.cp, "generation runs without context parallelism; leave parallel.cp out")


def check_prompt(prompt: Sequence[int], key: str, value: object, *, max_sequence_length: int, vocab_size: int) -> None:
    """Raises UserError(key, value, ...) for token ids that cannot be continued."""
    if not prompt:
        raise UserError(key, value, "is empty: there is nothing to continue; begin with a word, or the end-of-document token")
    if len(prompt) >= max_sequence_length:
        raise UserError(key, value, f"has {len(prompt)} tokens; with model.max_sequence_length={max_sequence_length} at most "
                                    f"{max_sequence_length - 1} leave room for a completion")
    if not 0 <= min(prompt) <= max(prompt) < vocab_size:
        raise UserError(key, value, f"holds tokens outside the vocabulary of {vocab_size}")
