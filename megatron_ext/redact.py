"""Secrets stay out of what is written: configurations, logs, metrics, checkpoints' records, wandb, and the words of a rank that fails.

A text or a value is taken for a secret by one of three signs, and replaced by `***`:

    its key      password, token, api_key, ... in a mapping, or before `=` or `:` in a text ("cluster.api_key=...", "'password': '...'")
    its shape    credentials in a URL, signed URLs, tokens of well-known services, JSON web tokens, bearer headers, private keys
    its value    what this process's environment holds under such a name (WANDB_API_KEY, HF_TOKEN, DATABASE_URL's password), anywhere

Numbers are never secrets, nor are counts and names (`max_tokens`, `tokenizer`, `token_file`). What looks like nothing and has no name cannot
be known: a password that is typed as the value of `run.dir` is written. Secrets belong into the environment, which is never written.
"""
import itertools
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import quote

MARK = "***"
SHORTEST = 8  # characters of a value of the environment that is looked for everywhere: shorter ones are words

_STRONG = {"password", "passwd", "passphrase", "pwd", "secret", "secrets", "credential", "credentials", "apikey", "authorization", "jwt", "cookie"}
_PAIRS = {("api", "key"), ("access", "key"), ("private", "key"), ("secret", "key"), ("auth", "key"), ("account", "key"), ("signing", "key"),
          ("encryption", "key"), ("license", "key"), ("access", "token"), ("auth", "token"), ("bearer", "token"), ("refresh", "token")}
_WEAK = {"token", "signature"}  # also words of the trade
_BESIDE = {"file", "path", "dir", "name", "type", "types", "count", "bytes", "id"}  # of something that is itself no secret
_IN_ENVIRONMENT = {"key", "pass", "auth", "pat"}
_EMPTY = {"", "null", "none", "true", "false", "~", MARK}

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
# In a text that is itself quoted, a line may begin after the two characters \\n.
_KEY = re.compile(r"(?<![\w.-])(?P<escape>(?<=\\)[nrt])?(?P<key>[A-Za-z][\w.-]*)\\?[\"']?\s*[=:]\s*(?=\S)")
_VALUE = re.compile(r"(?P<quote>\\?[\"'])(?P<quoted>(?:\\.|(?!(?P=quote)).)*)(?P=quote)|(?:(?:Bearer|Basic|Token)\s+)?[^\s\"',;&)\]}\\]+")
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?P<who>[^\s/@:\"'?#]*:[^\s/@\"']+|[^\s/@:\"'?#]{16,})@")
_SIGNED = re.compile(r"(?P<key>[?&](?:[\w-]*(?:token|signature|secret|password|apikey|api_key|credential)|sig|key|auth|code)=)[^&\s\"'#]+", re.IGNORECASE)
_SHAPES = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_[A-Za-z0-9_]{16,}|glpat-[\w-]{16,}"  # Hugging Face, GitHub, GitLab
    r"|sk-(?=[\w-]*\d)[\w-]{16,}|nvapi-[\w-]{16,}|wandb_v\d_[\w-]{16,}|local-[0-9a-f]{40}"  # OpenAI's form, NVIDIA, W&B
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[\w-]{30,}|ya29\.[\w-]{16,}|xox[a-z]-[\w-]{10,}"  # AWS, Google, Slack
    r"|npm_[A-Za-z0-9]{30,}|pypi-[\w-]{30,}|dckr_pat_[\w-]{16,}"  # registries
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"  # JSON web token
    r")|(?<=Bearer )(?=\S*\d)[\w.~+/=-]{12,}|(?<=Basic )(?=\S*[\d=])[\w+/=-]{12,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)


def is_secret_key(name: str, *, environment: bool = False) -> bool:
    """Whether what stands under this name is to be kept: `wandb_api_key`, `DB_PASSWORD`, `authToken`; not `max_tokens`, `token_file`, `text_key`.

    Args:
        environment: of a variable, where a name that merely ends in KEY says enough.
    """
    words = _words(name)
    return _says(words) is not None or environment and bool(words) and words[-1] in _IN_ENVIRONMENT


