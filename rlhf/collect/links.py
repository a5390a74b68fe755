"""Who may order answers: a token for each annotator, of which a directory only keeps the hash (`annotators.yaml`, mode 600).

A link is shown once, when it is made; `collect.renew=[NAME]` makes another and ends the old one. The token stands behind the `#` of the
link, which no browser sends and no server logs.
"""
import hashlib
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from megatron_ext.errors import UserError
from megatron_ext.files import write_whole

FILE = "annotators.yaml"


def ready(folder: Path, names: Sequence[str], renew: Sequence[str] = ()) -> tuple[dict[str, str], dict[str, str]]:
    """({hash: name} of those who may come in now, {name: token} of tokens that were made just now).

    Raises:
        UserError: the file is damaged, or cannot be written.
    """
    path = folder / FILE
    held = _read(path)
    made = {name: secrets.token_urlsafe(24) for name in names if name not in held or name in renew}
    if made:
        held = held | {name: _hash(token) for name, token in made.items()}
        try:
            write_whole(path, yaml.safe_dump(held, allow_unicode=True), mode=0o600)
        except OSError as error:
            raise UserError("input", path, f"cannot be written: {error.strerror}") from None
    return {held[name]: name for name in names}, made


def who(token: str, allowed: Mapping[str, str]) -> str | None:
    """The annotator with this token. Looked up by its hash: how long that takes says nothing about a token."""
    return allowed.get(_hash(token))


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def _read(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError("input", path, f"cannot be read ({type(error).__name__})") from None
    if not isinstance(found, dict) or not all(isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) for value in found.values()):
        raise UserError("input", path, "is damaged: a name and a sha256 a line; without the file everyone gets a new link")
    return {str(name): value for name, value in found.items()}
