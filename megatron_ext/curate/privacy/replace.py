"""What stands in the place of what was found: a tag, a mask, or a pseudonym by a keyed hash."""
import base64
import hashlib
import hmac
import os
import re
from collections.abc import Mapping
from pathlib import Path

from megatron_ext.curate.privacy import kinds
from megatron_ext.curate.privacy.config import PrivacyConfig
from megatron_ext.curate.privacy.normal import Normal
from megatron_ext.errors import UserError

SHORTEST_KEY = 16  # bytes
_LENGTH = 10  # characters of a pseudonym: 50 bits; among a million values of one kind two meet with a chance of 0.04 %
_JUNK = re.compile(r"[\s\-.·/()_,~:]+")
_DIGITS = re.compile(r"\D+")
_MASKED = re.compile(r"[^\W_]")


class Key:
    """A secret that shows itself nowhere: not in a repr, not in a pickle, not in an error.

    Raises:
        UserError: there is none, or it is too short.
    """

    __slots__ = ("_key",)

    def __init__(self, key: bytes):
        self._key = key

    @classmethod
    def read(cls, settings: PrivacyConfig) -> "Key":
        if settings.key_file is not None:
            try:
                key = Path(settings.key_file).read_bytes().strip()
            except OSError as error:
                raise UserError("curate.privacy.key_file", settings.key_file, f"cannot be read: {error.strerror}") from None
            name, value = "curate.privacy.key_file", settings.key_file
        else:
            key = os.environ.get(settings.key_env, "").strip().encode("utf-8", "surrogateescape")
            name, value = "curate.privacy.key_env", settings.key_env
            if not key:
                raise UserError(name, value, f"pseudonyms need a key: put {SHORTEST_KEY} random bytes and more into that variable, or name a file in curate.privacy.key_file")
        if len(key) < SHORTEST_KEY:
            raise UserError(name, value, f"holds a key of {len(key)} bytes; take at least {SHORTEST_KEY} random ones (openssl rand -hex 32)")
        return cls(key)

    @classmethod
    def found(cls, settings: PrivacyConfig) -> "Key | None":
        """The key where one is set, else None. Raises UserError: it cannot be read, or is too short."""
        given = settings.key_file is not None or os.environ.get(settings.key_env, "").strip()
        return cls.read(settings) if given else None

    def __repr__(self) -> str:
        return "Key(***)"

    def __reduce__(self):
        raise TypeError("a key is not sent to another process; each reads it")

    def digest(self, plain: str) -> str:
        """64 hexadecimal digits in the place of a hash that could be tried out."""
        return hmac.new(self._key, f"document\0{plain}".encode(), hashlib.sha256).hexdigest()

    def pseudonym(self, kind: str, value: str) -> str:
        """Lower-case letters and digits; the same for the same kind, value and key."""
        digest = hmac.new(self._key, f"{kind}\0{value}".encode("utf-8", "surrogatepass"), hashlib.sha256).digest()
        return base64.b32encode(digest).decode("ascii")[:_LENGTH].lower()


def canonical(kind: str, value: str) -> str:
    """One form of all spellings of a value: +82 10-1234-5678 and 010 1234 5678 are one number."""
    value = Normal(value).text
    if kind == kinds.PHONE:
        number = _DIGITS.sub("", value)
        if "+" in value or number.startswith("82"):
            number = number.removeprefix("82")
        return number.lstrip("0")
    if kind == kinds.PERSON and value.isascii():
        return " ".join(re.sub(r"[.,]", " ", value.lower()).split())
    if kind == kinds.EMAIL:
        return "".join(value.lower().split())
    return _JUNK.sub("", value.lower())


def mask(value: str) -> str:
    """Every letter and digit as *, separators as they are, so that lines stay where they were."""
    return _MASKED.sub("*", value)


class Replacer:
    """Args: actions: of the rules' files, in their order."""

    def __init__(self, settings: PrivacyConfig, actions: Mapping[str, str]):
        self._default = settings.action
        self._actions = {**actions, **dict(entry.split(":", 1) for entry in settings.actions)}
        self._korean = settings.tags == "ko"
        wanted = {self._default, *self._actions.values()}
        self._key = Key.read(settings) if "pseudonym" in wanted else None

    def action(self, kind: str) -> str:
        return self._actions.get(kind, self._default)

    def name(self, kind: str) -> str:
        return kinds.KOREAN.get(kind, kind) if self._korean else kind

    def __call__(self, kind: str, value: str, action: str | None = None) -> str:
        """The words in place of `value`."""
        action = action or self.action(kind)
        if action == "mask":
            return mask(value)
        if action == "pseudonym":
            return f"[{self.name(kind)}:{self._key.pseudonym(kind, canonical(kind, value))}]"
        return value if action == "keep" else f"[{self.name(kind)}]"
