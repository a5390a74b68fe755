"""What people have, as records of three kinds: conversations to learn from, rankings to compare, prompts to answer.

Formats of what `files.py` reads, told apart by the fields of each record unless `chat.format` says which:

    prompt_response   {prompt, response}: the columns that chat.prompt_key and chat.response_key name (any CSV)
    messages          {messages: [{role, content}, ...]}                               as Hugging Face and OpenAI
    alpaca            {instruction, input, output}
    sharegpt          {conversations: [{from, value}, ...]}
    preference        {chosen, rejected}, with or without a prompt: texts, Anthropic HH dialogues ("\\n\\nHuman: ..."), or messages; `margin`
    ranking           {prompt, responses: [...], ranking: [...]}: positions (or ids of responses {id, text}), best first; a list within it is a tie;
                      responses that it does not name are left out; without a ranking they stand best first
    prompts           {prompt} (and what reward functions read: reference, tests, ...)

Comparisons may have a `margin`, and say which responses are demonstrations: `demonstration` (or `demonstrations`): positions or ids, or true for the
best. Dialogues that part before their last turn are compared from there on, further turns written out as HH does. A message's role is system, user,
assistant or tool, or one of the names that ShareGPT has for them.

A record that cannot be used (a field missing or of another type, an empty prompt or response, one response only, unknown ids) is named by file and
line, counted and skipped; more than `chat.max_bad_records` refuse the file. Its text is never shown: it may be personal.
"""
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ext.config.schema import ChatConfig
from megatron_ext.data.read import BadRecords
from megatron_ext.errors import UserError
from rlhf.data import fields, files
from rlhf.data.fields import Bad, Message

