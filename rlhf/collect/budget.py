"""How much an endpoint may be asked for, over all runs into a directory: requests, tokens, money. It is never gone over.

Before a request is sent, the most that it can cost is set aside: its prompt's bytes (no byte-level tokenizer makes more tokens than bytes,
and each message has a few of its own) and `max_tokens`. When the reply says what it was, the rest is given back. A request whose reply was
lost counts whole.
"""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_ext.config.schema import CollectConfig

OF_MESSAGE = 16  # tokens around a message that a chat template may add


@dataclass(frozen=True)
class Usage:
    """Tokens of a prompt and of a reply."""

    prompt: int = 0
    reply: int = 0
    requests: int = 1


def most(messages: Sequence[Mapping[str, str]], max_tokens: int) -> Usage:
    """The most that a request can use."""
    return Usage(sum(len(message["content"].encode("utf-8", "surrogatepass")) + OF_MESSAGE for message in messages) + OF_MESSAGE, max_tokens)


class Budget:
    """What may be spent, what was, and what is set aside. Attributes: reached: the key of the limit that stopped a request, or None."""

    def __init__(self, settings: CollectConfig):
        self.settings = settings
        self.requests = self.prompt = self.reply = 0
        self._aside: list[Usage] = []
        self.reached: str | None = None

    @property
    def cost(self) -> float:
        return self._cost(self.prompt, self.reply)

    def _cost(self, prompt: int, reply: int) -> float:
        return (prompt * self.settings.price_in + reply * self.settings.price_out) / 1e6

    def spend(self, usage: Usage) -> None:
        """What a reply used, or a lost one may have."""
        self.requests += usage.requests
        self.prompt += usage.prompt
        self.reply += usage.reply

    def over(self, usage: Usage, *, alone: bool = False) -> str | None:
        """The key of a limit that `usage` could go over, or None. alone: as if nothing were under way."""
        aside = [] if alone else self._aside
        settings = self.settings
        requests = self.requests + len(aside) + usage.requests
        prompt, reply = (self.prompt + usage.prompt + sum(one.prompt for one in aside), self.reply + usage.reply + sum(one.reply for one in aside))
        if settings.max_requests is not None and requests > settings.max_requests:
            return "collect.max_requests"
        if settings.max_tokens is not None and prompt + reply > settings.max_tokens:
            return "collect.max_tokens"
        if settings.max_cost is not None and self._cost(prompt, reply) > settings.max_cost * (1 + 1e-12):
            return "collect.max_cost"
        return None

    def set_aside(self, usage: Usage) -> None:
        self._aside.append(usage)

    def give_back(self, usage: Usage) -> None:
        self._aside.remove(usage)

    def facts(self) -> dict:
        found = {"requests": self.requests, "prompt_tokens": self.prompt, "reply_tokens": self.reply}
        return found | ({"cost": round(self.cost, 6)} if self.settings.price_in or self.settings.price_out else {})
