"""Fields of a record: text and messages, or the reason why they are not. Reasons never hold a record's text."""
from collections.abc import Mapping

from megatron_ext.config.schema import ChatConfig

Message = Mapping[str, str]
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant", "developer": "system",
         **{name: name for name in ("system", "user", "assistant", "tool")}}


class Bad(ValueError):
    """Why a record cannot be used."""


def text(value: dict, name: str) -> str:
    """A field that has to be text."""
    found = value.get(name)
    if not isinstance(found, str):
        raise Bad(f"its {name} is {'missing' if found is None else 'no text'}")
    return found


def messages(found: object, name: str) -> tuple[Message, ...]:
    """A list of {role, content} (or {from, value})."""
    if not isinstance(found, list) or not found:
        raise Bad(f"its {name} is no list of messages")
    read = []
    for one in found:
        if not isinstance(one, dict):
            raise Bad(f"its {name} holds something that is no message")
        role, content = one.get("role", one.get("from")), one.get("content", one.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise Bad(f"a message of its {name} has no role or no text")
        if role.lower() not in ROLES:
            raise Bad(f"a message of its {name} has an unknown role; known are {', '.join(ROLES)}")
        read.append({"role": ROLES[role.lower()], "content": content})
    return tuple(read)


def asks(said: tuple[Message, ...]) -> bool:
    """Whether anybody but the assistant says something."""
    return any(message["role"] in ("user", "tool") and message["content"].strip() for message in said)


def answerable(prompt: tuple[Message, ...]) -> tuple[Message, ...]:
    """A prompt as it is. Raises Bad where nobody asks anything, or the assistant has answered already."""
    if not asks(prompt):
        raise Bad("has an empty prompt")
    if prompt[-1]["role"] == "assistant":
        raise Bad("its prompt ends with a response")
    return prompt


def asked(value: dict, chat: ChatConfig) -> tuple[Message, ...]:
    """The prompt of prompt_response, preference, ranking and prompts: a text, or messages."""
    found = value.get(chat.prompt_key)
    if isinstance(found, list):
        return system(answerable(messages(found, chat.prompt_key)), chat)
    return system(answerable(({"role": "user", "content": text(value, chat.prompt_key)},)), chat)


def system(said: tuple[Message, ...], chat: ChatConfig) -> tuple[Message, ...]:
    """With the system message of the configuration, where it has none of its own."""
    if chat.system is None or said and said[0]["role"] == "system":
        return said
    return ({"role": "system", "content": chat.system}, *said)
