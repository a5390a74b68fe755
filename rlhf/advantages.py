"""How much better each token of a response was than what was expected of it: the advantage A, one function an algorithm.

    reward of token t       r_t = -beta kl_t, and the score of the response on top at its last token
    gae                     generalised advantage estimation with a critic's values V (Schulman et al. 2016, arXiv 1506.02438)
    reinforce               the discounted reward to come, less its mean over the batch, no critic (Williams 1992)
    rloo                    A = R_i - mean of the other R_j to the same prompt (Ahmadian et al. 2024, arXiv 2402.14740)
    grpo                    A = (R_i - mean R) / std R over the responses to the same prompt (Shao et al. 2024, arXiv 2402.03300)

with R = score - beta sum_t kl_t for rloo and grpo, the same A at all tokens of a response. Where the KL stands in the loss, kl is None.

Rules:
- The score belongs to the *last response token*: the EOS where there is one. There is no padding in packed tensors that it could be put on.
- A response cut off by the length limit ends there like any other: the limit is part of the task and the score is for what was written, so the
  value after it is 0. `Episodes.bootstrap` says otherwise where it is wanted.
- An empty response has no token that could learn, and nothing of it reaches the critic; its score still counts in its prompt's baseline.
- A prompt with one response has nothing to compare it with: rloo and grpo give it advantage 0. `Episodes.single` counts them, `Episodes.empty` the empty.
- A score that is not finite is refused: who computes rewards has a rule for failed ones. kl and values that are not finite pass through, and the
  engine then changes nothing (`ppo.whiten` carries them to the whole batch, as they would carry themselves through the update).

Every rank holds the whole iteration's episodes: group baselines and whitening are over the global batch without a collective, and cannot depend on
how it is divided. Nothing here is differentiable.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.checks import check_device, check_dtype, check_shape
from kernels.gae import gae, masked_whiten
from megatron_ext.config.schema import PpoConfig
from rlhf.packed import FLOATS, OFFSETS, check_packed, segment_sum, spread

STD_EPS = 1e-4  # of grpo: scores of a learned reward model that differ by less are the same


@dataclass(frozen=True, kw_only=True)
class Episodes:
    """All responses of an iteration.

    Attributes:
        cu_seqlens: int32 [n + 1], where each response's tokens begin and end.
        scores: fp32 [n], what each response is worth, before KL.
        groups: int32 or int64 [n], the prompt of each; any numbers.
        kl: fp32 [tokens], KL of each token that goes into the reward, nats; None: it is in the loss, or nowhere.
        kl_coef: beta.
        values: fp32 [tokens], the critic's; None without one.
        bootstrap: fp32 [n], the value after each response's last token; None = 0.
    Raises:
        TypeError, ValueError: a dtype, shape, device or offset that does not fit, or a score that is not finite, naming it.
    """

    cu_seqlens: Tensor
    scores: Tensor
    groups: Tensor
    kl: Tensor | None = None
    kl_coef: float = 0.0
    values: Tensor | None = None
    bootstrap: Tensor | None = None

    def __post_init__(self) -> None:
        count = check_packed("advantages", self.cu_seqlens, kl=self.kl, values=self.values)
        for name, tensor, dtypes in (("scores", self.scores, FLOATS), ("groups", self.groups, OFFSETS), ("bootstrap", self.bootstrap, FLOATS)):
            if tensor is not None:
                check_dtype("advantages", name, tensor, dtypes)
                check_shape("advantages", name, tensor, (count,))
                check_device("advantages", name, tensor, self.cu_seqlens.device)
        broken = (~self.scores.isfinite()).nonzero().flatten().tolist()
        if broken:
            raise ValueError(f"advantages: {len(broken)} of {count} scores are not finite, the first is episode {broken[0]}'s: "
                             f"{self.scores[broken[0]].item()}")

    @property
    def tokens(self) -> int:
        """Response tokens of the iteration."""
        return int(self.cu_seqlens[-1])

    @property
    def empty(self) -> int:
        """Responses without a token."""
        return int((self.cu_seqlens.diff() == 0).sum())

    @property
    def single(self) -> int:
        """Responses that are the only one to their prompt."""
        return int((self.groups.unique(return_counts=True)[1] == 1).sum())


Result = tuple[Tensor, Tensor | None]
Function = Callable[[Episodes, PpoConfig], Result]


@dataclass(frozen=True)
class Advantage:
    """An entry of ADVANTAGES: called with episodes and settings it gives (advantages fp32 [tokens], returns fp32 [tokens] or None).

    Attributes:
        critic: it reads `Episodes.values` and gives the returns that the critic learns.
        samples: responses that it needs to each prompt (`rollout.samples`).
    """

    function: Function
    critic: bool
    samples: int

    def __call__(self, episodes: Episodes, settings: PpoConfig) -> Result:
        if self.critic and episodes.values is None:
            raise ValueError(f"advantages: {self.function.__name__} needs the critic's values")
        with torch.no_grad():
            return self.function(episodes, settings)


ADVANTAGES: dict[str, Advantage] = {}


def register(name: str, *, critic: bool = False, samples: int = 1) -> Callable[[Function], Function]:
    """Adds a function to ADVANTAGES under the name that `ppo.advantage` says. Raises: ValueError where the name is taken."""

    def add(function: Function) -> Function:
        if name in ADVANTAGES:
            raise ValueError(f"advantages: {name} is registered already")
        ADVANTAGES[name] = Advantage(function, critic, samples)
        return function

    return add


def token_rewards(episodes: Episodes) -> Tensor:
    """fp32 [tokens]: -kl_coef kl at every token, and the score at the last one of each response."""
    scores = episodes.scores.detach().float()
    rewards = scores.new_zeros(episodes.tokens) if episodes.kl is None else episodes.kl.detach().float() * -episodes.kl_coef
    filled = episodes.cu_seqlens.diff() > 0
    rewards[episodes.cu_seqlens[1:][filled].long() - 1] += scores[filled]
    return rewards


def response_rewards(episodes: Episodes) -> Tensor:
    """fp64 [n]: score - kl_coef times the KL of the whole response."""
    rewards = episodes.scores.detach().double()
    if episodes.kl is None:
        return rewards
    return rewards - episodes.kl_coef * segment_sum(episodes.kl.detach().double(), episodes.cu_seqlens)


def whiten(x: Tensor, *, unbiased: bool = False) -> Tensor:
    """[tokens] of the whole iteration to mean 0 and variance 1 (divided by the count, or by count - 1), fp32. One token alone becomes 0."""
    return masked_whiten(x, unbiased=unbiased)


@register("gae", critic=True)
def gae_advantages(episodes: Episodes, settings: PpoConfig) -> Result:
    """Whitened where `ppo.whiten` is set. Returns are A + V from before whitening."""
    bootstrap = None if episodes.bootstrap is None else episodes.bootstrap.float()
    advantages, returns = gae(token_rewards(episodes), episodes.values.float(), cu_seqlens=episodes.cu_seqlens, gamma=settings.gamma,
                              lam=settings.lam, bootstrap=bootstrap)
    return whiten(advantages) if settings.whiten else advantages, returns


@register("reinforce")
def reinforce_advantages(episodes: Episodes, settings: PpoConfig) -> Result:
    """The baseline is the mean over all tokens of the batch; `ppo.whiten` divides by the standard deviation too (as in REINFORCE++, Hu 2025,
    arXiv 2501.03262)."""
    rewards = token_rewards(episodes)
    to_come, _ = gae(rewards, torch.zeros_like(rewards), cu_seqlens=episodes.cu_seqlens, gamma=settings.gamma, lam=1.0)
    if settings.whiten:
        return whiten(to_come), None
    return (to_come - to_come.double().sum() / max(episodes.tokens, 1)).float(), None


@register("rloo", samples=2)
def rloo_advantages(episodes: Episodes, settings: PpoConfig) -> Result:
    """Whitened over all tokens where `ppo.whiten` is set; the paper does not (conf/stage/rloo.yaml)."""
    rewards = response_rewards(episodes)
    mean, _, count = _groups(rewards, episodes.groups)
    advantages = ((rewards - mean) * count / (count - 1).clamp(min=1)).float()  # R - (sum - R) / (count - 1)
    per_token = spread(advantages, episodes.cu_seqlens, episodes.tokens)
    return whiten(per_token) if settings.whiten else per_token, None


@register("grpo", samples=2)
def grpo_advantages(episodes: Episodes, settings: PpoConfig) -> Result:
    """`ppo.whiten` false leaves out the division by the group's standard deviation, which weighs prompts of one difficulty more than others
    (Dr. GRPO, Liu et al. 2025, arXiv 2503.20783). The standard deviation divides by count - 1, as in TRL and verl; the paper does not say."""
    rewards = response_rewards(episodes)
    mean, deviation, _ = _groups(rewards, episodes.groups)
    advantages = rewards - mean
    if settings.whiten:
        advantages = advantages / (deviation + STD_EPS)
    return spread(advantages.float(), episodes.cu_seqlens, episodes.tokens), None


def _groups(rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """fp64 [n]: (mean, standard deviation with count - 1, count) of the group that each episode is in; of one alone (its own, 0, 1)."""
    _, member, counts = groups.unique(return_inverse=True, return_counts=True)
    by_group, ends = member.argsort(stable=True), F.pad(counts.cumsum(0), (1, 0))  # sums in a fixed order, where index_add on a GPU has none
    mean = segment_sum(rewards[by_group], ends) / counts
    squares = (rewards - mean[member]).square()
    deviation = (segment_sum(squares[by_group], ends) / (counts - 1).clamp(min=1)).sqrt()
    return mean[member], deviation[member], counts[member].double()
