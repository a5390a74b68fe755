"""The harness runs on rank 0; every rank holds a part of the model. Rank 0 tells the others what is asked, and all answer it together.

    rank 0   harness -> likelihoods(...) --tell--> score -> harness -> ... -> end()
    others                serve(): wait ---------> score -> wait     ... -> return
"""
from collections.abc import Sequence

import numpy as np
import torch.distributed as dist

from megatron_ext.config.schema import GenerateConfig
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.evaluate.likelihood import Continuation, Likelihood, likelihoods
from megatron_ext.generate import Completion, generate
from megatron_ext.train.engine import Engine


class Ranks:
    """All ranks of a job, as one model. Rank 0 calls `likelihoods`, `completions` and last `end`; the others `serve`.

    Args:
        tokenizer: finds stop strings.
        ends: tokens that end a completion; None: the tokenizer's end of document.
        batch_size, max_length: see `likelihood.likelihoods`.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, *, batch_size: int, max_length: int, ends: Sequence[int] | None = None):
        self.engine, self.tokenizer, self.max_length = engine, tokenizer, max_length
        self._batch_size, self._ends = batch_size, ends

    def likelihoods(self, requests: Sequence[Continuation]) -> list[Likelihood]:
        """Scores each request, in order."""
        parts = [_packed([list(request.context) for request in requests]), _packed([list(request.words) for request in requests])]
        self._tell(("likelihoods", parts))
        return self._likelihoods(*parts)

    def completions(self, prompts: Sequence[Sequence[int]], settings: GenerateConfig, numbers: Sequence[int]) -> list[Completion]:
        """Continues each prompt once; `numbers`: what the random numbers of each depend on, beside the seed."""
        given = (_packed(prompts), settings, list(numbers))
        self._tell(("completions", given))
        return self._completions(*given)

    def end(self) -> None:
        """Lets the other ranks go."""
        self._tell(("end", ()))

    def serve(self) -> None:
        """On the other ranks: takes part in all that rank 0 asks, until it says `end`."""
        while True:
            kind, given = self._tell(None)
            if kind == "end":
                return
            (self._likelihoods if kind == "likelihoods" else self._completions)(*given)

    def _tell(self, word: tuple | None) -> tuple:
        box = [word]
        if dist.get_world_size() > 1:
            dist.broadcast_object_list(box, src=0, device=self.engine.platform.device)
        return box[0]

    def _likelihoods(self, contexts: tuple, words: tuple) -> list[Likelihood]:
        requests = [Continuation(*pair) for pair in zip(_unpacked(*contexts), _unpacked(*words), strict=True)]
        return likelihoods(self.engine, requests, batch_size=self._batch_size, max_length=self.max_length)

    def _completions(self, prompts: tuple, settings: GenerateConfig, numbers: list[int]) -> list[Completion]:
        return generate(self.engine, _unpacked(*prompts), settings, tokenizer=self.tokenizer, eod=self._ends, sample_ids=numbers)


def _packed(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(all numbers int32, the length of each row): a tenth of what lists of Python's numbers take on the way."""
    return np.array([number for row in rows for number in row], dtype=np.int32), np.array([len(row) for row in rows], dtype=np.int64)


def _unpacked(numbers: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    return [part.tolist() for part in np.split(numbers, np.cumsum(lengths)[:-1])] if len(lengths) else []
