"""The KL divergence between the policy p and its reference q, from the log-probabilities of sampled tokens, and what it costs.

Estimators (Schulman 2020, joschu.net/blog/kl-approx.html), with l = log p(token) - log q(token) of tokens drawn from p:

    k1 = l,     k2 = l^2 / 2,     k3 = exp(-l) - 1 + l.

As *numbers* E[k1] = E[k3] = KL(p | q), and k3 is never negative and varies less; E[k2] is off by a term of third order. As *penalties* another
thing matters: the gradient that arrives, and that depends on where the penalty stands.

- In the reward (a number that multiplies grad log p): k1. E[k1 grad log p] is the gradient of KL(p | q), since what is left out, E[grad k1] =
  E[grad log p], is 0. k2 and k3 lose a term there that is not 0.
- In the loss (differentiated itself, tokens held fixed): k2. E[grad k2] = E[l grad log p], the same gradient. k1 does nothing there but add
  noise: E[grad k1] = 0. k3 (GRPO's choice, Shao et al. 2024) gives E[(1 - q / p) grad log p], the gradient of KL(q | p), the other
  direction; the two agree to first order near p = q.

In the loss each token answers for its own divergence, given the tokens before it; in the reward (gamma = lambda = 1) for later ones too. In later
inner steps tokens come from an older p: nothing in the loss corrects for that, as nobody's code does; the clip keeps it small.

Controllers of the coefficient beta: fixed, or adaptive (Ziegler et al. 2019, arXiv 1909.08593, section 2.2): after n episodes of mean KL d,

    beta <- beta (1 + clip(d / target - 1, -0.2, 0.2) n / horizon).
"""
import math

import torch
from torch import Tensor

from megatron_ext.config.schema import PpoConfig
from megatron_ext.errors import UserError
from rlhf.packed import check_packed, segment_sum

KINDS = ("k1", "k2", "k3")


def estimate(logp: Tensor, ref_logp: Tensor, kind: str) -> Tensor:
    """The KL of each token, nats; differentiable in both. NaN stays where it is.

    Args:
        logp, ref_logp: log-probabilities of the same tokens under policy and reference, any one shape, fp32 or fp64.
        kind: k1 | k2 | k3; which is right where stands above.
    Returns:
        The shape and dtype of logp; exactly 0 where both are equal.
    Raises:
        ValueError: shapes that differ (they would broadcast). UserError: an unknown kind.
    """
    if logp.shape != ref_logp.shape:
        raise ValueError(f"kl: ref_logp has shape {tuple(ref_logp.shape)}, expected {tuple(logp.shape)}")
    difference = logp - ref_logp
    if kind == "k1":
        return difference
    if kind == "k2":
        return difference.square() / 2
    if kind == "k3":
        return torch.expm1(-difference) + difference  # exp(-l) - 1 rounds to below -l near 0: a negative KL
    raise UserError("ppo.kl", kind, f"no such estimator of the KL; there are {', '.join(KINDS)}")


def sequence_kl(kl: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[tokens] -> [n]: nats a response, 0 for an empty one. Raises what `check_packed` does."""
    check_packed("sequence_kl", cu_seqlens, kl=kl)
    return segment_sum(kl, cu_seqlens)


class FixedKL:
    """A coefficient that stays. It is a setting, like the learning rate: a resume takes the configuration's."""

    def __init__(self, value: float):
        self.value = value

    def update(self, mean_kl: float, episodes: int) -> None:
        """Nothing: the same call as the other controller's."""

    def state_dict(self) -> dict:
        return {"kind": "fixed", "value": self.value}

    def load_state_dict(self, state: dict) -> None:
        _same_kind(state, "fixed")


class AdaptiveKL:
    """A coefficient that follows the KL towards a target. Its value is state: a resume goes on with it to the last bit.

    Args:
        value: the first coefficient. target: nats a response. horizon: episodes.
    """

    def __init__(self, value: float, *, target: float, horizon: float):
        for key, number in (("ppo.kl_target", target), ("ppo.kl_horizon", horizon)):
            if not number > 0 or math.isinf(number):
                raise UserError(key, number, "the adaptive KL controller needs a positive number")
        self.value, self.target, self.horizon = value, target, horizon

    def update(self, mean_kl: float, episodes: int) -> None:
        """After an iteration. A KL that is NaN says nothing and changes nothing: a coefficient once NaN would stay so.

        One call counts for at most one horizon, so that it changes the coefficient by a fifth at most: the formula itself would turn it
        negative (a reward for leaving the reference) above five horizons of episodes.

        Args:
            mean_kl: over the episodes, of the sum over tokens, nats. episodes: how many there were.
        """
        if math.isnan(mean_kl):
            return
        error = min(max(mean_kl / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * min(episodes / self.horizon, 1.0)

    def state_dict(self) -> dict:
        """JSON-able; JSON keeps every bit of the value."""
        return {"kind": "adaptive", "value": self.value}

    def load_state_dict(self, state: dict) -> None:
        """Raises: UserError where the state is the fixed controller's."""
        _same_kind(state, "adaptive")
        self.value = float(state["value"])


def _same_kind(state: dict, kind: str) -> None:
    if state["kind"] != kind:
        raise UserError("ppo.kl_target", "null" if kind == "fixed" else "set",
                        f"the checkpoint's KL coefficient was {state['kind']}; a run goes on with the controller that it began with")


def controller(settings: PpoConfig) -> FixedKL | AdaptiveKL:
    """What `ppo.kl_coef`, `ppo.kl_target` and `ppo.kl_horizon` ask for."""
    if settings.kl_target is None:
        return FixedKL(settings.kl_coef)
    return AdaptiveKL(settings.kl_coef, target=settings.kl_target, horizon=settings.kl_horizon)