_TURN = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True)
class Conversation:
    """Messages that end with one of the assistant's."""

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Ranking:
    """Responses to one prompt. ranks: 0 is best, equal is a tie. demonstrations: which were given as examples of a good answer."""

    messages: tuple[Message, ...]
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    margin: float | None = None
    demonstrations: tuple[int, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """What is to be answered. reference: a known answer. record: all other fields."""

    messages: tuple[Message, ...]
    reference: str | None = None
    record: Mapping = field(default_factory=dict)


KINDS = {"sft": Conversation, "reward": Ranking, "dpo": Ranking, "ppo": Prompt, "grpo": Prompt, "rloo": Prompt}
EXPECTED = {
    Conversation: "prompt and response, messages, instruction and output, or conversations",
    Ranking: "chosen and rejected, or prompt, responses and ranking",
    Prompt: "a prompt, or any of the formats of conversations and rankings",
}


def read(path: Path, chat: ChatConfig, kind: type, *, key: str = "chat.path") -> tuple[list, BadRecords]:
    """All records of a file or a directory of files.

    Args:
        kind: Conversation | Ranking | Prompt. They are all kept in memory, some hundred bytes beside their text: meant for up to some 100,000.
        key: names `path` in messages. Files that `chat.validation` names are left out of any other directory.
    Raises:
        UserError: nothing there, a file that cannot be read, too many bad records, no good one.
    """
    found, bad = [], files.Skips(limit=chat.max_bad_records)
    held_out = Path(chat.validation) if chat.validation and key != "chat.validation" else None
    for file in files.find(Path(path), key=key, without=held_out):
        for line, value in files.values(file, bad, key=key):
            try:
                found.append(parse(value, chat, kind))
            except Bad as error:
                bad.add(file, line, str(error))
    if not found:
        seen = f"; {bad.count} records were unusable, the first {bad.places[0]}" if bad.count else ""
        raise UserError(key, path, f"holds no record with {EXPECTED[kind]}{seen}")
    return found, bad


def parse(value: object, chat: ChatConfig, kind: type):
    """One record. Raises Bad."""
    if not isinstance(value, dict):
        raise Bad("is no object with fields")
    layout = _format(value, chat)
    if kind is Ranking:
        if layout not in ("preference", "ranking"):
            raise Bad(f"has no {EXPECTED[Ranking]}")
        return _preference(value, chat) if layout == "preference" else _ranking(value, chat)
    if kind is Prompt:
        return _prompt(value, layout, chat)
    if layout in ("preference", "ranking", "prompts"):
        raise Bad(f"has no {EXPECTED[Conversation]}")
    messages = _conversation(value, layout, chat)
    if messages[-1]["role"] != "assistant":
        raise Bad("does not end with a response")
    if not all(message["content"].strip() for message in messages if message["role"] == "assistant"):
        raise Bad("has an empty response")
    if not fields.asks(messages):
        raise Bad("has an empty prompt")
    return Conversation(messages)


# ---- formats -------------------------------------------------------------------------------------------------------------------------


def _format(value: dict, chat: ChatConfig) -> str:
    if chat.format != "auto":
        return chat.format
    for layout, names in (("preference", ("chosen", "rejected")), ("ranking", ("responses",)), ("messages", ("messages",)),
                           ("sharegpt", ("conversations",)), ("alpaca", ("instruction", "output")),
                           ("prompt_response", (chat.prompt_key, chat.response_key)), ("prompts", (chat.prompt_key,))):
        if all(name in value for name in names):
            return layout
    raise Bad(f"has none of the known fields; columns of other names are given by chat.prompt_key={chat.prompt_key} and "
              f"chat.response_key={chat.response_key}")


def _conversation(value: dict, layout: str, chat: ChatConfig) -> tuple[Message, ...]:
    if layout == "messages":
        return fields.system(fields.messages(value.get("messages"), "messages"), chat)
    if layout == "sharegpt":
        return fields.system(fields.messages(value.get("conversations"), "conversations"), chat)
    if layout == "alpaca":
        asked = fields.text(value, "instruction")
        more = value.get("input")
        prompt = f"{asked}\n\n{more}" if isinstance(more, str) and more.strip() else asked
        return fields.system(({"role": "user", "content": prompt}, {"role": "assistant", "content": fields.text(value, "output")}), chat)
    return (*fields.asked(value, chat), {"role": "assistant", "content": fields.text(value, chat.response_key)})


def _prompt(value: dict, layout: str, chat: ChatConfig) -> Prompt:
    known = {"messages", "conversations", "chosen", "rejected", chat.prompt_key, "responses", "ranking"}
    rest = {name: one for name, one in value.items() if name not in known}
    reference = value.get("reference")
    if reference is not None and not isinstance(reference, str):
        reference = str(reference) if isinstance(reference, int | float) and not isinstance(reference, bool) else None
    if layout == "prompts":
        return Prompt(fields.asked(value, chat), reference, rest)
    if layout in ("preference", "ranking"):
        found = _preference(value, chat) if layout == "preference" else _ranking(value, chat)
        return Prompt(found.messages, reference or found.responses[found.ranks.index(min(found.ranks))], rest)
    messages = _conversation(value, layout, chat)
    if messages[-1]["role"] == "assistant":
        reference, messages = reference or messages[-1]["content"], messages[:-1]
    return Prompt(fields.answerable(messages), reference, rest)


def _preference(value: dict, chat: ChatConfig) -> Ranking:
    chosen, rejected = value.get("chosen"), value.get("rejected")
    if isinstance(chosen, str) and isinstance(rejected, str) and chat.prompt_key not in value:
        chosen, rejected = _dialogue(chosen), _dialogue(rejected)
    if isinstance(chosen, str) and isinstance(rejected, str):
        messages, responses = fields.asked(value, chat), (chosen, rejected)
    else:
        ours, theirs = fields.messages(chosen, "chosen"), fields.messages(rejected, "rejected")
        shared = 0
        while shared < min(len(ours), len(theirs)) and ours[shared] == theirs[shared]:
            shared += 1
        while shared and ours[shared - 1]["role"] == "assistant":
            shared -= 1  # a prompt ends with what was asked
        if chat.prompt_key in value and not shared:
            messages = fields.asked(value, chat)
        elif fields.asks(ours[:shared]):
            messages = fields.system(ours[:shared], chat)
        else:
            raise Bad("chosen and rejected do not begin with the same prompt")
        if ours[-1]["role"] != "assistant" or theirs[-1]["role"] != "assistant":
            raise Bad("does not end with a response")
        responses = (_spoken(ours[shared:]), _spoken(theirs[shared:]))
    if not all(response.strip() for response in responses):
        raise Bad("has an empty response")
    if responses[0] == responses[1]:
        raise Bad("chosen and rejected are the same")
    return Ranking(messages, responses, (0, 1), _margin(value), _demonstrations(value, [0, 1], (0, 1), (0, 1)))


def _dialogue(text: str) -> list[dict]:
    """The turns of an Anthropic HH dialogue."""
    parts = _TURN.split(text if text.startswith("\n\n") else f"\n\n{text}")
    if len(parts) < 3 or parts[0].strip():
        raise Bad('is no dialogue of "\\n\\nHuman:" and "\\n\\nAssistant:", and has no prompt')
    return [{"role": "user" if name == "Human" else "assistant", "content": said.strip()} for name, said in zip(parts[1::2], parts[2::2])]


def _spoken(turns: tuple[Message, ...]) -> str:
    """What follows the prompt, as one text: dialogues may part before their last turn."""
    first, *rest = [turn["content"] for turn in turns]
    names = {"user": "Human", "assistant": "Assistant"}
    return first + "".join(f"\n\n{names.get(turn['role'], turn['role'])}: {said}" for turn, said in zip(turns[1:], rest))


def _ranking(value: dict, chat: ChatConfig) -> Ranking:
    given = value.get("responses")
    if not isinstance(given, list):
        raise Bad("its responses are no list")
    responses, ids = [], []
    for number, one in enumerate(given):
        name, text = (one.get("id", number), one.get("text", one.get("content"))) if isinstance(one, dict) else (number, one)
        if not isinstance(text, str):
            raise Bad(f"response {number} is no text")
        if not text.strip():
            raise Bad(f"response {number} is empty")
        if not _is_id(name):
            raise Bad(f"the id of response {number} is no number and no text")
        responses.append(text)
        ids.append(name)
    if len(responses) < 2:
        raise Bad("has only one response")
    if len(set(ids)) < len(ids):
        raise Bad("two responses have the same id")
    order = value.get("ranking", ids)
    if not isinstance(order, list):
        raise Bad("its ranking is no list")
    ranks: dict[object, int] = {}
    for place, entry in enumerate(order):
        for name in entry if isinstance(entry, list) else [entry]:
            if not _is_id(name) or name not in ids:
                raise Bad("its ranking names a response that is not there" + (f" ({name})" if isinstance(name, int) else ""))
            if name in ranks:
                raise Bad("its ranking names a response twice")
            ranks[name] = place
    kept = [number for number, name in enumerate(ids) if name in ranks]  # responses that nobody ranked are left out
    if len(kept) < 2:
        raise Bad("ranks fewer than two responses")
    chosen = [ranks[ids[number]] for number in kept]
    return Ranking(fields.asked(value, chat), tuple(responses[number] for number in kept), tuple(chosen), _margin(value),
                   _demonstrations(value, ids, kept, chosen))


def _is_id(name: object) -> bool:
    return isinstance(name, int | str) and not isinstance(name, bool)


def _demonstrations(value: dict, ids: list, kept: Sequence[int], ranks: Sequence[int]) -> tuple[int, ...]:
    """Which of the kept responses are demonstrations.

    Args:
        ids: of all responses. kept: numbers of those that are ranked, with their `ranks`.
    """
    shown = value.get("demonstration", value.get("demonstrations"))
    if shown is None or shown is False:
        return ()
    if shown is True:
        return tuple(place for place, rank in enumerate(ranks) if rank == min(ranks))
    names = shown if isinstance(shown, list) else [shown]
    if not all(_is_id(name) and name in ids for name in names):
        raise Bad("its demonstration is a response that is not there")
    return tuple(place for place, number in enumerate(kept) if ids[number] in names)


def _margin(value: dict) -> float | None:
    margin = value.get("margin")
    if margin is None:
        return None
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin < float("inf"):
        raise Bad("its margin is no number of at least 0")
    return float(margin)
