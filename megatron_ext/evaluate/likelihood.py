"""How likely texts are behind their contexts, on the training model in whatever layout it lives.

    log p(w_1 ... w_n | c_1 ... c_m) = sum_i log p(w_i | c, w_1 ... w_{i-1})

Requests whose input is the same (the one-word answers of a question) share a row. Rows are sorted by length and dealt to the data ranks; each
replica works through its own, as many micro-batches at a time as keep its pipeline stages busy. Each answer is found by one rank and added to
the others' zeros.
"""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.data.batches import Batch
from megatron_ext.models.decoder import Decoder
from megatron_ext.train.engine import Engine

FILLING = 4  # micro-batches a pipeline stage has at once: of P stages each waits for P - 1


@dataclass(frozen=True)
class Continuation:
    """`words` behind `context`: token ids, at least one of each. A context that does not fit is cut on the left."""

    context: Sequence[int]
    words: Sequence[int]


@dataclass(frozen=True)
class Likelihood:
    """`logprob`: of all words, nats. `greedy`: whether each of them is the model's most probable one."""

    logprob: float
    greedy: bool


@dataclass
class Row:
    """An input and which of the requests are read from it."""

    tokens: tuple[int, ...]
    requests: list[int]


class _Words:
    """Scores `fields["words"]` behind `fields["places"]` (see `Decoder.likelihoods`)."""

    names = ()

    def needed(self, batch: Batch) -> Tensor:
        return batch.fields["places"].unique()

    def score(self, model: Decoder, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return model.likelihoods(hidden, self.needed(batch), batch.fields["places"], batch.fields["words"])


def likelihoods(engine: Engine, requests: Sequence[Continuation], *, batch_size: int, max_length: int) -> list[Likelihood]:
    """Scores each request. Collective over the engine's ranks; all get all answers, in order.

    Args:
        batch_size: rows of a micro-batch.
        max_length: tokens that the model sees at once.

    Raises:
        ValueError: a request without context or words, or with more words than `max_length`.
    """
    rows = _rows(requests, max_length)
    mine = rows[engine.groups.dp.rank() :: engine.groups.dp.size()]
    # logprob, words that are not the most probable one. Sums in fp64: thousands of fp32 terms would lose a digit of them.
    answers = torch.zeros(len(requests), 2, dtype=torch.float64, device=engine.platform.device)
    unit = batch_size * (1 if engine.layout.pp == 1 else FILLING * engine.layout.pp)
    for start in range(0, len(mine), unit):
        _score(engine, mine[start : start + unit], requests, batch_size, answers)
    dist.all_reduce(answers, group=engine.groups.intra_dist_opt)
    return [Likelihood(logprob, missed == 0) for logprob, missed in answers.tolist()]


def _rows(requests: Sequence[Continuation], max_length: int) -> list[Row]:
    """Longest first: what does not fit the memory fails at once."""
    rows: dict[tuple[int, ...], Row] = {}
    for number, request in enumerate(requests):
        if not request.context or not request.words or len(request.words) > max_length:
            raise ValueError(f"request {number}: {len(request.context)} tokens of context and {len(request.words)} words; at least one of each, "
                             f"and at most {max_length} words")
        tokens = tuple((*request.context, *request.words)[-(max_length + 1) :][:-1])
        rows.setdefault(tokens, Row(tokens, [])).requests.append(number)
    return sorted(rows.values(), key=lambda row: (-len(row.tokens), row.tokens))


def _score(engine: Engine, rows: Sequence[Row], requests: Sequence[Continuation], batch_size: int, answers: Tensor) -> None:
    batch_size = max(1, min(batch_size, -(-len(rows) // engine.layout.pp)))
    length = len(rows[0].tokens)
    if engine.layout.sp:
        length = -(-length // engine.layout.tp) * engine.layout.tp
    groups = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    last_position = engine.config.model.max_sequence_length - 1
    made = [_batch(group, requests, batch_size, length, last_position) for group in groups]
    found = engine.collect([batch for batch, _ in made], _Words())
    if engine.groups.tp.rank() == 0:  # of the last stage: elsewhere there is nothing
        for (logprob, best), (_, owners) in zip(found, made):
            owners = owners.to(answers.device)
            answers[:, 0].index_add_(0, owners, logprob.double())
            answers[:, 1].index_add_(0, owners, (~best).double())


def _batch(rows: Sequence[Row], requests: Sequence[Continuation], size: int, length: int, last_position: int) -> tuple[Batch, Tensor]:
    """A micro-batch of `size` x `length`, and for each word asked for (int64 [n]) the number of its request. Padding is on the right, where
    causal attention does not see it."""
    tokens = torch.zeros(size, length, dtype=torch.int64)
    for number, row in enumerate(rows):
        tokens[number, : len(row.tokens)] = torch.tensor(row.tokens)
    asked = list(_asked(rows, requests, length))
    places, words, owners = (torch.tensor(part, dtype=torch.int64) for part in zip(*asked))
    batch = Batch(
        tokens=tokens, labels=tokens, loss_mask=torch.ones(size, length), documents=None,
        position_ids=torch.arange(length).clamp_(max=last_position).expand(size, -1), fields={"places": places, "words": words},
    )
    return batch, owners


def _asked(rows: Sequence[Row], requests: Sequence[Continuation], length: int) -> Iterator[tuple[int, int, int]]:
    """(place, word, request) of each word."""
    for number, row in enumerate(rows):
        for request in row.requests:
            words = requests[request].words
            first = number * length + len(row.tokens) - len(words)
            yield from ((first + k, word, request) for k, word in enumerate(words))
