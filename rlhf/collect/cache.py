"""Replies by the hash of what was asked, on disk before they are used: nothing is asked twice, and a run that was killed goes on.

The hash is over model, messages, sampling and the number of the draw, not over endpoint and key: a model that moves is not asked again.
"""
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from megatron_ext.errors import UserError
from rlhf.collect.budget import Budget, Usage
from rlhf.collect.log import AppendLog

FILE = "cache.log"  # not .jsonl: no stage should take it for records


@dataclass(frozen=True)
class Request:
    """One reply that is wanted. draw: 0, 1, ... of the same question. sampling: max_tokens, temperature, top_p, stop; of a checkpoint of our own top_k and seed."""

    key: str
    messages: tuple[Mapping[str, str], ...]
    draw: int
    sampling: Mapping[str, object]

    @classmethod
    def of(cls, model: str, messages: Sequence[Mapping[str, str]], draw: int, sampling: Mapping[str, object]) -> "Request":
        asked = {"model": model, "messages": [dict(message) for message in messages], "draw": draw, "sampling": dict(sampling)}
        text = json.dumps(asked, ensure_ascii=False, sort_keys=True)
        return cls(hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(), tuple(messages), draw, sampling)


@dataclass(frozen=True)
class Reply:
    """text: of the assistant's turn. stop: why it ended: stop | length | ..."""

    text: str
    stop: str
    usage: Usage


class Cache:
    """Replies in a directory. Raises UserError: another process writes into it, or a line is no reply."""

    def __init__(self, folder: Path, budget: Budget):
        self._log = AppendLog(folder / FILE, key="output")
        self._places: dict[bytes, tuple[int, int]] = {}
        self._budget = budget
        for number, (offset, size, record) in enumerate(self._log.records(), start=1):
            try:
                budget.spend(Usage(*(int(record[name]) for name in ("prompt_tokens", "reply_tokens", "requests"))))
                if "lost" not in record:
                    Reply(record["text"].strip(), record["stop"].strip(), Usage())
                    self._places[bytes.fromhex(record["key"])] = (offset, size)
            except (KeyError, TypeError, ValueError, AttributeError):
                self._log.close()
                raise UserError("output", f"{self._log.path}:{number}", "is no reply that was kept: take the line out by hand, and it is asked for anew") from None

    def __contains__(self, key: str) -> bool:
        return bytes.fromhex(key) in self._places

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: str) -> Reply:
        record = self._log.at(*self._places[bytes.fromhex(key)])
        return Reply(record["text"], record["stop"], Usage(record["prompt_tokens"], record["reply_tokens"]))

    def put(self, request: Request, reply: Reply) -> None:
        """On disk when it returns, and spent."""
        place = self._log.append({"key": request.key, "text": reply.text, "stop": reply.stop, "prompt_tokens": reply.usage.prompt,
                                  "reply_tokens": reply.usage.reply, "requests": reply.usage.requests})
        self._places[bytes.fromhex(request.key)] = place
        self._budget.spend(reply.usage)

    def lose(self, request: Request, usage: Usage) -> None:
        """A request that was sent and of whose reply nothing is known: it counts."""
        self._log.append({"key": request.key, "lost": True, "prompt_tokens": usage.prompt, "reply_tokens": usage.reply, "requests": usage.requests})
        self._budget.spend(usage)

    def close(self) -> None:
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()
