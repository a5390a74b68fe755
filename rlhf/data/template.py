"""Chat templates: messages to tokens, as Hugging Face's (Jinja in a sandbox), cut where a turn of the assistant begins and ends.

A conversation is rendered up to each turn of the assistant with `add_generation_prompt`, and once more with the turn; the difference is the turn. Both
sides are tokenised on their own, so that the prompt that generation gets is, token by token, the beginning of what training saw. (Where a tokenizer
would merge over that border, the ids are not those of the whole text tokenised at once: generation could not have produced them.)

What is learnt is all that the assistant has to write behind such a prompt, to the first special token after its words, which ends the turn. A template
that writes none there gets the end-of-document token: generation has to learn where to stop. `Template.end` is that token.

Every turn of the assistant that follows a question is learnt. Some templates write earlier turns otherwise than the last one (without its reasoning, or
with the system message moved on); such a conversation is read whole, and only its last turn is learnt. Where even that one does not begin with its
prompt the template is refused. Special tokens of the tokenizer count as such where the template writes them, never where a message does.

`strftime_now` is there, as in transformers: a template that writes the date makes other prompts tomorrow.
"""
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import ClassVar

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import UserError
from rlhf.data.fields import Message

KEY = "chat.template"
# Roles in words: works with every tokenizer, needs no token of its own but the end of a document.
DEFAULT = (
    "{% for message in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{% if message.role == 'assistant' %}Answer: {{ message.content }}{{ eos_token }}"
    "{% elif message.role == 'system' %}{{ message.content }}{{ '\\n' }}"
    "{% else %}Question: {{ message.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\\nAnswer:' }}{% endif %}"
)
BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]")  # what a template without a tokenizer_config.json may mean by bos_token
_ANSWER = "\ufdd2"  # U+FDD0 and its like are no characters and stand in no text
# A template is a program: it may divide by zero.
_FAILURES = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
_PROBE = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


class Refused(UserError):
    """The template itself says that it does not take these messages (`raise_exception`)."""


@dataclass(frozen=True)
class Turn:
    """A piece of a conversation in tokens. trained: whether the assistant says it."""

    tokens: list[int]
    trained: bool


