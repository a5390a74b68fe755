"""`conf/run.yaml`: what the main job sets before the command line, stage by stage. No Hydra at import.

A word of the command line is for all stages (`model=tiny`), or with a stage's name before it for that one (`ppo:train.steps=5`).
"""
import re
from collections.abc import Sequence

from megatron_ext.config.overrides import GROUPS, conf_dir, parse
from megatron_ext.errors import UserError

_FOR_STAGE = re.compile(r"^([a-z_]+):(.*)$", re.DOTALL)


def read() -> dict:
    """{"overrides": [...], "stages": {stage: [...]}, "prompts": [...]}"""
    import yaml

    return yaml.safe_load((conf_dir() / "run.yaml").read_text(encoding="utf-8"))


def with_defaults(words: Sequence[str], stage: str = "pretrain") -> tuple[str, ...]:
    """The recipe's overrides for a stage that `words` do not set themselves, then those of `words` that are for it.

    A group that is chosen drops the recipe's keys of it. Raises UserError: a word for a stage that the job does not have.
    """
    found = read()
    mine = typed(words, stage)
    specific = _without(found["stages"].get(stage, []), mine)
    return (*_without(found["overrides"], [*specific, *mine]), *specific, *mine)


def typed(words: Sequence[str], stage: str) -> list[str]:
    """Those of `words` that are for a stage. Raises UserError: a word for a stage that the job does not have."""
    known = tuple(read()["stages"])
    kept, own = [], []
    for word in words:
        match = _FOR_STAGE.match(word.partition("=")[0])
        if match is None:
            kept.append(word)
        elif match[1] not in known:
            raise UserError("override", word, f"{match[1]} is no stage of the job; it has {', '.join(known)}")
        elif match[1] == stage:
            own.append(word[len(stage) + 1 :])
    return _without(kept, own) + own  # what is said of one stage goes before what is said of all


def _without(words: Sequence[str], given: Sequence[str]) -> list[str]:
    """`words` without the keys that `given` set."""
    keys = {override.key for override in map(parse, given)}
    chosen = keys & set(GROUPS)
    return [word for word in words if (key := parse(word).key) not in keys and key.split(".")[0] not in chosen]
