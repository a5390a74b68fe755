"""What people have, as records of three kinds: conversations to learn from, rankings to compare, prompts to answer.

A file holds JSON lines (.jsonl, .ndjson), a JSON list (.json) or comma-separated values (.csv), each also with .gz behind it. Formats, told apart by the
fields of each record unless `chat.format` says which:

    prompt_response   {prompt, response}: the columns that chat.prompt_key and chat.response_key name (any CSV)
    messages          {messages: [{role, content}, ...]}                               as Hugging Face and OpenAI
    alpaca            {instruction, input, output}
    sharegpt          {conversations: [{from, value}, ...]}
    preference        {chosen, rejected}, with or without a prompt: texts, Anthropic HH dialogues ("\\n\\nHuman: ..."), or messages; `margin`
    ranking           {prompt, responses: [...], ranking: [...]}: positions (or ids of responses {id, text}), best first; a list within it is a tie
    prompts           {prompt} (and what reward functions read: reference, tests, ...)

A record that cannot be used is named by file and line, counted and skipped; more than `chat.max_bad_records` refuse the file. Its text is never
shown: it may be personal.
"""
import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ext.config.schema import ChatConfig
from megatron_ext.data.decompress import file_chunks, lines
from megatron_ext.data.read import BadRecords
from megatron_ext.errors import UserError

Message = Mapping[str, str]
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant"}
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv")
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


class Bad(ValueError):
    """Why a record cannot be used."""


def read(path: Path, chat: ChatConfig, kind: type, *, key: str = "chat.path") -> tuple[list, BadRecords]:
    """All records of a file or a directory of files.

    Args:
        kind: Conversation | Ranking | Prompt.
    Raises:
        UserError: nothing there, a file that cannot be read, too many bad records, no good one.
    """
    found, bad = [], BadRecords(limit=chat.max_bad_records)
    for file in _files(Path(path), key):
        for line, value in _values(file, bad):
            try:
                found.append(parse(value, chat, kind))
            except Bad as error:
                _note(bad, file, line, str(error), chat)
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
    if not messages[-1]["content"].strip():
        raise Bad("has an empty response")
    return Conversation(messages)


# ---- files ---------------------------------------------------------------------------------------------------------------------------


def _files(path: Path, key: str) -> list[Path]:
    def readable(file: Path) -> bool:
        suffixes = [suffix.lower() for suffix in file.suffixes]
        return bool(suffixes) and (suffixes[-2] if suffixes[-1] == ".gz" and len(suffixes) > 1 else suffixes[-1]) in SUFFIXES

    if not path.exists():
        raise UserError(key, path, "is not there; name a file or directory of records")
    if path.is_file():
        if not readable(path):
            raise UserError(key, path, f"is of an unknown kind; readable are {', '.join(SUFFIXES)}, each also with .gz")
        return [path]
    found = sorted(file for file in path.rglob("*") if file.is_file() and readable(file))
    if not found:
        raise UserError(key, path, f"holds no readable file; readable are {', '.join(SUFFIXES)}, each also with .gz")
    return found


def _values(file: Path, bad: BadRecords) -> Iterator[tuple[int, object]]:
    kind = file.suffixes[-2].lower() if file.suffix.lower() == ".gz" else file.suffix.lower()
    if kind in (".jsonl", ".ndjson"):
        for number, line in enumerate(lines(file_chunks(file)), start=1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError):
                    bad.add(file, number, "is no JSON")
        return
    content = b"".join(file_chunks(file))
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError("chat.path", file, f"is not UTF-8 text (byte {error.start})") from None
    if kind == ".csv":
        rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            for row in rows:
                yield rows.line_num, {name: cell for name, cell in row.items() if name is not None and cell is not None}
        except csv.Error as error:
            raise UserError("chat.path", file, f"is no CSV (line {rows.line_num}: {error})") from None
        return
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError("chat.path", file, "is no JSON; one object a line is .jsonl") from None
    if not isinstance(values, list):
        raise UserError("chat.path", file, "is no JSON list of records")
    yield from enumerate(values, start=1)


