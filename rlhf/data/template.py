"""Chat templates: messages to tokens, as Hugging Face's (Jinja in a sandbox), cut where a turn of the assistant begins and ends.

A conversation is rendered up to each turn of the assistant with `add_generation_prompt`, and once more with the turn; the difference is the turn. Both
sides are tokenised on their own, so that the prompt that generation gets is, token by token, the beginning of what training saw. A template that is
not built so (the longer rendering does not begin with the shorter one) is refused by name. Special tokens of the tokenizer count as such where
the template writes them, never where a message does.
"""
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import UserError
from rlhf.data.records import Message

KEY = "chat.template"
# Roles in words: works with every tokenizer, needs no token of its own but the end of a document.
DEFAULT = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}Answer: {{ message.content }}{{ eos_token }}{% if not loop.last %}{{ '\\n' }}{% endif %}"
    "{% elif message.role == 'system' %}{{ message.content }}{{ '\\n\\n' }}"
    "{% else %}Question: {{ message.content }}{{ '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}"
)
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")


@dataclass(frozen=True)
class Turn:
    """A piece of a conversation in tokens. trained: whether the assistant says it."""

    tokens: list[int]
    trained: bool


class Template:
    """A template with its tokenizer.

    Args:
        source: the Jinja text. name: for messages.

    Raises:
        UserError: not a template.
    """

    def __init__(self, tokenizer: Tokenizer, source: str = DEFAULT, *, name: str = "(ours)"):
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self._tokenizer, self.source, self.name = tokenizer, source, name
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
        environment.filters["tojson"] = lambda value, **settings: json.dumps(value, ensure_ascii=False, **settings)
        try:
            self._template = environment.from_string(_GENERATION.sub("", source))
        except jinja2.TemplateError as error:
            raise UserError(KEY, name, f"is no Jinja template: {error}") from None
        self._special = tokenizer.special_tokens()
        names = sorted(self._special, key=len, reverse=True)
        self._cut = re.compile("|".join(map(re.escape, names)))

    @classmethod
    def of(cls, tokenizer: Tokenizer, path: str | None) -> "Template":
        """`chat.template`: a file of Jinja, or a tokenizer_config.json that holds one; None = ours. Raises UserError."""
        if path is None:
            return cls(tokenizer)
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(KEY, path, f"cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8 text'})") from None
        if Path(path).suffix == ".json":
            try:
                found = json.loads(text)["chat_template"]
            except (ValueError, KeyError, TypeError):
                raise UserError(KEY, path, "has no chat_template") from None
            if isinstance(found, list):  # several, by name
                found = next((one.get("template") for one in found if isinstance(one, dict) and one.get("name") == "default"), None)
            if not isinstance(found, str):
                raise UserError(KEY, path, "its chat_template is no text and has none named default")
            text = found
        return cls(tokenizer, text, name=path)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The text. Raises UserError where the template fails on these messages."""
        import jinja2

        try:
            return self._template.render(messages=[dict(message) for message in messages], add_generation_prompt=add_generation_prompt,
                                         eos_token=self._tokenizer.eod_text, bos_token=self._tokenizer.eod_text, tools=None, documents=None)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise UserError(KEY, self.name, f"fails on a conversation of {', '.join(message['role'] for message in messages)}: {error}") from None

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids up to where the assistant begins to speak."""
        return [token for turn in self._turns(messages, ask=True) for token in turn.tokens]

    def response(self, messages: Sequence[Message], text: str) -> list[int]:
        """Token ids of a response to `messages`, with the end of its turn."""
        turns = self._turns([*messages, {"role": "assistant", "content": text}], ask=False)
        return [turn for turn in turns if turn.trained][-1].tokens  # what a template writes behind it belongs to the next turn

    def turns(self, messages: Sequence[Message]) -> list[Turn]:
        """A conversation that ends with the assistant, in pieces: what it is told, what it says, and so on."""
        return self._turns(messages, ask=False)

    def _turns(self, messages: Sequence[Message], *, ask: bool) -> list[Turn]:
        hidden, said = self._hide(messages)
        found, before = [], ""
        for number, message in enumerate(hidden):
            if message["role"] != "assistant":
                continue
            asked = self._after(before, self.render(hidden[:number], add_generation_prompt=True))
            told = before + asked
            spoken = self._after(told, self.render(hidden[: number + 1]))
            found += [Turn(self._encode(asked, said), False), *self._said(spoken, said)]
            before = told + spoken
        if ask:
            found.append(Turn(self._encode(self._after(before, self.render(hidden, add_generation_prompt=True)), said), False))
        return [turn for turn in found if turn.tokens]

    def _said(self, spoken: str, said: dict[str, str]) -> list[Turn]:
        """What the assistant says, up to the first special token behind it; the rest of the template's text is not learnt."""
        end = self._cut.search(spoken)
        if end is None:
            return [Turn([*self._encode(spoken, said), self._tokenizer.eod], True)]  # generation has to learn where to stop
        return [Turn(self._encode(spoken[: end.end()], said), True), Turn(self._encode(spoken[end.end() :], said), False)]

    def _after(self, before: str, whole: str) -> str:
        if not whole.startswith(before):
            raise UserError(KEY, self.name, "does not render a longer conversation as the shorter one and what follows: what is learnt would begin "
                                            "otherwise than what is asked")
        return whole[len(before) :]

    def _hide(self, messages: Sequence[Message]) -> tuple[list[dict], dict[str, str]]:
        """Messages whose spelled-out special tokens stand for themselves, so that they are not taken for real ones."""
        said: dict[str, str] = {}

        def hide(match: re.Match) -> str:
            mark = f"\ue000{len(said)}\ue001"
            said[mark] = match[0]
            return mark

        return [{**message, "content": self._cut.sub(hide, message["content"])} for message in messages], said

    def _encode(self, text: str, said: dict[str, str]) -> list[int]:
        tokens: list[int] = []
        place = 0
        for match in self._cut.finditer(text):
            tokens += self._plain(text[place : match.start()], said) + [self._special[match[0]]]
            place = match.end()
        return tokens + self._plain(text[place:], said)

    def _plain(self, text: str, said: dict[str, str]) -> list[int]:
        for mark, original in said.items():
            text = text.replace(mark, original)
        return self._tokenizer.encode(text) if text else []


def _raise(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)
