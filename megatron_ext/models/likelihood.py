"""How likely given words are, and whether each is the most probable one: what evaluation asks of the head.

    log p(w) = l_w - log sum_v exp(l_v),        best = [l_w = max_v l_v]

The first word of the largest logit counts as the most probable, as `argmax` says it. Logits are held for some tokens at a time.
"""
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import linear

TOKENS = 1024  # whose logits are held at once: 0.5 GB at 128,000 words in fp32


def word_likelihoods(hidden: Tensor, weight: Tensor, bias: Tensor | None, words: Tensor, *, vocab_size: int,
                     group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Scores a word behind each of n tokens, without gradients.

    Args:
        hidden: [n, hidden], the last norm's output; the same on every tensor-parallel rank.
        weight: [words / TP, hidden], this rank's rows of the head; bias: [words / TP] or None.
        words: int64 [n], below `vocab_size`; rows beyond are padding.
        group: the tensor-parallel ranks, None for one.
    Returns:
        logprob fp32 [n], best bool [n]; the same on every rank of the group.
    """
    logprobs, best = torch.empty(len(words), device=hidden.device), torch.empty(len(words), dtype=torch.bool, device=hidden.device)
    for start in range(0, len(words), TOKENS):
        part = slice(start, start + TOKENS)
        logits = linear(hidden[part], weight, bias)
        if group is not None:
            logits = logits.contiguous()
            columns = [torch.empty_like(logits) for _ in range(group.size())]
            dist.all_gather(columns, logits, group=group)
            logits = torch.cat(columns, dim=-1)
        logits = logits[:, :vocab_size].float()
        chosen = words[part, None]
        logprobs[part] = (logits.gather(-1, chosen) - logits.logsumexp(-1, keepdim=True)).squeeze(-1)
        best[part] = logits.argmax(-1, keepdim=True).eq(chosen).squeeze(-1)
    return logprobs, best
