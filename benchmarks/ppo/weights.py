"""The random models of bench_ppo.py, made once with plain torch and read by every side: a GPT-2 as policy and reference, and a score head.

How often a response ends is written into the weights, so that all sides end theirs with the same probability: with the last norm's bias
b = B u (u a unit vector), every row of the tied table made orthogonal to u, and the row of EOS = (a / B) u,

    logit_v = e_v . (n + b) = e_v . n for a word,       logit_EOS = a + (a / B) u . n,

n the normalised hidden state. So EOS has the logit a up to a few hundredths, in any state. `eos_logit` gives the a for a mean length.
"""
import math
from dataclasses import dataclass

import torch

SHIFT = 60.0  # B: how much larger the bias is than what moves the EOS logit from state to state
NEVER = -40.0


@dataclass(frozen=True)
class Shape:
    layers: int = 4
    hidden: int = 256
    heads: int = 4
    words: int = 1024  # EOS is the last
    positions: int = 128

    @property
    def eos(self) -> int:
        return self.words - 1


def mean_length(p: float, limit: int) -> float:
    """Of a response that ends after each token with probability p, or at the limit."""
    return limit if p == 0 else (1 - (1 - p) ** limit) / p


def eos_probability(mean: float, limit: int) -> float:
    """The p whose responses have this mean length (bisection: the length falls with p)."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_length(middle, limit) > mean else (low, middle)
    return (low + high) / 2


def gpt2(shape: Shape, *, seed: int, share: float | None, limit: int) -> dict[str, torch.Tensor]:
    """A state dict in transformers' names (weights of GPT-2's Conv1D are [in, out]), fp32.

    Args:
        share: mean length of a response over the limit; None: none ends before.
        limit: tokens of a response.
    """
    drawn = torch.Generator().manual_seed(seed)

    def normal(*size: int, std: float = 0.02) -> torch.Tensor:
        return torch.randn(*size, generator=drawn) * std

    h = shape.hidden
    unit = torch.nn.functional.normalize(normal(h), dim=0)
    table = normal(shape.words, h)
    table -= (table @ unit)[:, None] * unit
    # Hidden states have norm sqrt(h): a word's logit has the variance 0.02^2 h, and exp of it the mean exp(variance / 2).
    others = (shape.words - 1) * math.exp(0.02**2 * h / 2)
    p = 0.0 if share is None else eos_probability(share * limit, limit)
    table[shape.eos] = (NEVER if p == 0 else math.log(p / (1 - p) * others)) / SHIFT * unit
    state = {"transformer.wte.weight": table, "transformer.wpe.weight": normal(shape.positions, h)}
    for layer in range(shape.layers):
        sizes = {"attn.c_attn": (h, 3 * h), "attn.c_proj": (h, h), "mlp.c_fc": (h, 4 * h), "mlp.c_proj": (4 * h, h)}
        for name, size in sizes.items():
            scale = 1 / math.sqrt(2 * shape.layers) if name.endswith("c_proj") else 1.0
            state[f"transformer.h.{layer}.{name}.weight"] = normal(*size, std=0.02 * scale)
            state[f"transformer.h.{layer}.{name}.bias"] = torch.zeros(size[1])
        for name in ("ln_1", "ln_2"):
            state[f"transformer.h.{layer}.{name}.weight"] = torch.ones(h)
            state[f"transformer.h.{layer}.{name}.bias"] = torch.zeros(h)
    state["transformer.ln_f.weight"] = torch.ones(h)
    state["transformer.ln_f.bias"] = SHIFT * unit
    return state


def score_head(shape: Shape, *, seed: int) -> torch.Tensor:
    """[1, hidden]: what makes the same model a reward model or a value function."""
    return torch.randn(1, shape.hidden, generator=torch.Generator().manual_seed(seed)) / math.sqrt(shape.hidden + 1)
