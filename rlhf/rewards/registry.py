"""Reward functions by name, and how a configuration asks for them.

    @reward("shouting")
    def shouting(prompt: str, response: str, *, reference: str | None, record: Mapping, least: float = 0.5) -> float:

A function gets a prompt, one response to it, the record's `reference` answer, and the record itself; what follows are its settings, read by the type
of their annotation. It returns a finite number.

`rewards.functions` holds entries `NAME`, `NAME:SETTING=VALUE:SETTING=VALUE`, and `MODULE:FUNCTION` of the user's own, with settings alike:

    rewards.functions=[length:target=40:unit=words,exact_match,mypackage.rewards:politeness:least=0.3]

Only `:` followed by a word and `=` begins a setting, so that a regular expression may hold colons (`[:]word=` where that very text is meant). An
entry with a comma is quoted. A module of the user's own is imported, and what it does there is the user's business. Nothing is evaluated.
"""
import difflib
import importlib
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from megatron_ext.config.schema import RewardsConfig
from megatron_ext.errors import UserError

KEY = "rewards.functions"
GIVEN = ("reference", "record")  # keywords that are no settings
_ENTRY = re.compile(r"(?P<name>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(?::(?P<function>[A-Za-z_]\w*))?(?P<settings>(?::[A-Za-z_]\w*=.*)?)", re.DOTALL)
_WHOLE, _NUMBER = re.compile(r"[+-]?\d+"), re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


class Unanswerable(ValueError):
    """A function cannot judge a response, for a reason that holds no text of anybody: "the record has no reference". Counted as failed."""


@dataclass(frozen=True)
class Reward:
    """A function that can be asked for. `verify(settings, timeout)` raises ValueError for settings that cannot work."""

    function: Callable[..., float]
    verify: Callable[[dict, float], None] | None = None


REWARDS: dict[str, Reward] = {}


def reward(name: str, *, verify: Callable[[dict, float], None] | None = None) -> Callable[[Callable[..., float]], Callable[..., float]]:
    """Registers a function under `name`."""

    def register(function: Callable[..., float]) -> Callable[..., float]:
        if name in REWARDS:
            raise ValueError(f"reward function {name} is registered twice")
        REWARDS[name] = Reward(function, verify)
        return function

    return register


@dataclass(frozen=True)
class Asked:
    """An entry of `rewards.functions`, understood.

    Attributes:
        name: of its metric `reward_<name>`, unlike all others of the run.
        settings: with their types, without those at their defaults.
    """

    name: str
    entry: str
    function: Callable[..., float]
    settings: dict = field(default_factory=dict)

    def __call__(self, prompt: str, response: str, *, reference: str | None, record: Mapping) -> float:
        return self.function(prompt, response, reference=reference, record=record, **self.settings)


def check(rewards: RewardsConfig) -> tuple[Asked, ...]:
    """Everything about `rewards.functions` that can be known before a response is there. No torch (but what modules of the user's own import).

    Raises:
        UserError: an unknown function or setting, a value of the wrong type, a module or function that is not there, settings that cannot work.
    """
    found = resolve(rewards.functions)
    for asked in found:
        verify = next((one.verify for one in REWARDS.values() if one.function is asked.function), None)
        if verify is not None:
            defaults = {name: one.default for name, one in _settings(asked.function).items()}
            try:
                verify(defaults | asked.settings, rewards.timeout)
            except ValueError as error:
                raise UserError(KEY, asked.entry, str(error)) from error
    return found


def resolve(entries: Sequence[str]) -> tuple[Asked, ...]:
    """Functions and settings of the entries, in their order. Raises UserError as `check`, but does not try whether the settings can work."""
    found: list[Asked] = []
    for entry in entries:
        match = _ENTRY.fullmatch(entry)
        if match is None:
            raise UserError(KEY, entry, "is no NAME, NAME:SETTING=VALUE or MODULE:FUNCTION; such as length:target=40 or mypackage.rewards:politeness")
        function = _own(entry, match["name"], match["function"]) if match["function"] else _known(entry, match["name"])
        settings = _read(entry, function, match["settings"])
        _fits(entry, function, settings)
        name, taken = match["function"] or match["name"].replace(".", "_"), [one.name for one in found]
        number = next(number for number in range(1, len(entries) + 2) if (name if number == 1 else f"{name}_{number}") not in taken)
        found.append(Asked(name if number == 1 else f"{name}_{number}", entry, function, settings))
    return tuple(found)


