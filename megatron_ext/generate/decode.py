"""Completions of prompts by the training model, in whatever layout it lives.

Prompts are sorted by length and dealt to the data ranks; each replica works through them in groups of rows. With P pipeline stages P groups
are under way at a time, so that each stage has one to work on while the others are elsewhere:

    stage 0   A0 B0 A1 B1 ...          A0: first token of group A; A1 needs what the last stage drew from A0
    stage 1      A0 B0 A1 B1 ...

Rows that are done leave their group. Each sample draws from a generator of its own, so that what is drawn depends neither on the other
rows nor on the layout (logits agree to rounding: a draw that falls on the boundary of two words to seven digits may still differ).
"""
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.config.schema import GenerateConfig
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import UserError
from megatron_ext.generate import sampling, text
from megatron_ext.generate.checks import check_layout, check_prompt, check_settings
from megatron_ext.generate.stage import Stage, decoding
from megatron_ext.generate.wire import Wire
from megatron_ext.train.engine import Engine

LEAVING = 4  # rows leave when one in so many is done: each time the cache of the others is copied


@dataclass(frozen=True)
class Completion:
    """What one sample added to its prompt.

    Attributes:
        sample: its number, which its random numbers depend on.
        prompt, tokens: token ids; `tokens` ends with the end-of-document token where the model drew it, and holds all of a stop string.
        logprobs: of each token under the distribution it was drawn from (temperature, top-k, top-p); 0 when greedy.
        raw_logprobs: of each token under the model (temperature 1, nothing cut).
        words: how many words top-k and top-p left for each token to be drawn from: they are the most probable ones.
        text: of `tokens` without end of document, stop string, and an incomplete last character; None without a tokenizer.
        stop: eod | stop_string | max_tokens | max_sequence_length | interrupted
    """

    sample: int
    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    raw_logprobs: list[float]
    words: list[int]
    text: str | None
    stop: str


@dataclass
class Row:
    """A sample under way. `place`: in the answer; `limit`: tokens it may get; `stop`: why it is done, or None."""

    place: int
    sample: int
    prompt: list[int]
    limit: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    raw_logprobs: list[float] = field(default_factory=list)
    words: list[int] = field(default_factory=list)
    stop: str | None = None


def generate(engine: Engine, prompts: Sequence[Sequence[int]], settings: GenerateConfig, *, tokenizer: Tokenizer | None = None,
             eod: int | Sequence[int] | None = None, sample_ids: Sequence[int] | None = None, modules_only: bool = False, pack: bool = True,
             leave: Callable[[], object] | None = None) -> list[Completion]:
    """Continues each prompt `settings.samples` times. Collective over the engine's ranks; all get all completions, in order.

    Args:
        prompts: token ids, the same on every rank.
        settings: `batch_size` rows are decoded together (with P pipeline stages, P times as many are under way).
        tokenizer: gives texts and finds stop strings.
        eod: the token that ends a completion, or several of which each does; the tokenizer's where None.
        sample_ids: for each completion its number, in order (prompt 0's samples first); 0, 1, 2, ... where None. Sample i draws from a
            generator seeded by (settings.seed, i).
        modules_only: single tokens go through megatron-core's modules too (slower, to compare with).
        pack: see `packed.Linear`; False where logprobs are compared with those of training.
        leave: asked after each token on the ranks that draw; something true ends every sample there with the stop `interrupted`.

    Raises:
        UserError: a layout, setting or prompt that cannot work.
    """
    check_settings(settings)
    check_layout(engine.layout)
    if settings.stop and tokenizer is None:
        raise UserError("generate.stop", settings.stop, "stop strings are found in text: a tokenizer is needed")
    if eod is None and tokenizer is not None:
        eod = tokenizer.eod
    rows = _rows(engine, prompts, settings, sample_ids)
    mine = sorted(rows, key=lambda row: (len(row.prompt), row.place))[engine.groups.dp.rank() :: engine.groups.dp.size()]
    with ExitStack() as stack:
        stack.enter_context(engine.complete_weights())
        stack.enter_context(decoding(engine.models[0]))
        run = _Run(engine, settings, tokenizer, eod, modules_only, pack, leave)
        run.all(mine)
        done = run.wire.share([run.completion(row) for row in mine] if run.wire.sampler else None)
    answers = _gathered(engine, list(zip([row.place for row in mine], done)))
    return [completion for _, completion in sorted(answers, key=lambda pair: pair[0])]


