"""The words of this room's own commands (`python -m megatron_ext.curate.ROOM VERB key=value ...`) into a frozen dataclass."""
import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from megatron_ext.errors import UserError

Settings = TypeVar("Settings")


def settings(kind: type[Settings], words: Sequence[str]) -> Settings:
    """Fields may be str, int, float, or a tuple of one of these (values with commas between), each also `| None`.

    Raises:
        UserError: a word without =, an unknown key (naming the nearest), a value of the wrong kind, a key that is needed and not there.
    """
    fields, hints, found = {one.name: one for one in dataclasses.fields(kind)}, typing.get_type_hints(kind), {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError("word", word, f"must be key=value; keys are {', '.join(fields)}")
        if key not in fields:
            close = difflib.get_close_matches(key, list(fields), n=1, cutoff=0.5)
            nearest = f"did you mean {close[0]}? " if close else ""
            raise UserError(key, value, f"unknown key; {nearest}known: {', '.join(fields)}")
        found[key] = _value(key, value, hints[key])
    for name, one in fields.items():
        if name not in found and one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
            raise UserError(name, "", f"is needed: {name}=...")
    return kind(**found)


def _value(key: str, text: str, hint) -> object:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if text in ("null", ""):
            return None
        hint = next(one for one in typing.get_args(hint) if one is not type(None))
    if typing.get_origin(hint) is tuple:
        return tuple(_value(key, one, typing.get_args(hint)[0]) for one in text.split(",") if one)
    try:
        return hint(text)
    except ValueError as error:
        raise UserError(key, text, {int: "must be a whole number", float: "must be a number"}.get(hint, "cannot be read")) from error


def run(verbs: Mapping[str, tuple[type, Callable]], argv: Sequence[str], page: str) -> int:
    """Runs a verb on its settings. `page` is what --help prints."""
    from megatron_ext.parallel.launch import guarded

    def body() -> int:
        if not argv or argv[0] in ("-h", "--help", "help"):
            print(page)
            return 0
        if argv[0] not in verbs:
            raise UserError("verb", argv[0], f"unknown; known: {', '.join(verbs)}")
        kind, function = verbs[argv[0]]
        return function(settings(kind, argv[1:])) or 0

    return guarded(body)