def _known(entry: str, name: str) -> Callable[..., float]:
    if name in REWARDS:
        return REWARDS[name].function
    close = difflib.get_close_matches(name, REWARDS, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    raise UserError(KEY, entry, f"{hint}known are {', '.join(sorted(REWARDS))}; one of your own is MODULE:FUNCTION")


def _own(entry: str, module: str, name: str) -> Callable[..., float]:
    try:
        place = importlib.import_module(module)
    except ModuleNotFoundError as error:
        where = "is not there" if module == error.name or module.startswith(f"{error.name}.") else f"needs module {error.name}, which is not there"
        raise UserError(KEY, entry, f"module {module} {where}; it must be on PYTHONPATH, or in the folder where `python -m megatron_ext` starts") from error
    except Exception as error:  # whatever a user's module does while it is imported
        raise UserError(KEY, entry, f"module {module} cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(place, name, None)
    if callable(function):
        return function
    if function is not None:
        raise UserError(KEY, entry, f"{name} of module {module} is no function but a {type(function).__name__}")
    names = [other for other, one in vars(place).items() if inspect.isfunction(one) and one.__module__ == module]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    raise UserError(KEY, entry, f"module {module} has no function {name}" + (f"; did you mean {close[0]}?" if close else ""))


# ---- settings ----------------------------------------------------------------------------------------------------------------------

def _settings(function: Callable) -> dict[str, inspect.Parameter]:
    """The parameters that a configuration may set."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # built in C
        return {}
    return {name: one for name, one in parameters.items() if one.kind is one.KEYWORD_ONLY and name not in GIVEN}


def _read(entry: str, function: Callable, text: str) -> dict:
    known, found = _settings(function), {}
    anything = any(one.kind is one.VAR_KEYWORD for one in _parameters(function))
    hints = _hints(function)
    for part in re.split(r":(?=[A-Za-z_]\w*=)", text)[1:]:
        name, _, value = part.partition("=")
        if name in found:
            raise UserError(KEY, entry, f"setting {name} is given twice")
        if name not in known and (not anything or name in GIVEN):
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UserError(KEY, entry, f"{hint}setting {name} is unknown; " + (f"known are {', '.join(known)}" if known else "there are none"))
        default = known[name].default if name in known else None
        found[name] = _typed(entry, name, value, hints.get(name), default)
    return found


def _fits(entry: str, function: Callable, settings: dict) -> None:
    """Whether the function can be called at all."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind("", "", reference=None, record={}, **settings)
    except TypeError as error:
        raise UserError(KEY, entry, f"cannot be called as function(prompt, response, *, reference, record, ...): {error}") from error


def _parameters(function: Callable) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return []


def _hints(function: Callable) -> dict[str, object]:
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError, AttributeError):
        return {}


def _typed(entry: str, name: str, text: str, hint: object, default: object) -> object:
    """`text` as the annotated type says; without one as the default's; without either a boolean, a number or text, whichever it looks like."""
    kinds = set(typing.get_args(hint)) if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union else {hint} - {None}
    if not kinds and default not in (None, inspect.Parameter.empty):
        kinds = {type(default)}
    if types.NoneType in kinds and text == "null":
        return None
    kinds -= {types.NoneType}
    order = [kind for kind in (bool, int, float, str) if not kinds or kind in kinds]
    for kind in order:
        if kind is str:
            return text
        if kind is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind is int and _WHOLE.fullmatch(text):
            return int(text)
        if kind is float and _NUMBER.fullmatch(text) and math.isfinite(float(text)):
            return float(text)
    if not order:
        raise UserError(KEY, entry, f"setting {name} cannot be given in a configuration: it is no text, number or truth value")
    words = " or ".join({bool: "true or false", int: "a whole number", float: "a number"}[kind] for kind in order)
    raise UserError(KEY, entry, f"setting {name}={text} must be {words}")
