"""Settings of de-identification. No imports but errors: `config/schema.py` reads this file."""
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_ext.curate.privacy.kinds import KINDS
from megatron_ext.errors import UserError

ACTIONS = ("tag", "mask", "pseudonym", "keep")


@dataclass(frozen=True)
class PrivacyConfig:
    """The step `privacy`: what is looked for, and what it becomes (docs/curate_privacy.md)."""

    kinds: tuple[str, ...] = ()  # looked for; empty = all that there are
    action: str = "tag"  # what is found becomes: tag ([PHONE]) | mask (***-****-****) | pseudonym ([PHONE:k3v9q2m7xa], the same for the same value) | keep
    actions: tuple[str, ...] = ()  # other actions for single kinds: [PERSON:pseudonym,KR_BUSINESS:keep]; kinds of the rules too
    tags: str = "en"  # words in tags: en (PHONE) | ko (전화번호)
    rules: tuple[str, ...] = ()  # YAML files of a ministry's own rules; those of a later file come on top
    morphology: str = "kiwi"  # what tells a Korean name from a word: kiwi (package kiwipiepy) | none (names with a label or a title alone, and fewer of them)
    threshold: float = 0.5  # what is less sure than this stays
    key_env: str = "MEGATRON_EXT_PSEUDONYM_KEY"  # pseudonym: the environment variable that holds the key
    key_file: str | None = None  # pseudonym: a file that holds the key, in place of the variable
    samples: int = 5  # masked samples of each kind and source in the report
    metadata: bool = True  # also look at the texts beside the text: title, origin, captions, cells


CHOICES = {"privacy.action": ACTIONS, "privacy.tags": ("en", "ko"), "privacy.morphology": ("kiwi", "none")}
RANGES = {"privacy.threshold": "[0,1]", "privacy.samples": "[0,inf)"}


def problems(settings: PrivacyConfig) -> Iterator[UserError]:
    """What no table can say."""
    for kind in settings.kinds:
        if kind not in KINDS:
            yield UserError("curate.privacy.kinds", kind, f"is no kind; there are {', '.join(KINDS)}")
    for entry in settings.actions:
        kind, colon, action = entry.partition(":")
        if not colon or not kind or action not in ACTIONS:
            yield UserError("curate.privacy.actions", entry, f"must be KIND:ACTION, such as PERSON:pseudonym; actions are {', '.join(ACTIONS)}")
    if not settings.key_env and settings.key_file is None:
        yield UserError("curate.privacy.key_env", settings.key_env, "names no variable; give one, or curate.privacy.key_file")


def check(settings: PrivacyConfig) -> None:
    """Raises UserError for the first mistake: for those who use the room without the whole configuration."""
    for key, choices in CHOICES.items():
        if (value := getattr(settings, key.removeprefix("privacy."))) not in choices:
            raise UserError(f"curate.{key}", value, f"must be one of {', '.join(choices)}")
    if not 0 <= settings.threshold <= 1:
        raise UserError("curate.privacy.threshold", settings.threshold, "must lie in [0,1]")
    if settings.samples < 0:
        raise UserError("curate.privacy.samples", settings.samples, "must be 0 or more")
    for error in problems(settings):
        raise error
