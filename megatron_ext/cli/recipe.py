"""`conf/run.yaml`: what the main job sets before the command line. No Hydra at import."""
from collections.abc import Sequence

from megatron_ext.config.overrides import GROUPS, conf_dir, parse


def read() -> dict[str, list[str]]:
    """{"overrides": [...], "prompts": [...]}"""
    import yaml

    return yaml.safe_load((conf_dir() / "run.yaml").read_text(encoding="utf-8"))


def with_defaults(words: Sequence[str]) -> tuple[str, ...]:
    """The recipe's overrides that `words` do not set themselves, then `words`. A group that is chosen drops the recipe's keys of it."""
    given = {override.key for override in map(parse, words)}
    chosen = given & set(GROUPS)
    ours = [word for word in read()["overrides"] if (key := parse(word).key) not in given and key.split(".")[0] not in chosen]
    return (*ours, *words)
