"""What the policy and the critic minimise over packed responses, one function a loss.

With the ratio r_t = p(token) / p_old(token), s = exp(mean over a response of log r_t), A the advantage, and w_t the weight of a token, sums over t of

    clip        w max(-A r, -A clip(r, 1 - c, 1 + c_high))      PPO (Schulman et al. 2017, arXiv 1707.06347, eq. 7); c_high: DAPO (arXiv 2503.14476)
    reinforce   -w A log p                                      Williams 1992: no ratio, so right for one pass with one minibatch
    gspo        clip with s in the place of r                   Zheng et al. 2025 (arXiv 2507.18071), the token form of section 4.3: with one A a
                                                                response and sequence weights its gradient is that of eq. 5
    cispo       -w sg[min(r, 1 + c_high)] A log p               MiniMax 2025 (arXiv 2506.13585, eq. 4), without the lower bound, which the paper does
                                                                not use either: no token loses its gradient; sg = held constant

c is `ppo.clip`, c_high `ppo.clip_high` or else c. gspo's are of the order of 3e-4: s hardly moves. At the first inner step r = 1 exactly where old
log-probabilities come from the same micro-batches, and all four have the gradient -w A grad log p.

Everything is a sum, and a response is never cut: sums of micro-batches are the sum of the batch, and the caller divides once, by the global count that
goes with the weights (`token_weights`). The entropy bonus and a KL in the loss are the stage's own terms.
Log-ratios are held within +-20: exp would overflow, and in a gradient 0 x inf is NaN. NaN passes through: the engine then changes nothing.
"""
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kernels.checks import check_dtype
from megatron_ext.config.schema import PpoConfig
from rlhf.kl import estimate
from rlhf.packed import check_packed, segment_sum, spread

LARGEST = 20.0  # of |log ratio|
POLICY_SUMS = ("clip_fraction", "ratio", "ratio_max", "approx_kl")
VARIANCE_SUMS = ("value_tokens", "return_sum", "return_squares", "error_sum", "error_squares")

Result = tuple[Tensor, dict[str, Tensor]]
Function = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, PpoConfig], Result]
POLICY_LOSSES: dict[str, Function] = {}