def environment_secrets(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The values that must not be written, longest first: of variables with a secret's name, and the passwords in URLs of any variable."""
    found: set[str] = set()
    for name, value in environment.items():
        if is_secret_key(name, environment=True) and not _harmless(value, numbers=False):
            found.add(value)
        for match in _URL.finditer(value):
            found.add(match["who"].partition(":")[2] or match["who"])
    found = {value for value in found if len(value) >= SHORTEST}
    return tuple(sorted(found | {quote(value, safe="") for value in found}, key=len, reverse=True))


class Redactor:
    """Replaces secrets in values. It knows the environment as it was when it was made.

    Args:
        environment: None = this process's.
        shapes: False looks for values of the environment alone: for text that people or models wrote, which must stay what it was.
    """

    def __init__(self, environment: Mapping[str, str] | None = None, *, shapes: bool = True):
        secrets = environment_secrets(os.environ if environment is None else environment)
        self._known = re.compile("|".join(map(re.escape, secrets))) if secrets else None
        self._shapes = shapes

    def __call__(self, value: object, key: str = "") -> object:
        """`value` (mappings, lists, tuples and texts, to any depth; all else as it is) without secrets; a new object where something changed.

        Args:
            key: under which it stands.
        """
        if isinstance(value, str):
            said = _says(_words(key)) if self._shapes and key else None
            return self.text(value) if said is None or _harmless(value, numbers=said == "weak") else MARK
        if isinstance(value, Mapping):
            return {self.text(name) if isinstance(name, str) else name: self(inner, str(name)) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            made: Iterable = (self(inner, key) for inner in value)
            return tuple(made) if isinstance(value, tuple) else list(made)
        return self.text(str(value)) if isinstance(value, Path) else value

    def text(self, text: str) -> str:
        if len(text) < 5:
            return text
        if self._known is not None:
            text = self._known.sub(MARK, text)
        if not self._shapes:
            return text
        if "://" in text:
            text = _URL.sub(rf"\g<scheme>{MARK}@", text)
        if "?" in text or "&" in text:
            text = _SIGNED.sub(rf"\g<key>{MARK}", text)
        text = _SHAPES.sub(MARK, text)
        return _after_keys(text) if "=" in text or ":" in text else text


def redact(value: object) -> object:
    """`value` without secrets, by the environment of now."""
    return Redactor()(value)


def redact_text(text: str) -> str:
    """A text without secrets, by the environment of now."""
    return Redactor().text(text)


def _after_keys(text: str) -> str:
    """What follows a secret's name and `=` or `:`. Values are not skipped where the name is none: in `judge:api_key=x` it is the second that counts."""
    parts, end = [], 0
    for match in _KEY.finditer(text):
        key = match["key"]
        said = _says(_words(key)) or (_says(_words(match["escape"] + key)) if match["escape"] else None)
        if match.start() < end or said is None or (value := _VALUE.match(text, match.end())) is None:
            continue
        bare = value["quoted"] if value["quote"] else value[0].rstrip(":.")
        if _harmless(bare, numbers=said == "weak") or said == "weak" and not _random(bare):
            continue
        start = match.end() + len(value["quote"] or "")
        parts += [text[end:start], MARK]
        end = start + len(bare)
    return "".join([*parts, text[end:]]) if parts else text


def _words(name: str) -> list[str]:
    return [word.lower() for word in _WORDS.findall(name)]


def _says(words: list[str]) -> str | None:
    """strong: a secret stands under this name; weak: one may (`token` is a word of the trade too); None: none."""
    if not words or words[-1] in _BESIDE:
        return None
    if not _STRONG.isdisjoint(words) or any(pair in _PAIRS for pair in itertools.pairwise(words)):
        return "strong"
    return None if _WEAK.isdisjoint(words) else "weak"


def _random(value: str) -> bool:
    """Eight characters and more, letters and digits: a token, rather than a word of the trade after "token:"."""
    return len(value) >= SHORTEST and any(c.isdigit() for c in value) and any(c.isalpha() for c in value)


def _harmless(value: str, *, numbers: bool) -> bool:
    """Nothing, a special token (`<|endoftext|>`, `[PAD]`), a file that is there, or (with `numbers`) a number."""
    if value.lower() in _EMPTY or value[:1] + value[-1:] in ("<>", "[]"):
        return True
    try:
        float(value)
        return numbers
    except ValueError:
        return value.startswith("/") and os.path.exists(value)
