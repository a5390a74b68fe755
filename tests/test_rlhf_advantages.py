"""rlhf/advantages.py: by hand (../shared/ANCHORS.md, section 5), and the mistakes that released code has made."""
import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from megatron_ext.config.schema import PpoConfig
from rlhf.advantages import ADVANTAGES, Episodes, register, response_rewards, token_rewards, whiten
from rlhf.kl import estimate

PLAIN = PpoConfig(whiten=False)
LOGP, REF = torch.tensor([-1.0, -2.0, -1.5]), torch.tensor([-1.2, -1.9, -2.5])
NAN = float("nan")


def offsets(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def episodes(lengths: list[int], scores: list[float], *, groups: list[int] | None = None, **parts) -> Episodes:
    return Episodes(cu_seqlens=offsets(*lengths), scores=torch.tensor(scores), groups=torch.tensor(groups or list(range(len(scores)))), **parts)


def drawn(lengths: list[int], *, seed: int = 0, samples: int = 2) -> Episodes:
    """Random scores, KL and values; `samples` responses to each prompt."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    scores, kl, values = (torch.randn(size, generator=generator) for size in (len(lengths), tokens, tokens))
    return Episodes(cu_seqlens=offsets(*lengths), scores=scores, groups=torch.arange(len(lengths)) // samples, kl=kl, kl_coef=0.1, values=values)


# ---- GAE, and where the reward goes ------------------------------------------------------------------------------------------------


def test_gae_by_hand():
    """Beta .02, k1, terminal reward 1, V [.1, .2, .3]; then lambda 0."""
    one = episodes([3], [1.0], kl=estimate(LOGP, REF, "k1"), kl_coef=0.02, values=torch.tensor([0.1, 0.2, 0.3]))
    assert_close(token_rewards(one), torch.tensor([-0.004, 0.002, 0.98]), rtol=1e-5, atol=0)
    advantages, returns = ADVANTAGES["gae"](one, PLAIN)
    assert_close(advantages, torch.tensor([0.8066, 0.748, 0.68]), rtol=1e-6, atol=0)
    assert_close(returns, torch.tensor([0.9066, 0.948, 0.98]), rtol=1e-6, atol=0)
    white, same_returns = ADVANTAGES["gae"](one, PpoConfig())
    assert_close(white, torch.tensor([1.19333439, 0.06056881, -1.2539032]), rtol=1e-5, atol=0)
    assert torch.equal(returns, same_returns)
    assert_close(whiten(advantages, unbiased=True), torch.tensor([0.97435406, 0.04945426, -1.02380831]), rtol=1e-5, atol=0)
    zero = episodes([3], [5.0], values=torch.tensor([1.0, 2.0, 3.0]))
    assert ADVANTAGES["gae"](zero, replace(PLAIN, lam=0.0))[0].tolist() == [1.0, 1.0, 2.0]
    # r [0, 0, 1, 0]: a reward before the end is what the KL of that token can give
    inner = episodes([4], [0.0], kl=torch.tensor([0.0, 0.0, -1.0, 0.0]), kl_coef=1.0, values=torch.arange(4.0))
    assert ADVANTAGES["gae"](inner, replace(PLAIN, lam=0.0, gamma=0.5))[0].tolist() == [0.5, 0.0, 0.5, -3.0]


def test_the_score_is_given_once():
    """Mistake: the reward added to every token."""
    data = drawn([4, 1, 7, 3])
    assert_close(torch.segment_reduce(token_rewards(data), "sum", offsets=data.cu_seqlens), response_rewards(data).float(), rtol=1e-5, atol=1e-6)
    alone = token_rewards(replace(data, kl=None))
    assert alone.nonzero().flatten().tolist() == [3, 4, 11, 14] and torch.equal(alone[[3, 4, 11, 14]], data.scores)


EOS, PAD = 2, 0


@pytest.mark.parametrize("width", [6, 9])
@pytest.mark.parametrize("pad", [PAD, EOS])
def test_the_score_stands_on_the_last_response_token(width, pad):
    """Mistakes: the reward on the first pad after EOS; a reward that moves with right padding. The third was cut off: it has no EOS."""
    responses = [[5, 7, EOS], [EOS], [4, 4, 9, 8, 6, 5]]
    padded = torch.tensor([row + [pad] * (width - len(row)) for row in responses])
    live = torch.arange(width) < torch.tensor([[len(row)] for row in responses])
    rewards = torch.zeros(padded.shape)
    rewards[live] = token_rewards(episodes([len(row) for row in responses], [1.0, 2.0, 3.0]))
    at = rewards.nonzero()
    assert at.tolist() == [[0, 2], [1, 0], [2, 5]] and rewards[rewards != 0].tolist() == [1.0, 2.0, 3.0]
    assert padded[at[:, 0], at[:, 1]].tolist() == [EOS, EOS, 5]


def test_a_truncated_response_ends_unless_told_otherwise():
    data = episodes([2, 2], [1.0, 1.0], values=torch.full((4,), 0.5))
    advantages, _ = ADVANTAGES["gae"](data, PLAIN)
    assert advantages[1] == advantages[3] == 0.5
    advantages, _ = ADVANTAGES["gae"](replace(data, bootstrap=torch.tensor([0.0, 2.0])), PLAIN)
    assert advantages[1] == 0.5 and advantages[3] == 2.5


def test_whitening_is_over_the_whole_iteration():
    """Mistake: whitening per rank. Two halves of different scores are far apart, and stay so."""
    lengths = [3, 5, 2, 8]
    data = replace(drawn(lengths), scores=torch.tensor([9.0, 10.0, -10.0, -9.0]))
    raw, white = ADVANTAGES["gae"](data, PLAIN)[0].double(), ADVANTAGES["gae"](data, PpoConfig())[0]
    assert_close(white, ((raw - raw.mean()) / raw.std(correction=0)).float(), rtol=1e-5, atol=1e-6)
    halves = torch.cat([whiten(raw[:8].float()), whiten(raw[8:].float())])
    assert white[:8].min() > white[8:].max() and (halves - white).abs().max() > 0.5
    assert whiten(torch.ones(1)).tolist() == [0.0] and not whiten(torch.empty(0)).numel()


# ---- without a critic --------------------------------------------------------------------------------------------------------------


def test_rloo_by_hand():
    data = episodes([1, 2, 1, 3], [1.0, -3.0, 5.0, 2.0], groups=[7, 7, 7, 7])
    advantages, returns = ADVANTAGES["rloo"](data, PLAIN)
    each = [-1 / 3, -17 / 3, 5.0, 1.0]
    assert returns is None
    assert_close(advantages, torch.tensor([each[0], each[1], each[1], each[2], *[each[3]] * 3]), rtol=1e-6, atol=0)
    # The KL of the whole response belongs to its reward
    kl = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    charged = ADVANTAGES["rloo"](replace(data, kl=kl, kl_coef=1.5, scores=torch.tensor([1.0, 0.0, 5.0, 2.0])), PLAIN)[0]
    assert_close(charged, advantages, rtol=1e-6, atol=0)


def test_grpo_by_hand():
    data = episodes([1, 1, 1, 2, 1], [1.0, 2.0, 4.0, 6.0, 5.0], groups=[3, 3, -1, 3, -1])
    advantages, _ = ADVANTAGES["grpo"](data, PpoConfig())
    deviation = math.sqrt(7) + 1e-4  # of 1, 2, 6 around 3; of 4, 5 it is sqrt(.5)
    expected = [-2 / deviation, -1 / deviation, -0.5 / (math.sqrt(0.5) + 1e-4), 3 / deviation, 3 / deviation, 0.5 / (math.sqrt(0.5) + 1e-4)]
    assert_close(advantages, torch.tensor(expected), rtol=1e-6, atol=0)
    assert ADVANTAGES["grpo"](data, PLAIN)[0].tolist() == [-2.0, -1.0, -0.5, 3.0, 3.0, 0.5]  # Dr. GRPO
    same = episodes([1, 1, 1], [0.1, 0.1, 0.1], groups=[0, 0, 0])
    assert ADVANTAGES["grpo"](same, PpoConfig())[0].abs().max() < 1e-6


def test_reinforce_by_hand():
    data = episodes([2, 1], [4.0, 1.0], kl=torch.tensor([1.0, 2.0, 3.0]), kl_coef=0.5)
    # rewards [-.5, 3, -.5]; to come, halved each step: [1, 3, -.5]
    settings = replace(PLAIN, gamma=0.5)
    advantages, _ = ADVANTAGES["reinforce"](data, settings)
    mean = 3.5 / 3
    assert_close(advantages, torch.tensor([1 - mean, 3 - mean, -0.5 - mean]), rtol=1e-6, atol=0)
    assert_close(ADVANTAGES["reinforce"](data, replace(settings, whiten=True))[0], whiten(advantages), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["rloo", "grpo"])
def test_one_response_to_a_prompt_has_advantage_zero(name):
    data = episodes([2, 1, 3, 2], [4.0, 9.0, 1.0, 7.0], groups=[5, 6, 5, 8])
    advantages, _ = ADVANTAGES[name](data, PLAIN)
    assert data.single == 2 and not advantages[[2, 6, 7]].any() and (advantages[[0, 1, 3, 4, 5]] != 0).all()


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_empty_responses(name):
    """They have no token to learn; without group baselines the others do not notice. Nothing at all gives nothing."""
    data = episodes([2, 0, 3, 0], [4.0, 9.0, 1.0, 2.0], groups=[0, 0, 1, 1], values=torch.arange(5.0))
    advantages, returns = ADVANTAGES[name](data, PLAIN)
    assert data.empty == 2 and advantages.shape == (5,) and advantages.isfinite().all()
    assert (returns is not None) == ADVANTAGES[name].critic
    if name in ("rloo", "grpo"):
        assert advantages[0] < 0  # the empty one's 9 is in its baseline
    else:
        without = episodes([2, 3], [4.0, 1.0], values=torch.arange(5.0))
        assert torch.equal(ADVANTAGES[name](without, PLAIN)[0], advantages)
    nothing = Episodes(cu_seqlens=offsets(), scores=torch.empty(0), groups=torch.empty(0, dtype=torch.int64), values=torch.empty(0))
    assert ADVANTAGES[name](nothing, PpoConfig())[0].shape == (0,)


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
@pytest.mark.parametrize("settings", [PLAIN, PpoConfig()])
def test_the_order_of_episodes_does_not_matter(name, settings):
    lengths = [3, 1, 4, 1, 5, 9, 2, 6]
    data = drawn(lengths)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(5)).tolist()

    def take(flat):
        return torch.cat([flat.split(lengths)[i] for i in order])

    moved = Episodes(cu_seqlens=offsets(*(lengths[i] for i in order)), scores=data.scores[order], groups=data.groups[order] * 17 - 5,
                     kl=take(data.kl), kl_coef=data.kl_coef, values=take(data.values))
    assert_close(ADVANTAGES[name](moved, settings)[0], take(ADVANTAGES[name](data, settings)[0]), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_nothing_is_differentiable(name):
    data = drawn([2, 3])
    for part in (data.kl, data.values, data.scores):
        part.requires_grad_()
    assert not any(part.requires_grad for part in ADVANTAGES[name](data, PpoConfig()) if part is not None)


def test_what_the_registry_says():
    assert {name: (entry.critic, entry.samples) for name, entry in ADVANTAGES.items()} == {
        "gae": (True, 1), "reinforce": (False, 1), "rloo": (False, 2), "grpo": (False, 2)}
    with pytest.raises(ValueError, match="gae is registered already"):
        register("gae")(lambda episodes, settings: None)
    try:
        register("zero", samples=3)(lambda data, settings: (torch.zeros(data.tokens), None))
        assert ADVANTAGES["zero"].samples == 3 and ADVANTAGES["zero"](drawn([2, 1]), PLAIN)[0].tolist() == [0.0] * 3
    finally:
        ADVANTAGES.pop("zero", None)


def test_bad_input_of_advantages_is_named():
    data = drawn([2, 3])
    for error, words, parts in (
        (ValueError, "1 of 2 scores are not finite, the first is episode 1's: nan", {"scores": torch.tensor([1.0, NAN])}),
        (ValueError, "2 of 2 scores are not finite, the first is episode 0's: inf", {"scores": torch.tensor([math.inf, NAN])}),
        (ValueError, "scores has shape", {"scores": torch.ones(3)}), (ValueError, "groups has shape", {"groups": torch.ones(2, 1, dtype=torch.int64)}),
        (TypeError, "groups is float32", {"groups": torch.ones(2)}), (TypeError, "scores is int64", {"scores": torch.ones(2, dtype=torch.int64)}),
        (ValueError, "values has shape", {"values": torch.ones(4)}), (ValueError, "kl has shape", {"kl": torch.ones(5, 1), "values": None}),
        (ValueError, "cu_seqlens must rise", {"cu_seqlens": offsets(7, -2)}), (ValueError, "bootstrap has shape", {"bootstrap": torch.ones(5)}),
        (ValueError, "scores is on meta", {"scores": torch.ones(2, device="meta")}),
    ):
        with pytest.raises(error, match=words):
            replace(data, **parts)
    with pytest.raises(ValueError, match="gae_advantages needs the critic's values"):
        ADVANTAGES["gae"](replace(data, values=None), PLAIN)


def test_a_value_that_is_nan_stays_in_its_response():
    data = drawn([2, 3, 2])
    data.values[3] = NAN
    advantages, _ = ADVANTAGES["gae"](data, PLAIN)
    assert advantages.isnan().tolist() == [False, False, True, True, False, False, False]
    assert ADVANTAGES["gae"](data, PpoConfig())[0].isnan().all()  # whitened: the engine takes no step at all
