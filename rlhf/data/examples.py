"""Records to tokens: what is trained on, what is asked, what is compared; and the rule for those that are too long."""
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from rlhf.data.records import Conversation, Message, Prompt, Ranking
from rlhf.data.template import Template


@dataclass(frozen=True)
class Example:
    """A conversation in tokens.

    Attributes:
        tokens: int64 [n]. trained: bool [n], the tokens that are learnt: the assistant's, with the end of their turn.
    """

    tokens: np.ndarray
    trained: np.ndarray


@dataclass
class Skipped:
    """Why records were left out, and how often. The texts are not kept: they may be personal."""

    counts: Counter = field(default_factory=Counter)

    def add(self, reason: str) -> None:
        self.counts[reason] += 1


def example(record: Conversation, template: Template, *, longest: int, truncate: bool, skipped: Skipped) -> Example | None:
    """The tokens of a conversation; None where it is skipped, which is counted.

    Args:
        longest: tokens it may have. truncate: cut instead of skipped: a prompt from the left, a response from the right.
    """
    turns = template.turns(record.messages)
    tokens = np.array([token for turn in turns for token in turn.tokens], dtype=np.int64)
    trained = np.array([turn.trained for turn in turns for _ in turn.tokens], dtype=bool)
    if not trained.any():
        skipped.add("empty response")
        return None
    if len(tokens) > longest:
        if not truncate:
            skipped.add(f"longer than {longest} tokens")
            return None
        first = int(trained.argmax())
        room = max(longest - (len(tokens) - first), min(first, max(longest // 4, 1)))  # the prompt keeps a quarter at least
        begin = max(first - room, 0)
        tokens, trained = tokens[begin : begin + longest], trained[begin : begin + longest]
        skipped.add(f"truncated to {longest} tokens")
    return Example(tokens, trained)


def question(messages: Sequence[Message], template: Template) -> list[int]:
    """The tokens that a response is drawn behind."""
    return template.prompt(messages)


def answered(messages: Sequence[Message], response: str, template: Template) -> tuple[list[int], list[int]]:
    """(prompt, response with the end of its turn), as generation would have them."""
    return template.prompt(messages), template.response(messages, response)


def ranked(record: Ranking, template: Template, *, longest: int, truncate: bool, skipped: Skipped) -> tuple[list[tuple[list[int], list[int]]], Ranking] | None:
    """Prompt and response tokens of each response that fits, and the ranking of those; None where fewer than two are left, which is counted."""
    kept, pairs = [], []
    for number, response in enumerate(record.responses):
        prompt, answer = answered(record.messages, response, template)
        if len(prompt) + len(answer) > longest:
            if not truncate or len(answer) >= longest:
                skipped.add(f"response longer than {longest} tokens")
                continue
            prompt = prompt[len(prompt) + len(answer) - longest :]
            skipped.add(f"prompt truncated to {longest} tokens")
        kept.append(number)
        pairs.append((prompt, answer))
    if len(kept) < 2:
        skipped.add("fewer than two responses left")
        return None
    chosen = Ranking(record.messages, tuple(record.responses[number] for number in kept), tuple(record.ranks[number] for number in kept), record.margin,
                     tuple(kept.index(number) for number in record.demonstrations if number in kept))
    return pairs, chosen


def examples(records: Iterable[Conversation], template: Template, *, longest: int, truncate: bool) -> tuple[list[Example], Skipped]:
    """All that can be trained on."""
    skipped, found = Skipped(), []
    for record in records:
        one = example(record, template, longest=longest, truncate=truncate, skipped=skipped)
        if one is not None:
            found.append(one)
    return found, skipped


__all__ = ["Example", "Prompt", "Skipped", "answered", "example", "examples", "question", "ranked"]
