"""Rollouts: the policy answers prompts, on the weights that it is trained with.

Every response has a number of its own for the whole run, and draws from a generator seeded by (generate.seed, number): what is drawn
depends on neither the layout nor the other responses, never repeats from one iteration to the next, and is the same after a resume.
"""
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from megatron_ext.config.schema import Config, GenerateConfig
from megatron_ext.data.order import permutation
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.generate import Completion, generate
from megatron_ext.train.engine import Engine
from rlhf.experience import Sequence_

HELD_OUT = 1 << 40  # numbers of responses to held-out prompts: the same draws at each validation, and never those of training


@dataclass(frozen=True)
class Question:
    """A prompt as the policy gets it. `text` and `reference` are what reward functions read; `record`: whatever else its line held."""

    tokens: list[int]
    text: str
    reference: str | None = None
    record: Mapping = field(default_factory=dict)


@dataclass(frozen=True)
class Rollouts:
    """What one call generated: episodes, prompt after prompt, `samples` of each.

    Attributes:
        questions, completions: of each episode.
        groups: int64 [n], the prompt of each. offsets: [n + 1], where each response lies among all response tokens.
        generated: fp32 [tokens], logprobs under the distribution that was sampled from.
    """

    questions: list[Question]
    completions: list[Completion]
    groups: Tensor
    offsets: list[int]
    generated: Tensor

    @property
    def sequences(self) -> list[Sequence_]:
        return [Sequence_(np.array([*one.prompt, *one.tokens], dtype=np.int64), len(one.prompt)) for one in self.completions]

    @property
    def lengths(self) -> list[int]:
        """Response tokens of each."""
        return [len(one.tokens) for one in self.completions]

    @property
    def words(self) -> Tensor:
        """int64 [tokens]: how many words each was drawn from."""
        return torch.tensor([words for one in self.completions for words in one.words], dtype=torch.int64)

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.tensor(self.offsets, dtype=torch.int32)

    @property
    def ended(self) -> list[bool]:
        """Which responses ended by themselves."""
        return [one.stop in ("eod", "stop_string") for one in self.completions]


def roll_out(engine: Engine, questions: Sequence[Question], settings: GenerateConfig, *, samples: int, first: int, tokenizer: Tokenizer | None,
             eod: int | None = None, leave: Callable[[], object] | None = None) -> Rollouts:
    """`samples` responses to each question. Collective over the engine's ranks; the same on all of them.

    Args:
        first: number of the first response. eod: the token that ends a turn; the tokenizer's where None. leave: see `generate`.
    """
    count = len(questions) * samples
    completions = generate(engine, [question.tokens for question in questions], replace(settings, samples=samples), tokenizer=tokenizer, eod=eod,
                           sample_ids=range(first, first + count), pack=False, leave=leave)
    offsets = np.cumsum([0, *(len(one.tokens) for one in completions)]).tolist()
    return Rollouts(
        [question for question in questions for _ in range(samples)], completions, torch.arange(len(questions)).repeat_interleave(samples),
        offsets, torch.tensor([logprob for one in completions for logprob in one.logprobs], dtype=torch.float32),
    )


def keeps(settings: GenerateConfig) -> dict | None:
    """Where the words that top-k and top-p leave are remembered, where they cut any."""
    return {} if settings.top_k > 0 or settings.top_p < 1 else None


def choose(questions: Sequence[Question], *, first: int, count: int, seed: int) -> list[Question]:
    """Prompts number first .. first + count of an endless order that takes each once an epoch, in a new order each time."""
    found = []
    for number in range(first, first + count):
        epoch, place = divmod(number, len(questions))
        found.append((epoch, place))
    orders = {epoch: permutation(len(questions), seed, epoch, "prompts") for epoch in {epoch for epoch, _ in found}}
    return [questions[int(orders[epoch][place])] for epoch, place in found]


def longest_prompt(config: Config) -> int:
    """Tokens that a prompt may have."""
    room = config.model.max_sequence_length - config.generate.max_tokens
    return min(room, config.rollout.max_prompt) if config.rollout.max_prompt is not None else room
