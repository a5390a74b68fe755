"""What a person types, made safe for Hydra.

Hydra's override grammar reads `a,b` as a sweep and stumbles over `=`, spaces, brackets and letters beyond ASCII. The schema knows the
type of every key, so the command line reads each `key=value` by that type: text is quoted whole, a list item by item, numbers go
through. What is left for Hydra is what it does well: composing the groups of `conf/`.
"""
import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.config import build
from megatron_ext.errors import UserError

GROUPS = ("stage", "model", "parallel", "precision", "data", "curate", "optim", "cluster", "hardware", "log")
_KEY = re.compile(r"^(\+\+|\+|~)?([A-Za-z_][\w.@/]*)$")
_NUMBER = re.compile(r"^[+-]?(\d[\d_]*\.?\d*|\.\d+)([eE][+-]?\d+)?$|^[+-]?(inf|nan)$", re.IGNORECASE)


@dataclass(frozen=True)
class Override:
    """One override as Hydra gets it. `key` is a leaf of the schema, or a group (then `group` is true and `value` its option)."""

    key: str
    value: str
    group: bool

    def __str__(self) -> str:
        return f"{self.key}={self.value}" if self.group else f"++{self.key}={self.value}"


def conf_dir() -> Path:
    """The folder of Hydra groups: `conf/` beside the package in a checkout, `megatron_ext/conf` in an installed wheel."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise FileNotFoundError(f"conf/config.yaml is neither in {package} nor in {package.parent}: the installation is incomplete")


def options_of(group: str) -> list[str]:
    """The presets of a group, sorted."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def parse(text: str) -> Override:
    """Reads one `key=value`. Raises UserError for what cannot be one, an unknown key, or an unknown option of a group."""
    left, equals, value = text.partition("=")
    match = _KEY.match(left.strip())
    if match is None or (not equals and match[1] != "~"):
        raise UserError("override", text, _malformed(text))
    sign, key = match[1], match[2]
    if sign == "~":
        raise UserError("override", text, f"keys cannot be deleted; set {key}=null, or leave it out for its default")
    if key in GROUPS:
        return _group(key, value)
    hint = build.key_types().get(key)
    if hint is None:
        raise build.unknown_key(key, value)
    return Override(key, _typed(key, value, hint), group=False)


def parse_all(texts: tuple[str, ...] | list[str]) -> list[Override]:
    """Reads all overrides; the same key twice is a mistake, not a silent last-one-wins."""
    parsed = [parse(text) for text in texts]
    seen: dict[str, str] = {}
    for override, text in zip(parsed, texts, strict=True):
        if override.key in seen:
            raise UserError(override.key, text.partition("=")[2], f"was given twice (also as {seen[override.key]!r}); give it once")
        seen[override.key] = text
    return parsed


def _malformed(text: str) -> str:
    reason = "an override is key=value without spaces around the =, such as train.steps=100"
    if any(letter.isspace() for letter in text):
        return reason + "; a value with spaces is quoted for the shell: 'run.dir=my runs/a'. Free text goes by --prompt or --prompt-file"
    close = build.nearest(text.lstrip("+-"), build.key_types(), count=1)
    return reason + (f" (did you mean {close[0]}=...?)" if close else "")


def _group(group: str, option: str) -> Override:
    known = options_of(group)
    option = option.strip()
    if option not in known:
        close = difflib.get_close_matches(option, known, n=1, cutoff=0.5)
        hint = f"did you mean {group}={close[0]}? " if close else ""
        raise UserError(group, option, f"unknown; {hint}conf/{group} has {', '.join(known)}")
    return Override(group, option, group=True)


def _typed(key: str, value: str, hint: object) -> str:
    """`value` in Hydra's grammar, read as the type that the schema gives `key`."""
    kind = build.describe(hint)
    stripped = value.strip()
    if stripped.lower() == "null" and ("null" in kind):
        return "null"
    if kind.startswith("a list"):
        return _list(key, stripped, numbers="numbers" in kind)
    if "text" in kind:
        return quote(unquote(value))
    if "${" in stripped:
        return quote(stripped)
    if "," in stripped:
        raise UserError(key, value, f"must be {kind}: one value a run (sweeps are not for one run; start one run for each value)")
    scalar = unquote(stripped)
    if kind.startswith("true"):
        if scalar.lower() not in ("true", "false"):
            raise UserError(key, value, f"must be {kind}")
        return scalar.lower()
    if not _NUMBER.match(scalar):
        raise UserError(key, value, f"must be {kind}")
    return scalar


def _list(key: str, value: str, *, numbers: bool) -> str:
    if "${" in value and not value.startswith("["):
        return quote(value)
    if not (value.startswith("[") and value.endswith("]")):
        raise UserError(key, value, f"is a list: write {key}=[{value}]")
    items = split_items(value[1:-1])
    if items is None:
        raise UserError(key, value, "a quote is not closed")
    if numbers:
        wrong = next((item for item in items if not _NUMBER.match(item)), None)
        if wrong is not None:
            raise UserError(key, value, f"must be a list of numbers, such as [0.5,0.5]; {wrong!r} is not one")
        return "[" + ",".join(items) + "]"
    return "[" + ",".join(quote(unquote(item)) for item in items) + "]"


def split_items(text: str) -> list[str] | None:
    """Splits at commas outside quotes; None when a quote stays open. A quote inside a word (`don't`) is a letter."""
    items, current, open_quote = [], "", ""
    for letter in text:
        if open_quote:
            open_quote = "" if letter == open_quote else open_quote
        elif letter in "'\"" and not current.strip():
            open_quote = letter
        elif letter == ",":
            items.append(current.strip())
            current = ""
            continue
        current += letter
    if open_quote:
        return None
    return [*items, current.strip()] if items or current.strip() else []


def unquote(text: str) -> str:
    """Takes off one pair of quotes around the whole text: people quote for the shell and for Hydra at once."""
    stripped = text.strip()
    if len(stripped) >= 2 and stripped[0] == stripped[-1] and stripped[0] in "'\"" and stripped[0] not in stripped[1:-1]:
        return stripped[1:-1]
    return text


def quote(text: str) -> str:
    """Any text as a single-quoted value of Hydra's grammar (there a backslash is special only before a quote)."""
    escaped = re.sub(r"(\\*)'", lambda match: match[1] * 2 + r"\'", text)
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return "'" + escaped + "\\" * trailing + "'"
