"""Records to tokens: what is trained on, what is asked, what is compared; and the rule for those that are too long.

`chat.overlong=skip` leaves them out. With `truncate` the prompt gives way first, from the left, down to a quarter of the limit; then the response is cut
from the right, and with it the end of its turn, so that nobody learns to stop there. In a conversation of several turns all that follows the first
question counts as response. The responses of a ranking see the same prompt, cut for the longest of them: none has an advantage by what it was shown.

What a template refuses (`raise_exception`: roles that do not alternate) is skipped and counted too.

Tokens are kept in memory, 9 bytes each: 100,000 examples of 250 tokens are 225 MB on each rank.
"""
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from rlhf.data.records import Conversation, Message, Prompt, Ranking
from rlhf.data.template import Refused, Template


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
    try:
        turns = template.turns(record.messages)
    except Refused as error:
        skipped.add(f"the template {error.reason}")
        return None
    tokens = np.array([token for turn in turns for token in turn.tokens], dtype=np.int64)
    trained = np.array([turn.trained for turn in turns for _ in turn.tokens], dtype=bool)
    if len(tokens) > longest:
        if not truncate:
            skipped.add(f"longer than {longest} tokens")
            return None
        first = int(trained.argmax())
        begin = first - _room(first, len(tokens) - first, longest)
        tokens, trained = tokens[begin : begin + longest], trained[begin : begin + longest]
        if not trained[1:].any():
            skipped.add(f"nothing of its response is left in {longest} tokens")
            return None
        skipped.add(f"truncated to {longest} tokens")
    return Example(tokens, trained)


def _room(prompt: int, response: int, longest: int) -> int:
    """Tokens of the prompt that are kept: what the response leaves, and a quarter of the limit at least."""
    return min(prompt, max(longest - response, longest // 4, 1))


def question(messages: Sequence[Message], template: Template) -> list[int]:
    """The tokens that a response is drawn behind."""
    return template.prompt(messages)


def answered(messages: Sequence[Message], response: str, template: Template) -> tuple[list[int], list[int]]:
    """(prompt, response with the end of its turn), as generation would have them."""
    prompt, answers = template.answers(messages, [response])
    return prompt, answers[0]


def ranked(record: Ranking, template: Template, *, longest: int, truncate: bool, skipped: Skipped) -> tuple[list[tuple[list[int], list[int]]], Ranking] | None:
    """Prompt and response tokens of each response that fits, and the ranking of those; None where fewer than two are left, which is counted."""
    try:
        prompt, answers = template.answers(record.messages, record.responses)
    except Refused as error:
        skipped.add(f"the template {error.reason}")
        return None
    if truncate:
        room = _room(len(prompt), max(map(len, answers)), longest)
        if len(prompt) > room:
            skipped.add(f"prompt truncated to fit into {longest} tokens")
            prompt = prompt[len(prompt) - room :]
        for number, answer in enumerate(answers):
            if room + len(answer) > longest:
                skipped.add(f"response truncated to fit into {longest} tokens")
                answers[number] = answer[: longest - room]
    kept = [number for number, answer in enumerate(answers) if len(prompt) + len(answer) <= longest]
    for _ in range(len(answers) - len(kept)):
        skipped.add(f"response longer than {longest} tokens")
    pairs = [(prompt, answers[number]) for number in kept]
    if len(kept) < 2:
        skipped.add("fewer than two responses left")
        return None
    if truncate and len({tuple(answer) for _, answer in pairs}) < 2:
        skipped.add(f"its responses are the same in {longest} tokens")
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