def register(name: str) -> Callable[[Function], Function]:
    """Adds a loss to POLICY_LOSSES under the name that `ppo.policy_loss` says. Raises: ValueError where the name is taken.

    What is registered is called with
        logprob [tokens]: of the policy that learns, differentiable. old_logprob [tokens]: of the one that wrote. advantage [tokens]. token_weights [tokens].
        cu_seqlens [n + 1]: of the responses. All fp32 (fp64 too); only logprob gets a gradient.
        settings: `ppo`.
    and gives the sum of the losses, scalar, and POLICY_SUMS, scalars without a gradient: weighted sums over tokens of
        clip_fraction: 1 where the clip took the gradient (cispo: where it held the ratio).
        ratio: what multiplies A. approx_kl: KL of the old policy to the new, k3 (never negative), nats.
    and ratio_max, which is no sum but the largest ratio, 0 where there are no tokens.
    Raises TypeError, ValueError: a dtype, shape, device or offset that does not fit, naming it.
    """

    def add(function: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Function:
        if name in POLICY_LOSSES:
            raise ValueError(f"policy losses: {name} is registered already")

        def loss(logprob: Tensor, old_logprob: Tensor, advantage: Tensor, token_weights: Tensor, cu_seqlens: Tensor, settings: PpoConfig) -> Result:
            check_packed(name, cu_seqlens, logprob=logprob, old_logprob=old_logprob, advantage=advantage, token_weights=token_weights)
            old_logprob, advantage, weights = old_logprob.detach(), advantage.detach(), token_weights.detach()
            per_token, ratio, clipped = function(logprob, old_logprob, advantage, cu_seqlens, settings)
            with torch.no_grad():
                sums = {
                    "clip_fraction": _sum(weights * clipped), "ratio": _sum(weights * ratio),
                    "ratio_max": ratio.max().double() if ratio.numel() else ratio.new_zeros((), dtype=torch.float64),
                    "approx_kl": _sum(weights * estimate(_held(old_logprob - logprob), torch.zeros_like(logprob), "k3")),
                }
            return (weights * per_token).sum(), sums

        POLICY_LOSSES[name] = loss
        return loss

    return add


def token_weights(cu_seqlens: Tensor, over: str = "tokens") -> tuple[Tensor, int]:
    """Weights that make a sum a mean, once it is divided by the count of the *global* batch.

    Args:
        cu_seqlens: int32 or int64 [n + 1].
        over: tokens (each counts alike: long responses count more) | sequences (1 / length each: the mean of the responses' means).
    Returns:
        (fp32 [tokens], how many count here: tokens, or responses that have any).
    Raises:
        TypeError, ValueError: cu_seqlens or `over` that cannot be.
    """
    check_packed("token_weights", cu_seqlens)
    lengths, tokens = cu_seqlens.diff(), int(cu_seqlens[-1])
    if over == "tokens":
        return torch.ones(tokens, device=cu_seqlens.device), tokens
    if over == "sequences":
        return spread(1 / lengths.clamp(min=1).float(), cu_seqlens, tokens), int((lengths > 0).sum())
    raise ValueError(f"token_weights: over is {over!r}; it must be tokens or sequences")


@register("clip")
def clip_loss(logprob, old_logprob, advantage, cu_seqlens, settings):
    ratio = _held(logprob - old_logprob).exp()
    return _clipped(ratio, advantage, settings)


@register("reinforce")
def reinforce_loss(logprob, old_logprob, advantage, cu_seqlens, settings):
    ratio = _held(logprob - old_logprob).exp()
    return -advantage * logprob, ratio, torch.zeros_like(ratio)


@register("gspo")
def gspo_loss(logprob, old_logprob, advantage, cu_seqlens, settings):
    log_ratio = logprob.detach() - old_logprob
    mean = segment_sum(log_ratio, cu_seqlens) / cu_seqlens.diff().clamp(min=1)
    of_sequence = spread(_held(mean).exp(), cu_seqlens, logprob.numel())
    return _clipped(of_sequence * (logprob - logprob.detach()).exp(), advantage, settings)  # worth s, with the token's own gradient


@register("cispo")
def cispo_loss(logprob, old_logprob, advantage, cu_seqlens, settings):
    ratio = _held(logprob - old_logprob).exp().detach()
    most = 1 + _high(settings)
    return -ratio.clamp(max=most) * advantage * logprob, ratio, ratio > most


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None, weights: Tensor) -> Result:
    """The critic's: the sum of w max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2 (the clip is that of OpenAI's baselines).

    Args:
        values: [tokens], differentiable. old_values: before the update. returns: what they should have been. weights: as of the policy.
            Any one shape, fp32 or fp64.
        clip: c, in units of the reward; None = no clip.
    Returns:
        (scalar, {value_clip_fraction: the weighted sum of 1 where the clip took the gradient}).
    Raises:
        TypeError, ValueError: a dtype or shape that does not fit, naming it.
    """
    _check_like("value_loss", values, old_values=old_values, returns=returns, weights=weights)
    old_values, returns, weights = old_values.detach(), returns.detach(), weights.detach()
    squares = (values - returns).square()
    if clip is None:
        return (weights * squares).sum() / 2, {"value_clip_fraction": torch.zeros((), dtype=torch.float64, device=values.device)}
    near = old_values + (values - old_values).clamp(-clip, clip)
    clipped = (near - returns).square()
    return (weights * torch.maximum(squares, clipped)).sum() / 2, {"value_clip_fraction": _sum(weights * (clipped > squares))}


@torch.no_grad()
def variance_sums(values: Tensor, returns: Tensor, weights: Tensor | None = None) -> dict[str, Tensor]:
    """VARIANCE_SUMS, scalars fp64 that add up over micro-batches and ranks, for `explained_variance`."""
    weights = torch.ones_like(values) if weights is None else weights
    _check_like("variance_sums", values, returns=returns, weights=weights)
    weights, returns = weights.double(), returns.double()
    errors = returns - values.double()
    return dict(zip(VARIANCE_SUMS, (weights.sum(), (weights * returns).sum(), (weights * returns.square()).sum(), (weights * errors).sum(),
                                    (weights * errors.square()).sum()), strict=True))


def explained_variance(sums: Mapping[str, float | Tensor]) -> float:
    """1 - Var(returns - values) / Var(returns): 1 is a perfect critic, 0 no better than a constant, below 0 worse. NaN where returns do not vary."""
    count, *moments = (float(sums[name]) for name in VARIANCE_SUMS)
    if not count:
        return float("nan")
    of_returns, of_errors = (squares / count - (total / count) ** 2 for total, squares in (moments[:2], moments[2:]))
    # Below the rounding of the sums a variance is noise
    return 1 - of_errors / of_returns if of_returns > 1e-13 * moments[1] / count else float("nan")


def _clipped(ratio: Tensor, advantage: Tensor, settings: PpoConfig) -> tuple[Tensor, Tensor, Tensor]:
    free, held = -advantage * ratio, -advantage * ratio.clamp(1 - settings.clip, 1 + _high(settings))
    return torch.maximum(free, held), ratio, held > free


def _high(settings: PpoConfig) -> float:
    return settings.clip if settings.clip_high is None else settings.clip_high


def _held(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LARGEST, LARGEST)


def _sum(x: Tensor) -> Tensor:
    return x.sum(dtype=torch.float64)


def _check_like(op: str, values: Tensor, **others: Tensor) -> None:
    for name, tensor in {"values": values, **others}.items():
        check_dtype(op, name, tensor, (torch.float32, torch.float64))
        if tensor.shape != values.shape:
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {tuple(values.shape)}")