class Template:
    """A template with its tokenizer.

    Args:
        source: the Jinja text. name: for messages.
        bos, eos: what it writes for bos_token and eos_token; None = the tokenizer's.

    Raises:
        UserError: not a template.
    """

    def __init__(self, tokenizer: Tokenizer, source: str = DEFAULT, *, name: str = "(ours)", bos: str | None = None, eos: str | None = None):
        self._tokenizer, self.source, self.name = tokenizer, source, name
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation])
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        environment.filters["tojson"] = lambda value, **settings: json.dumps(value, **{"ensure_ascii": False} | settings)
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise UserError(KEY, name, f"is no Jinja template: {error}") from None
        self._special = tokenizer.special_tokens()
        self._cut = re.compile("|".join(map(re.escape, sorted(self._special, key=len, reverse=True))))
        self._bos = next((text for text in BOS_NAMES if text in self._special), tokenizer.eod_text) if bos is None else bos
        self._eos = tokenizer.eod_text if eos is None else eos

    @classmethod
    def of(cls, tokenizer: Tokenizer, path: str | None) -> "Template":
        """`chat.template`: a file of Jinja, or a tokenizer_config.json that holds one or has a chat_template.jinja beside it; None = ours.

        Raises:
            UserError: none there, not a template, or one that ends turns with a token that the tokenizer has not.
        """
        if path is None:
            return cls(tokenizer)
        text = _read(Path(path))
        if Path(path).suffix != ".json":
            return cls(tokenizer, text, name=path)
        try:
            config = json.loads(text)
        except (ValueError, RecursionError):
            raise UserError(KEY, path, "is no JSON") from None
        found = config.get("chat_template") if isinstance(config, dict) else None
        if isinstance(found, list):  # several, by name
            found = next((one.get("template") for one in found if isinstance(one, dict) and one.get("name") == "default"), None)
        beside = Path(path).with_name("chat_template.jinja")
        if found is None and beside.is_file():
            found = _read(beside)
        if not isinstance(found, str):
            raise UserError(KEY, path, "has no chat_template, or none that is a text or named default")
        bos, eos = (one["content"] if isinstance(one, dict) and "content" in one else one for one in (config.get("bos_token"), config.get("eos_token")))
        if eos is not None and eos not in tokenizer.special_tokens():
            raise UserError(KEY, path, f"ends a turn with {eos}, which is no special token of data.tokenizer: the template is another tokenizer's. Its "
                                       "Jinja text alone, in a file that ends in .jinja, writes ours")
        return cls(tokenizer, found, name=path, bos=bos or "", eos=eos)

    @property
    def end(self) -> int:
        """The token that ends a turn of the assistant: where generation has to stop."""
        return self.response(_PROBE[:1], _PROBE[1]["content"])[-1]

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The text.

        Raises:
            Refused: by the template. UserError: it fails on these messages.
        """
        try:
            return self._template.render(messages=[dict(message) for message in messages], add_generation_prompt=add_generation_prompt,
                                         eos_token=self._eos, bos_token=self._bos, tools=None, documents=None)
        except _FAILURES as error:
            said = str(error)
            if any(message["content"].strip() and message["content"].strip() in said for message in messages):
                said = type(error).__name__  # a message's text may be personal
            kind = Refused if isinstance(error, _Refusal) else UserError
            raise kind(KEY, self.name, f"fails on a conversation of {', '.join(message['role'] for message in messages)}: {said}") from None

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids up to where the assistant begins to speak."""
        hidden, said = self._hide(messages)
        return [token for turn in self._asked(hidden, said)[0] for token in turn.tokens]

    def response(self, messages: Sequence[Message], text: str) -> list[int]:
        """Token ids of a response to `messages`, with the end of its turn."""
        return self.answers(messages, [text])[1][0]

    def answers(self, messages: Sequence[Message], texts: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """(`prompt`, `response` of each text), the prompt read once. Raises as `turns`."""
        hidden, said = self._hide([*messages, *({"role": "assistant", "content": text} for text in texts)])
        asked = hidden[: len(messages)]
        turns, told = self._asked(asked, said)
        # What a template writes behind a response belongs to the next turn.
        found = [[turn for turn in self._answer([*asked, one], told, said) if turn.trained][-1].tokens for one in hidden[len(messages) :]]
        return [token for turn in turns for token in turn.tokens], found

    def turns(self, messages: Sequence[Message]) -> list[Turn]:
        """A conversation that ends with the assistant, in pieces: what it is told, what it says, and so on. Raises UserError as `render`, and
        where the template writes a turn otherwise than it asked for it."""
        hidden, said = self._hide(messages)
        turns, told = self._asked(hidden[:-1], said)
        return turns + self._answer(hidden, told, said)

    def _answer(self, hidden: list[dict], told: str, said: dict[str, str]) -> list[Turn]:
        whole = self.render(hidden)
        if not whole.startswith(told):
            raise UserError(KEY, self.name, "does not render a longer conversation as the shorter one and what follows: what is learnt would begin "
                                            "otherwise than what is asked")
        return self._said(whole[len(told) :], hidden, said)

    def _asked(self, hidden: list[dict], said: dict[str, str]) -> tuple[list[Turn], str]:
        """All that stands before the assistant's next turn: in pieces, earlier turns among them where they can be cut out, and as text."""
        whole = self.render(hidden, add_generation_prompt=True)
        found, told = [], ""
        for number, message in enumerate(hidden):
            if message["role"] != "assistant" or all(before["role"] in ("assistant", "system") for before in hidden[:number]):
                continue
            asked = self.render(hidden[:number], add_generation_prompt=True)
            spoken = self.render(hidden[: number + 1])
            if not (asked.startswith(told) and spoken.startswith(asked) and whole.startswith(spoken)):
                return [Turn(self._encode(whole, said), False)], whole
            found += [Turn(self._encode(asked[len(told) :], said), False), *self._said(spoken[len(asked) :], hidden[: number + 1], said)]
            told = spoken
        found.append(Turn(self._encode(whole[len(told) :], said), False))
        return [turn for turn in found if turn.tokens], whole

    def _said(self, spoken: str, hidden: list[dict], said: dict[str, str]) -> list[Turn]:
        """What the assistant says, up to the first special token behind it; the rest of the template's text is not learnt.

        Args:
            spoken: the text of its turn, the last of `hidden`.
        """
        end = self._cut.search(spoken, self._words_end(spoken, hidden))
        if end is None:
            return [Turn([*self._encode(spoken, said), self._tokenizer.eod], True)]
        turns = [Turn(self._encode(spoken[: end.end()], said), True), Turn(self._encode(spoken[end.end() :], said), False)]
        return [turn for turn in turns if turn.tokens]

    def _words_end(self, spoken: str, hidden: list[dict]) -> int:
        """Where the message ends in the text of its turn. A template that ignores add_generation_prompt has special tokens before it."""
        first, words = self._cut.search(spoken), hidden[-1]["content"].strip()
        if first is None or spoken.lstrip().startswith(words):
            return len(spoken) - len(spoken.lstrip()) + len(words) if first else 0
        marked = self.render([*hidden[:-1], {**hidden[-1], "content": _ANSWER}])
        behind = marked.rpartition(_ANSWER)[2]
        return len(spoken) - len(behind) if _ANSWER in marked and spoken.endswith(behind) else [*self._cut.finditer(spoken)][-1].start()

    def _hide(self, messages: Sequence[Message]) -> tuple[list[dict], dict[str, str]]:
        """Messages whose spelled-out special tokens stand for themselves, so that they are not taken for real ones."""
        said: dict[str, str] = {}

        def hide(match: re.Match) -> str:
            mark = f"\ufdd0{len(said)}\ufdd1"
            said[mark] = match[0]
            return mark

        return [{**message, "content": self._cut.sub(hide, message["content"])} for message in messages], said

    def _encode(self, text: str, said: dict[str, str]) -> list[int]:
        tokens: list[int] = []
        place = 0
        for match in self._cut.finditer(text):
            tokens += [*self._plain(text[place : match.start()], said), self._special[match[0]]]
            place = match.end()
        return tokens + self._plain(text[place:], said)

    def _plain(self, text: str, said: dict[str, str]) -> list[int]:
        for mark, original in said.items():
            text = text.replace(mark, original)
        return self._tokenizer.encode(text) if text else []


class _Refusal(jinja2.TemplateError):
    """What `raise_exception` raises."""


def _refuse(message: str) -> None:
    raise _Refusal(message)


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}, with which some templates mark the assistant's words: taken, and not needed."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(KEY, path, f"cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8 text'})") from None
