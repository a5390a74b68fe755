"""FP8 formats and where their scales come from.

e4m3fn: 4 exponent and 3 mantissa bits, largest 448, smallest step 2^-9, no infinity. e5m2: largest 57,344, smallest step 2^-16.
Micikevicius et al. 2022, arXiv 2209.05433. A value x is stored as round(x s) with an fp32 scale s, and read back as q / s; the inverse
1/s travels with the data.

    s = largest / amax,      amax = max |x| over what shares the scale

with s <= 2^126, so that 1/s is a normal number, and s = 1 where amax is 0 or not finite.

Current scaling takes the amax of the tensor itself. Delayed scaling (Transformer Engine) takes it from the steps before, so that
quantising is one pass; it leaves `margin` powers of two free for growth, and values that outgrow the scale saturate. Blockwise scaling
(DeepSeek-V3, arXiv 2412.19437) gives each 1 x 128 piece of activations and gradients, and each 128 x 128 block of weights, its own scale.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
LARGEST_SCALE = 2.0**126
BLOCK = 128
KINDS = ("current", "delayed", "blockwise")
FORMATS = ("hybrid", "e4m3")
ALGORITHMS = ("max", "most_recent")


@dataclass(frozen=True)
class Fp8Recipe:
    """How the matrix products of a linear layer are scaled.

    Attributes:
        kind: current | delayed | blockwise.
        format: hybrid (e4m3 for activations and weights, e5m2 for gradients) | e4m3 (for all).
        margin: delayed: powers of two that the scale leaves free.
        history: delayed: steps that are remembered.
        algorithm: delayed: the amax is the max of the history, or the most_recent.
        power_of_2: scales are rounded down to powers of two, so that scaling itself never rounds.
    """

    kind: str = "current"
    format: str = "hybrid"
    margin: int = 0
    history: int = 1024
    algorithm: str = "max"
    power_of_2: bool = False

    def __post_init__(self):
        for name, allowed in (("kind", KINDS), ("format", FORMATS), ("algorithm", ALGORITHMS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"Fp8Recipe: {name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
        if self.history < 1:
            raise ValueError(f"Fp8Recipe: history is {self.history}; at least one step must be remembered")
        if not 0 <= self.margin <= 16:
            raise ValueError(f"Fp8Recipe: margin is {self.margin}; it must be 0 to 16 powers of two")

    @property
    def forward(self) -> torch.dtype:
        """Of activations and weights."""
        return E4M3

    @property
    def backward(self) -> torch.dtype:
        """Of gradients of activations."""
        return E5M2 if self.format == "hybrid" else E4M3

    @property
    def blocks(self) -> bool:
        return self.kind == "blockwise"


def scale_of(amax: Tensor, dtype: torch.dtype, *, margin: int = 0, power_of_2: bool = False) -> Tensor:
    """The scales for fp32 `amax` of any shape; 1 where it is 0, inf or NaN."""
    # A number divided by a tensor is its reciprocal times the number in torch: rounded twice.
    scale = (torch.full_like(amax, LARGEST[dtype]) / amax).clamp(max=LARGEST_SCALE) * 2.0**-margin
    if power_of_2:
        scale = (scale.view(torch.int32) & ~0x7FFFFF).view(torch.float32)
    return torch.where((amax > 0) & (amax < torch.inf), scale, 1.0)


def push_amax(history: Tensor, amax: Tensor) -> None:
    """A step ends: `amax` [n] becomes the first row of `history` [steps, n], the oldest row goes. What is not finite is a step that failed:
    the row before it is repeated, so that it leaves no trace."""
    latest = torch.where(torch.isfinite(amax), amax, history[0])
    history.copy_(torch.roll(history, 1, dims=0))
    history[0] = latest


def history_amax(history: Tensor, recipe: Fp8Recipe) -> Tensor:
    """The amax [n] that delayed scaling goes by; 0 where nothing has been seen yet."""
    return history.amax(dim=0) if recipe.algorithm == "max" else history[0].clone()
