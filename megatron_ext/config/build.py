"""Plain dictionaries (YAML, composed overrides) into the frozen dataclasses of `schema`, with strict types, and back.

Every mistake is a `UserError` that names the full dotted key: an unknown key comes with the nearest known one, a wrong type with
the type that is right. Nothing is coerced but what loses nothing: 3 for a float, 1e9 for an int, a list for a tuple.
"""
import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Mapping

from megatron_ext.config.schema import Config
from megatron_ext.errors import UserError


@functools.cache
def key_types() -> dict[str, object]:
    """Dotted name -> type of every leaf: `{"train.steps": int, "data.paths": tuple[str, ...], ...}`."""
    found: dict[str, object] = {}

    def walk(cls: type, prefix: str) -> None:
        hints = typing.get_type_hints(cls)
        for spec in dataclasses.fields(cls):
            hint = hints[spec.name]
            if dataclasses.is_dataclass(hint):
                walk(hint, f"{prefix}{spec.name}.")
            else:
                found[prefix + spec.name] = hint

    walk(Config, "")
    return found


def sections() -> tuple[str, ...]:
    """Names of the groups of keys: `("stage", "model", ...)`."""
    return tuple(dict.fromkeys(key.split(".")[0] for key in key_types() if "." in key))


def nearest(word: str, known: typing.Iterable[str], *, count: int = 3) -> list[str]:
    """The known words most like `word`, best first. A dotted word is also compared by its last part alone (`steps` -> `train.steps`)."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=count, cutoff=0.6)
    last = word.rsplit(".", 1)[-1]
    by_last: dict[str, list[str]] = {}
    for name in known:
        by_last.setdefault(name.rsplit(".", 1)[-1], []).append(name)
    for match in difflib.get_close_matches(last, list(by_last), n=2, cutoff=0.75):
        close += [name for name in by_last[match] if name not in close]
    return close[:count]


def unknown_key(key: str, value: object) -> UserError:
    """The error for a key that is not in the schema."""
    close = nearest(key, key_types())
    if key in sections():
        members = [name for name in key_types() if name.startswith(key + ".")]
        return UserError(key, value, f"is a group of keys; set one of them, such as {members[0]}")
    reason = f"unknown key; did you mean {' or '.join(close)}?" if close else f"unknown key; the groups are {', '.join(sections())}"
    return UserError(key, value, reason)


def describe(hint: object) -> str:
    """A type as a person says it: `int | None` -> "a whole number or null"."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}
    if isinstance(hint, types.UnionType):
        return " or ".join(describe(arg) for arg in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        inner = {str: "texts", float: "numbers", int: "whole numbers"}[typing.get_args(hint)[0]]
        return f"a list of {inner}, such as {'[a,b]' if inner == 'texts' else '[0.5,0.5]'}"
    return names[hint]


def convert(key: str, value: object, hint: object) -> object:
    """`value` as the type `hint`. Raises UserError when that would change it."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        plain = [arg for arg in typing.get_args(hint) if arg is not types.NoneType]
        assert len(plain) == 1, hint
        try:
            return convert(key, value, plain[0])
        except UserError as error:
            raise UserError(error.key, error.value, f"must be {describe(hint)}") from None
    if typing.get_origin(hint) is tuple:
        if isinstance(value, list | tuple):
            return tuple(convert(f"{key}[{i}]", item, typing.get_args(hint)[0]) for i, item in enumerate(value))
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise UserError(key, show(value), f"must be {describe(hint)}")


def show(value: object) -> str:
    """A value as the user would type it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ",".join(show(item) for item in value) + "]"
    return str(value)


def from_dict(values: Mapping[str, object], cls: type = Config, prefix: str = "") -> Config:
    """Nested dictionaries into `Config`; what is absent keeps the schema's default. Raises UserError."""
    hints = typing.get_type_hints(cls)
    given: dict[str, object] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in hints:
            raise unknown_key(key, show(value))
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, Mapping):
                raise unknown_key(key, show(value))
            given[name] = from_dict(value, hints[name], key + ".")
        else:
            given[name] = convert(key, value, hints[name])
    return cls(**given)


def to_dict(config: Config) -> dict[str, object]:
    """Nested dictionaries of plain values (tuples as lists), ready for YAML or JSON."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    return plain(dataclasses.asdict(config))
