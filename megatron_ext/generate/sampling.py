"""From logits to a token: temperature, top-k, top-p, and the probability of what was drawn.

    p(v) ~ exp(l_v / T) over the words kept,    token = the first v with  sum_{w <= v} p(w) > u,    u uniform in [0, 1)

top-k keeps the k most probable words. top-p then keeps the smallest set of the most probable ones whose probabilities (at temperature T,
after top-k) reach p (Holtzman et al. 2020, arXiv:1904.09751). Both are a threshold on the logits: words that tie with the last one kept
stay in, so that nothing depends on the order in which a sort meets them.

A sample draws one number u for each token from a generator of its own, on the CPU: what it draws depends on nothing but its seed.
"""
import hashlib

import torch
from torch import Tensor

CANDIDATES = 256  # words that are sorted before top-p asks for all of them: sorting a whole vocabulary costs more than a small model's step


def uniforms(seed: int, sample: int, count: int) -> Tensor:
    """The numbers that sample `sample` draws: float64 [count] in [0, 1), on the CPU. The first n do not depend on `count`."""
    digest = hashlib.sha256(f"{seed}/{sample}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    drawn = torch.rand(count, generator=generator, dtype=torch.float64)
    return drawn.clamp_(max=1 - 2.0**-32)  # u times a rounded total must stay below it


def sample(logits: Tensor, u: Tensor | None, *, temperature: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draws one word a row.

    Args:
        logits: fp32 [rows, words].
        u: float64 [rows]; not read at temperature 0.
    Returns:
        tokens int64 [rows]; their log-probability under the distribution that was sampled from, fp32 [rows] (0 when greedy: it has one
        word); and under the model itself (temperature 1, nothing cut), fp32 [rows]; and how many words were left to draw from, int64 [rows].
    """
    if temperature == 0:
        top, tokens = logits.max(-1)
        return tokens, torch.zeros_like(top), top - torch.logsumexp(logits, -1), torch.ones_like(tokens)
    scaled = truncate((logits - logits.amax(-1, keepdim=True)) / temperature, top_k=top_k, top_p=top_p)
    log_probabilities = torch.log_softmax(scaled, -1)
    sums = log_probabilities.exp().cumsum(-1, dtype=torch.float64)
    tokens = torch.searchsorted(sums, u[:, None] * sums[:, -1:], right=True)
    drawn = log_probabilities.gather(-1, tokens).squeeze(-1)
    raw = logits.gather(-1, tokens).squeeze(-1) - torch.logsumexp(logits, -1)
    return tokens.squeeze(-1), drawn, raw, (scaled > float("-inf")).sum(-1)


def truncate(scaled: Tensor, *, top_k: int, top_p: float) -> Tensor:
    """`scaled` [rows, words] (logits / T) with -inf for the words that are cut."""
    words = scaled.shape[-1]
    if 0 < top_k < words:
        best = scaled.topk(top_k).values
        scaled = scaled.masked_fill(scaled < best[:, -1:], float("-inf"))
    else:
        best = None
    if top_p >= 1:
        return scaled
    total = torch.logsumexp(scaled, -1, keepdim=True)
    if best is None:
        best = scaled.topk(min(CANDIDATES, words)).values
        if bool(((best - total).exp().sum(-1) < top_p).any()):
            best = scaled.sort(-1, descending=True).values
    probabilities = (best - total).exp().double()
    before = probabilities.cumsum(-1) - probabilities  # the mass of the more probable words
    kept = (before < top_p).sum(-1, keepdim=True).clamp_(min=1)
    return scaled.masked_fill(scaled < best.gather(-1, kept - 1), float("-inf"))