def _note(bad: BadRecords, file: Path, line: int, reason: str, chat: ChatConfig) -> None:
    try:
        bad.add(file, line, reason)
    except UserError:
        raise UserError("chat.max_bad_records", chat.max_bad_records, f"{bad.count} records cannot be used, the latest {file}:{line}: {reason}; mend "
                                                                      "the file or raise the limit") from None


# ---- formats -------------------------------------------------------------------------------------------------------------------------


def _format(value: dict, chat: ChatConfig) -> str:
    if chat.format != "auto":
        return chat.format
    for layout, fields in (("preference", ("chosen", "rejected")), ("ranking", ("responses",)), ("messages", ("messages",)),
                           ("sharegpt", ("conversations",)), ("alpaca", ("instruction", "output")),
                           ("prompt_response", (chat.prompt_key, chat.response_key)), ("prompts", (chat.prompt_key,))):
        if all(name in value for name in fields):
            return layout
    raise Bad(f"has none of the known fields; columns of other names are given by chat.prompt_key={chat.prompt_key} and "
              f"chat.response_key={chat.response_key}")


def _text(value: dict, name: str) -> str:
    found = value.get(name)
    if not isinstance(found, str):
        raise Bad(f"its {name} is {'missing' if found is None else 'no text'}")
    return found


