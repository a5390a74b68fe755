"""What a command says before it starts: keys that were typed and mean nothing in the stage, and settings that work and may surprise. No torch."""
from collections.abc import Sequence

from megatron_ext.config.rlhf import doubts
from megatron_ext.config.schema import Config
from megatron_ext.config.stages import why_meaningless


def notes(config: Config, words: Sequence[str]) -> list[str]:
    """Sentences. `words`: the overrides that were typed."""
    keys = [word.lstrip("+").partition("=")[0] for word in words]
    reasons = {key: why_meaningless(config, key) for key in keys}
    return [f"{key} is not read: {reason}" for key, reason in reasons.items() if reason is not None] + doubts(config)
