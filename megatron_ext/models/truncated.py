"""Scores of tokens under the distribution that top-k and top-p sampling drew them from.

The words that were left when a token was drawn are found once, from the weights that drew it, and kept as bits: the policy that is trained
on the token, and the reference beside it, are compared over the same words. (Scored anew, a policy that has moved would cut other words,
and its ratio to the old one would have no meaning.) This path holds the logits of the tokens it scores, and the bits take words / 8 bytes a token.
"""
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from kernels.linear_cross_entropy import TokenScores

BITS = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass
class Kept:
    """Which words each token was drawn from.

    Attributes:
        counts: int64 [n], how many they were: generation says (`Completion.words`). The set itself cannot be found by top-p again: a rounding
            of the sum of probabilities lets one more word in, or leaves one out, and all logprobs move by its probability.
        bits: uint8 [n, ceil(words / 8)]; None until the first scoring fills it.
    """

    counts: Tensor | None
    bits: Tensor | None = None

    def mask(self, scaled: Tensor, labels: Tensor) -> Tensor:
        """bool [n, words], True for the words kept. scaled: logits / temperature [n, words]; labels: int64 [n], what was drawn."""
        if self.bits is None:
            self.bits = pack(most_probable(scaled.detach(), labels, self.counts))
        return unpack(self.bits, scaled.shape[-1]).to(scaled.device)


def most_probable(scaled: Tensor, drawn: Tensor, counts: Tensor) -> Tensor:
    """bool [n, words]: in each row as many of the largest as `counts` [n] says (and those that tie with the last), `drawn` [n] among them
    whatever rounding says now."""
    if not len(scaled):
        return torch.zeros_like(scaled, dtype=torch.bool)
    ranked = scaled.scatter(-1, drawn[:, None], float("inf"))
    best = ranked.topk(int(counts.max())).values
    return ranked >= best.gather(-1, counts[:, None] - 1)


def pack(mask: Tensor) -> Tensor:
    """bool [n, words] -> uint8 [n, ceil(words / 8)]."""
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % 8)).unflatten(-1, (-(-mask.shape[-1] // 8), 8))  # n may be 0
    return (padded * torch.tensor(BITS, dtype=torch.uint8, device=mask.device)).sum(-1, dtype=torch.uint8)


def unpack(bits: Tensor, words: int) -> Tensor:
    """The inverse of `pack`."""
    return (bits[..., None] & torch.tensor(BITS, dtype=torch.uint8, device=bits.device)).ne(0).flatten(1)[:, :words]


def truncated_scores(hidden: Tensor, weight: Tensor, labels: Tensor, kept: Kept, *, temperature: float, vocab_size: int,
                     group: dist.ProcessGroup | None) -> TokenScores:
    """As `linear_cross_entropy`, over the words kept.

    Args:
        hidden: [n, hidden]; weight: [words / TP, hidden], this rank's rows; labels: int64 [n], each among the words kept.
        kept: filled here when it has no bits yet.
        group: the tensor-parallel ranks. The gradient of `hidden` is this rank's part; the caller adds them up.
    Returns:
        loss, logprob, entropy: fp32 [n].
    """
    logits = torch.nn.functional.linear(hidden, weight)
    if group is not None:
        logits = gather_from_tensor_model_parallel_region(logits, group=group)
    scaled = logits[:, :vocab_size].float() / temperature
    scaled = scaled.masked_fill(~kept.mask(scaled, labels), float("-inf"))
    logp = scaled.log_softmax(-1)
    logprob = logp.gather(-1, labels[:, None]).squeeze(-1)
    probabilities = logp.exp()
    entropy = -(probabilities * logp.masked_fill(probabilities == 0, 0.0)).sum(-1)
    return TokenScores(-logprob, logprob, entropy)