def _messages(found: object, name: str) -> tuple[Message, ...]:
    if not isinstance(found, list) or not found:
        raise Bad(f"its {name} is no list of messages")
    messages = []
    for one in found:
        if not isinstance(one, dict):
            raise Bad(f"its {name} holds something that is no message")
        role, content = one.get("role", one.get("from")), one.get("content", one.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise Bad(f"a message of its {name} has no role or no text")
        messages.append({"role": ROLES.get(role.lower(), role.lower()), "content": content})
    return tuple(messages)


def _asked(value: dict, chat: ChatConfig) -> tuple[Message, ...]:
    """The prompt of prompt_response, preference, ranking and prompts: a text, or messages."""
    found = value.get(chat.prompt_key)
    if isinstance(found, list):
        return _system(_messages(found, chat.prompt_key), chat)
    prompt = _text(value, chat.prompt_key)
    if not prompt.strip():
        raise Bad("has an empty prompt")
    return _system(({"role": "user", "content": prompt},), chat)


def _system(messages: tuple[Message, ...], chat: ChatConfig) -> tuple[Message, ...]:
    if chat.system is None or messages and messages[0]["role"] == "system":
        return messages
    return ({"role": "system", "content": chat.system}, *messages)


def _conversation(value: dict, layout: str, chat: ChatConfig) -> tuple[Message, ...]:
    if layout == "messages":
        return _system(_messages(value.get("messages"), "messages"), chat)
    if layout == "sharegpt":
        return _system(_messages(value.get("conversations"), "conversations"), chat)
    if layout == "alpaca":
        asked = _text(value, "instruction")
        more = value.get("input")
        prompt = f"{asked}\n\n{more}" if isinstance(more, str) and more.strip() else asked
        if not prompt.strip():
            raise Bad("has an empty prompt")
        return _system(({"role": "user", "content": prompt}, {"role": "assistant", "content": _text(value, "output")}), chat)
    return (*_asked(value, chat), {"role": "assistant", "content": _text(value, chat.response_key)})


def _prompt(value: dict, layout: str, chat: ChatConfig) -> Prompt:
    known = {"messages", "conversations", "chosen", "rejected", chat.prompt_key, "responses", "ranking"}
    rest = {name: one for name, one in value.items() if name not in known}
    reference = value.get("reference") if isinstance(value.get("reference"), str) else None
    if layout == "prompts":
        return Prompt(_asked(value, chat), reference, rest)
    if layout in ("preference", "ranking"):
        found = _preference(value, chat) if layout == "preference" else _ranking(value, chat)
        return Prompt(found.messages, reference or found.responses[found.ranks.index(min(found.ranks))], rest)
    messages = _conversation(value, layout, chat)
    if messages[-1]["role"] == "assistant":
        reference, messages = reference or messages[-1]["content"], messages[:-1]
    if not messages:
        raise Bad("has no prompt")
    return Prompt(messages, reference, rest)


def _preference(value: dict, chat: ChatConfig) -> Ranking:
    chosen, rejected = value.get("chosen"), value.get("rejected")
    if isinstance(chosen, str) and isinstance(rejected, str) and chat.prompt_key not in value:
        chosen, rejected = _dialogue(chosen), _dialogue(rejected)
    if isinstance(chosen, str) and isinstance(rejected, str):
        messages, responses = _asked(value, chat), (chosen, rejected)
    else:
        ours, theirs = _messages(list(chosen) if isinstance(chosen, tuple) else chosen, "chosen"), _messages(
            list(rejected) if isinstance(rejected, tuple) else rejected, "rejected")
        shared = 0
        while shared < min(len(ours), len(theirs)) and ours[shared] == theirs[shared]:
            shared += 1
        while shared and ours[shared - 1]["role"] == "assistant":
            shared -= 1  # a prompt ends with what was asked
        messages = _system(ours[:shared], chat)
        if chat.prompt_key in value and not shared:
            messages = _asked(value, chat)
        if not messages:
            raise Bad("chosen and rejected do not begin with the same prompt")
        responses = (_spoken(ours[shared:]), _spoken(theirs[shared:]))
    if not all(response.strip() for response in responses):
        raise Bad("has an empty response")
    if responses[0] == responses[1]:
        raise Bad("chosen and rejected are the same")
    return Ranking(messages, responses, (0, 1), _margin(value))


def _dialogue(text: str) -> list[dict]:
    """The turns of an Anthropic HH dialogue."""
    parts = _TURN.split(text if text.startswith("\n\n") else f"\n\n{text}")
    if len(parts) < 3 or parts[0].strip():
        raise Bad('is no dialogue of "\\n\\nHuman:" and "\\n\\nAssistant:", and has no prompt')
    return [{"role": "user" if name == "Human" else "assistant", "content": said.strip()} for name, said in zip(parts[1::2], parts[2::2])]


def _spoken(turns: tuple[Message, ...]) -> str:
    """What follows the prompt, as one text: dialogues may part before their last turn."""
    first, *rest = [turn["content"] for turn in turns] or [""]
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
        if not isinstance(name, int | str):
            raise Bad(f"the id of response {number} is no number and no text")
        responses.append(text)
        ids.append(name)
    if len(responses) < 2:
        raise Bad("has only one response")
    if len(set(ids)) < len(ids):
        raise Bad("two responses have the same id")
    order = value.get("ranking", list(ids))
    if not isinstance(order, list):
        raise Bad("its ranking is no list")
    ranks: dict[object, int] = {}
    for place, entry in enumerate(order):
        for name in entry if isinstance(entry, list) else [entry]:
            if not isinstance(name, int | str) or name not in ids:
                raise Bad(f"its ranking names a response that is not there ({str(name)[:20]})" if isinstance(name, int) else
                          "its ranking names a response that is not there")
            if name in ranks:
                raise Bad("its ranking names a response twice")
            ranks[name] = place
    kept = [number for number, name in enumerate(ids) if name in ranks]  # responses that nobody ranked are left out
    if len(kept) < 2:
        raise Bad("ranks fewer than two responses")
    shown = value.get("demonstration", value.get("demonstrations", []))
    marked = {shown} if isinstance(shown, int | str) and not isinstance(shown, bool) else set(shown) if isinstance(shown, list) else set()
    return Ranking(_asked(value, chat), tuple(responses[number] for number in kept), tuple(ranks[ids[number]] for number in kept), _margin(value),
                   tuple(place for place, number in enumerate(kept) if ids[number] in marked))


def _margin(value: dict) -> float | None:
    margin = value.get("margin")
    if margin is None:
        return None
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin < float("inf"):
        raise Bad("its margin is no number of at least 0")
    return float(margin)
