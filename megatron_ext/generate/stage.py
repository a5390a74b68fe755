"""One pipeline stage of the training model, run for generation: a prompt at once, then a token at a time.

A prompt goes through the modules' own forward pass. A single token does too, or, where every module is of the kind that `single.py`
knows, through the same weights with less Python around them.
"""
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_ext.generate import single
from megatron_ext.generate.cache import StageCache
from megatron_ext.models.decoder import Decoder

# Where megatron-core's modules keep that they run on parts of the sequence.
SEQUENCE_PARALLEL = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")


class Stage:
    """This rank's part of a model in decoding mode (see `decoding`).

    Args:
        model: a bare decoder, all of this rank's layers.
        modules_only: also single tokens go through the modules' forward pass. pack: see `packed.Linear`.
    """

    def __init__(self, model: Decoder, device: torch.device, *, modules_only: bool = False, pack: bool = True):
        self.model, self.device = model, device
        self.first, self.last = model.pre_process, model.post_process
        self._single = None if modules_only or not single.knows(model) else single.SingleToken(model, pack=pack)

    def cache(self, rows: int, max_length: int) -> StageCache:
        return StageCache(self.model, rows=rows, max_length=max_length, device=self.device)

    def prefill(self, tokens: Tensor, lengths: Tensor, hidden: Tensor | None, cache: StageCache) -> Tensor:
        """Prompts, padded on the right.

        Args:
            tokens: int64 [rows, longest].
            lengths: int64 [rows].
            hidden: what the stage before gave, [longest, rows, hidden].
        Returns:
            [longest, rows, hidden]; on the last stage this rank's columns of the logits behind each row's last token, [rows, V / TP].
        """
        longest = tokens.shape[1]
        positions = torch.arange(longest, device=self.device).expand_as(tokens)
        cache.place(positions, length=longest, start=0)
        return self._modules(tokens, positions, None, hidden, cache, select=lengths - 1)

    def decode(self, tokens: Tensor, positions: Tensor, hidden: Tensor | None, cache: StageCache, *, longest: int,
               together: bool) -> Tensor:
        """One more token a row.

        Args:
            tokens, positions: int64 [rows].
            hidden: what the stage before gave, [1, rows, hidden].
            longest: 1 + the largest position.
            together: all positions are the same.
        Returns:
            [1, rows, hidden]; on the last stage logits [rows, V / TP].
        """
        positions = positions[:, None]
        cache.place(positions, length=longest, start=longest - 1 if together else None)
        hides = None if together else (torch.arange(longest, device=self.device) > positions)[:, None, None]
        if self._single is None:
            if hides is None:
                hides = torch.zeros(1, 1, 1, longest, dtype=torch.bool, device=self.device)
            return self._modules(tokens[:, None], positions, hides, hidden, cache, select=torch.zeros_like(tokens))
        return self._single(tokens, positions, hides, hidden, cache)

    def _modules(self, tokens, positions, mask, hidden, cache, *, select) -> Tensor:
        if not self.first:
            self.model.set_input_tensor(hidden)
        with cache.attached(self.model):
            out = self.model(tokens, positions, mask, rows_differ=True, select=select)
        return out[:, 0] if self.last else out


@contextmanager
def decoding(model: Decoder) -> Iterator[None]:
    """Inside, a model has no dropout, no gradients, and no sequence parallelism (one token cannot be split; the numbers are the same)."""
    holders = (model.config, *model.modules())
    changed = [(holder, name) for holder in holders for name in SEQUENCE_PARALLEL if getattr(holder, name, False) is True]
    training = model.training
    model.eval()
    for holder, name in changed:
        setattr(holder, name, False)
    try:
        with torch.inference_mode():
            yield
    finally:
        for holder, name in changed:
            setattr(holder, name, True)
        model.train(training)