def _rows(engine: Engine, prompts: Sequence[Sequence[int]], settings: GenerateConfig, sample_ids: Sequence[int] | None) -> list[Row]:
    longest, words = engine.config.model.max_sequence_length, engine.vocab_size
    count = len(prompts) * settings.samples
    if sample_ids is None:
        sample_ids = range(count)
    if len(sample_ids) != count:
        raise ValueError(f"{len(sample_ids)} sample ids for {len(prompts)} prompts x {settings.samples} samples")
    rows = []
    for number, prompt in enumerate(prompts):
        prompt = [int(token) for token in prompt]
        check_prompt(prompt, "prompt", number, max_sequence_length=longest, vocab_size=words)
        for sample in range(settings.samples):
            place = number * settings.samples + sample
            rows.append(Row(place, int(sample_ids[place]), prompt, min(settings.max_tokens, longest - len(prompt))))
    return rows


def _gathered(engine: Engine, mine: list[tuple[int, Completion]]) -> list[tuple[int, Completion]]:
    group = engine.groups.dp
    if group.size() == 1:
        return mine
    parts: list[list] = [[] for _ in range(group.size())]
    dist.all_gather_object(parts, mine, group=group)
    return [pair for part in parts for pair in part]


class _Run:
    """Works through one replica's rows."""

    def __init__(self, engine: Engine, settings: GenerateConfig, tokenizer: Tokenizer | None, eod: int | Sequence[int] | None, modules_only: bool, pack: bool,
                 leave: Callable[[], object] | None):
        self.stage = Stage(engine.models[0], engine.platform.device, modules_only=modules_only, pack=pack)
        self.wire = Wire(engine)
        self.hidden_size, self.dtype = engine.core_config.hidden_size, engine.core_config.params_dtype
        self._settings, self._tokenizer, self._stages, self._leave = settings, tokenizer, engine.layout.pp, leave
        self._ends = frozenset(() if eod is None else (eod,) if isinstance(eod, int) else eod)
        self._stop = text.StopStrings(tokenizer, settings.stop) if tokenizer is not None else None

    def all(self, rows: list[Row]) -> None:
        waiting = deque(self._groups(rows))
        active: list[_Group] = []
        while waiting or active:
            while waiting and len(active) < self._stages:
                active.append(_Group(self, waiting.popleft()))
            for group in list(active):
                if group.advance():
                    active.remove(group)
        self.wire.settle()

    def _groups(self, rows: list[Row]) -> Iterator[list[Row]]:
        """Of `batch_size` rows, or fewer where that keeps all stages busy."""
        size = max(1, min(self._settings.batch_size, -(-len(rows) // self._stages)))
        for start in range(0, len(rows), size):
            yield rows[start : start + size]

    def draw(self, rows: list[Row], logits: Tensor, u: Tensor | None) -> Tensor:
        """Adds a token to each row that goes on. Returns int64 [2, rows] on the CPU: the tokens, and 1 for rows that still go on."""
        settings, leaving = self._settings, self._leave is not None and bool(self._leave())
        drawn = sampling.sample(logits, u, temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p)
        tokens, *others = (part.tolist() for part in drawn)
        for row, token, logprob, raw_logprob, words in zip(rows, tokens, *others):
            if row.stop is None:
                row.tokens.append(token)
                row.logprobs.append(logprob)
                row.raw_logprobs.append(raw_logprob)
                row.words.append(words)
                row.stop = self._why(row) or ("interrupted" if leaving else None)
        return torch.tensor([tokens, [int(row.stop is None) for row in rows]])

    def _why(self, row: Row) -> str | None:
        if row.tokens[-1] in self._ends:
            return "eod"
        if self._stop is not None and self._stop.found(row.prompt, row.tokens):
            return "stop_string"
        if len(row.tokens) == row.limit:
            return "max_tokens" if row.limit == self._settings.max_tokens else "max_sequence_length"
        return None

    def uniforms(self, rows: list[Row]) -> Tensor | None:
        """float64 [tokens, rows], where this rank draws and there is anything to draw."""
        if not self.wire.sampler or self._settings.temperature == 0:
            return None
        count = max(row.limit for row in rows)
        return torch.stack([sampling.uniforms(self._settings.seed, row.sample, count) for row in rows], dim=1).to(self.stage.device)

    def completion(self, row: Row) -> Completion:
        words = None
        if self._tokenizer is not None:
            shown = row.tokens[:-1] if row.stop == "eod" else row.tokens
            words = text.continuation(self._tokenizer, row.prompt, shown)
            if row.stop == "stop_string":
                words = self._stop.cut(words)
        return Completion(row.sample, row.prompt, row.tokens, row.logprobs, row.raw_logprobs, row.words, words, row.stop)


class _Group:
    """Rows that are decoded together. Every rank of the replica keeps the same account of who is where."""

    def __init__(self, run: _Run, rows: list[Row]):
        self.run, self.rows = run, rows
        self.lengths = [len(row.prompt) for row in rows]  # tokens in the cache
        self.on = [True] * len(rows)
        self.step = 0
        self.cache = run.stage.cache(len(rows), max(len(row.prompt) + row.limit - 1 for row in rows))
        self.u = run.uniforms(rows)
        self.packet: Tensor | None = None

    def advance(self) -> bool:
        """One step of this rank. True when all rows are done."""
        run, wire, stage = self.run, self.run.wire, self.run.stage
        if self.step == 0:
            tokens = self._prompts()
        else:
            packet = self.packet if wire.sampler else wire.hear(len(self.rows))
            tokens = self._take(packet)
            if tokens is None:
                return True
        longest = 1 if self.step else tokens.shape[1]
        hidden = None if stage.first else wire.receive((longest, len(self.rows), run.hidden_size), run.dtype)
        lengths = torch.tensor(self.lengths, device=stage.device)
        if self.step == 0:
            out = stage.prefill(tokens, lengths, hidden, self.cache)
        else:
            out = self._decode(tokens, lengths, hidden)
        if stage.last:
            logits = wire.logits(out)
            if wire.sampler:
                self.packet = run.draw(self.rows, logits, None if self.u is None else self.u[self.step])
                wire.tell(self.packet)
        else:
            wire.send(out)
        self.step += 1
        return False

    def _prompts(self) -> Tensor:
        """int64 [rows, longest], padded on the right (with a token that exists; nobody looks at it)."""
        longest = max(self.lengths)
        return torch.tensor([row.prompt + [0] * (longest - len(row.prompt)) for row in self.rows], device=self.run.stage.device)

    def _decode(self, tokens: Tensor, lengths: Tensor, hidden: Tensor | None) -> Tensor:
        going = [length for length, on in zip(self.lengths, self.on) if on]
        longest, together = max(going), min(going) == max(going)
        # The token drawn last stands at position length - 1; a row that is done stays where it is and is not read again.
        positions = torch.full_like(lengths, longest - 1) if together else (lengths - 1).clamp_(max=longest - 1)
        return self.run.stage.decode(tokens, positions, hidden, self.cache, longest=longest, together=together)

    def _take(self, packet: Tensor) -> Tensor | None:
        """Takes the sampler's word: the tokens to go on with, int64 [rows]; None when nobody goes on."""
        tokens, on = packet.tolist()
        self.on = [bool(flag) for flag in on]
        if not any(self.on):
            return None
        self.lengths = [length + flag for length, flag in zip(self.lengths, on)]
        if self.on.count(False) * LEAVING >= len(self.on):
            kept = [number for number, flag in enumerate(self.on) if flag]
            self.cache.keep(kept)
            self.rows, self.lengths, tokens = ([items[number] for number in kept] for items in (self.rows, self.lengths, tokens))
            self.on = [True] * len(kept)
            if self.u is not None:
                self.u = self.u[:, kept]
        return torch.tensor(tokens, device=self.run.stage.device)
