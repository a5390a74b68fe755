"""rlhf/preferences.py: by hand (../shared/ANCHORS.md, section 5), and pair by pair in Python."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from rlhf.preferences import (
    DPO_SUMS,
    RANKING_SUMS,
    calibration_error,
    calibration_sums,
    dpo_loss,
    leads,
    pairs_of,
    ranking_loss,
    reliability,
)

SIZES = (4, 2, 1, 9, 3, 2)  # responses to each prompt
RANKS = torch.tensor([1, 2, 2, 3, 2, 1, 1, 5, 3, 9, 1, 2, 2, 8, 3, 5, 7, 7, 7, 1, 1], dtype=torch.int32)  # the last two prompts are all ties
MARGINS = torch.tensor([0.0, 0.5, 1.0, 0.25, 2.0, 0.1], dtype=torch.float64)


def offsets(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def drawn(dtype=torch.float64) -> torch.Tensor:
    return torch.randn(sum(SIZES), dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def one_prompt(rewards: list[float], ranks: list[int], margin: float, ties: str) -> tuple[float, list[float]]:
    """(mean loss over its pairs, leads of the decided pairs), in Python."""
    losses, lead = [], []
    for (r, a), (s, b) in itertools.combinations(zip(rewards, ranks, strict=True), 2):
        if a == b:
            losses += [-(log_sigmoid(r - s) + log_sigmoid(s - r)) / 2] if ties == "half" else []
        else:
            lead.append(r - s if a < b else s - r)
            losses.append(-log_sigmoid(lead[-1] - margin))
    return sum(losses) / len(losses) if losses else 0.0, lead


# ---- ranking -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranking_by_hand(dtype):
    for count in (2, 4, 9):  # equal scores
        loss, sums = ranking_loss(torch.full((count,), 3.0, dtype=dtype), offsets(count), torch.arange(count))
        assert loss.item() == pytest.approx(math.log(2), rel=1e-6) and sums["pairs"] == count * (count - 1) / 2 == 2 * sums["correct"]
    loss, sums = ranking_loss(torch.tensor([1, 0.5, 0, -0.5], dtype=dtype), offsets(4), torch.tensor([1, 2, 3, 4]))
    assert loss.item() == pytest.approx(0.37502793, abs=5e-9 if dtype == torch.float64 else 5e-8)
    assert {key: value.item() for key, value in sums.items()} == {"prompts": 1, "pairs": 6, "ties": 0, "correct": 6, "margin": 5.0}


@pytest.mark.parametrize("ties", ["half", "skip"])
@pytest.mark.parametrize("margins", [0.0, 0.75, MARGINS])
def test_ranking_is_the_sum_of_the_prompts_means_over_pairs(ties, margins):
    rewards = drawn()
    loss, sums = ranking_loss(rewards, offsets(*SIZES), RANKS, margins, ties=ties)
    each = [one_prompt(r.tolist(), k.tolist(), float(margins[i]) if isinstance(margins, torch.Tensor) else margins, ties)
            for i, (r, k) in enumerate(zip(rewards.split(SIZES), RANKS.split(SIZES), strict=True))]
    lead = [x for _, pairs in each for x in pairs]
    assert loss.item() == pytest.approx(sum(mean for mean, _ in each), rel=1e-12)
    assert {key: value.item() for key, value in sums.items()} == pytest.approx({
        "prompts": 5 if ties == "half" else 3, "pairs": 39, "ties": 8, "correct": sum(x > 0 for x in lead), "margin": sum(lead)})
    assert len(lead) == 39 and set(sums) == set(RANKING_SUMS)
    assert_close(leads(rewards, offsets(*SIZES), RANKS), torch.tensor(lead, dtype=torch.float64))


def test_a_ranking_of_two_is_the_pairwise_loss():
    chosen, rejected = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    order = torch.arange(8) % 2 == 0  # which of the two comes first
    rewards = torch.stack((torch.where(order, chosen, rejected), torch.where(order, rejected, chosen)), dim=1).flatten()
    ranks = torch.stack((torch.where(order, 0, 1), torch.where(order, 1, 0)), dim=1).flatten()
    loss, sums = ranking_loss(rewards, offsets(*[2] * 8), ranks, 0.3)
    assert_close(loss, -F.logsigmoid(chosen - rejected - 0.3).sum())
    assert sums["prompts"] == sums["pairs"] == 8 and sums["correct"] == (chosen > rejected).sum()


def test_ties():
    rewards = torch.tensor([0.7, -0.4], dtype=torch.float64)
    loss, sums = ranking_loss(rewards, offsets(2), torch.tensor([1, 1]), 5.0)
    expected = -(log_sigmoid(1.1) + log_sigmoid(-1.1)) / 2  # no margin
    assert loss.item() == pytest.approx(expected) and expected > math.log(2) and (sums["prompts"], sums["ties"], sums["pairs"]) == (1, 1, 0)
    equal = torch.zeros(2, requires_grad=True)
    loss, _ = ranking_loss(equal, offsets(2), torch.tensor([1, 1]))
    assert loss.item() == pytest.approx(math.log(2)) and not torch.autograd.grad(loss, equal)[0].any()  # where it is smallest
    rewards = torch.tensor([2.0, 0.0, 1.0], requires_grad=True)
    loss, sums = ranking_loss(rewards, offsets(3), torch.tensor([1, 1, 2]), ties="skip")
    assert loss.item() == pytest.approx(-(log_sigmoid(1.0) + log_sigmoid(-1.0)) / 2)  # the mean over two pairs, not three
    assert sums["correct"] == 1 and sums["pairs"] == 2


@pytest.mark.parametrize("ties", ["half", "skip"])
def test_the_order_of_responses_and_prompts_does_not_matter(ties):
    rewards = drawn()
    whole, sums = ranking_loss(rewards, offsets(*SIZES), RANKS, MARGINS, ties=ties)
    gradient = torch.autograd.grad(whole, rewards)[0]
    generator = torch.Generator().manual_seed(6)
    for _ in range(5):
        prompts = torch.randperm(len(SIZES), generator=generator).tolist()
        begins = offsets(*SIZES).tolist()
        order = torch.cat([begins[p] + torch.randperm(SIZES[p], generator=generator) for p in prompts])
        loss, found = ranking_loss(rewards[order], offsets(*(SIZES[p] for p in prompts)), RANKS[order] * 10, MARGINS[prompts], ties=ties)
        assert_close(loss, whole, rtol=1e-12, atol=0)
        assert_close(torch.autograd.grad(loss, rewards)[0], gradient, rtol=1e-12, atol=1e-14)
        assert {key: value.item() for key, value in found.items()} == pytest.approx({key: value.item() for key, value in sums.items()})
    assert_close(ranking_loss(rewards + 7, offsets(*SIZES), RANKS, MARGINS, ties=ties)[0], whole, rtol=1e-12, atol=0)  # rewards have no origin


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_micro_batches_change_nothing(dtype):
    rewards, exact = drawn(dtype), 1e-12 if dtype == torch.float64 else 2e-6
    whole, sums = ranking_loss(rewards, offsets(*SIZES), RANKS)
    gradient = torch.autograd.grad(whole, rewards)[0]
    for split in ([[0], [1], [2], [3], [4], [5]], [[3, 1], [], [0, 2, 4, 5]]):
        found = [ranking_loss(torch.cat([rewards[:0], *(rewards.split(SIZES)[p] for p in part)]), offsets(*(SIZES[p] for p in part)),
                              torch.cat([RANKS[:0], *(RANKS.split(SIZES)[p] for p in part)])) for part in split]
        total = sum(loss for loss, _ in found)
        assert_close(total, whole, rtol=exact, atol=0)
        assert (torch.autograd.grad(total, rewards)[0] - gradient).norm() <= exact * gradient.norm()
        assert all(sum(numbers[key] for _, numbers in found).item() == pytest.approx(sums[key].item()) for key in RANKING_SUMS)


@pytest.mark.parametrize("ties", ["half", "skip"])
def test_gradient_of_the_ranking_loss(ties):
    assert torch.autograd.gradcheck(lambda r: ranking_loss(r, offsets(*SIZES), RANKS, MARGINS, ties=ties)[0], (drawn(),))


def test_large_rewards_do_not_overflow():
    rewards = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss, _ = ranking_loss(rewards, offsets(2), torch.tensor([1, 2]))
    assert loss == 2e4 and torch.autograd.grad(loss, rewards)[0].tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("sizes", [(1,), (0, 1, 0), (), (1, 1, 1)])
def test_prompts_without_a_pair_add_nothing(sizes):
    rewards = torch.ones(sum(sizes), requires_grad=True)
    loss, sums = ranking_loss(rewards, offsets(*sizes), torch.ones(sum(sizes), dtype=torch.int64))
    loss.backward()
    assert loss == 0 and not any(sums.values()) and not rewards.grad.any()
    mixed, counted = ranking_loss(torch.tensor([9.0, 1.0, 0.0, 5.0]), offsets(1, 2, 1), torch.tensor([1, 1, 2, 1]))
    assert counted["prompts"] == 1 and mixed.item() == pytest.approx(-log_sigmoid(1.0))


def test_pairs_are_made_once_each():
    pairs = pairs_of(offsets(3, 0, 1, 2), torch.tensor([2, 1, 1, 4, 1, 2]))
    found = set(zip(pairs.better.tolist(), pairs.worse.tolist(), pairs.prompt.tolist(), pairs.tied.tolist(), strict=True))
    assert found == {(1, 0, 0, False), (2, 0, 0, False), (1, 2, 0, True), (4, 5, 3, False)} and pairs.better.numel() == 4


# ---- calibration -------------------------------------------------------------------------------------------------------------------


def test_calibration_by_hand():
    """Two bins: confidences under and above .75. In the second three pairs of which two are right, in the first two, one of them even."""
    confidences = torch.tensor([0.9, 0.8, 0.9, 0.6, 0.5], dtype=torch.float64)
    lead = confidences.logit() * torch.tensor([1, 1, -1, 1, 1])
    sums = calibration_sums(lead, bins=2)
    assert_close(sums, torch.tensor([[2.0, 1.1, 1.5], [3.0, 2.6, 2.0]], dtype=torch.float64))
    assert calibration_error(sums) == pytest.approx((abs(1.5 - 1.1) + abs(2.0 - 2.6)) / 5)
    assert [n for n, _, _ in reliability(sums)] == [2, 3] and reliability(sums)[1][1:] == pytest.approx((2.6 / 3, 2 / 3))
    assert_close(calibration_sums(lead[:2], bins=2) + calibration_sums(lead[2:], bins=2), sums)


def test_a_calibrated_model_has_no_error_and_an_overconfident_one_has():
    generator = torch.Generator().manual_seed(1)
    gap = torch.randn(50_000, dtype=torch.float64, generator=generator) * 2
    wins = torch.rand(gap.shape, dtype=torch.float64, generator=generator) < gap.sigmoid()
    lead = torch.where(wins, gap, -gap)  # Bradley-Terry: the labels follow the model
    assert calibration_error(calibration_sums(lead)) < 0.01 and calibration_error(calibration_sums(lead * 4)) > 0.1
    assert [n for n, _, _ in reliability(calibration_sums(torch.tensor([1e9, 0.0]), bins=10))] == [1, 1]  # both ends have a bin
    assert math.isnan(calibration_error(calibration_sums(lead[:0]))) and reliability(calibration_sums(lead[:0])) == []


# ---- DPO ---------------------------------------------------------------------------------------------------------------------------


def test_dpo_by_hand():
    chosen, rejected, base = torch.tensor([-4.0]).double(), torch.tensor([-6.0]).double(), torch.tensor([-5.0, -6.3]).double()
    loss, sums = dpo_loss(chosen, rejected, base[:1], base[1:], beta=0.1)
    assert loss.item() == pytest.approx(0.65875956, abs=5e-9)
    assert {key: value.item() for key, value in sums.items()} == pytest.approx({"correct": 1, "margin": 0.07, "chosen_reward": 0.1, "rejected_reward": 0.03})
    smooth, _ = dpo_loss(chosen, rejected, base[:1], base[1:], beta=0.1, label_smoothing=0.2)
    assert smooth.item() == pytest.approx(-0.8 * log_sigmoid(0.07) - 0.2 * log_sigmoid(-0.07))
    start, sums = dpo_loss(chosen, rejected, chosen, rejected, beta=0.1)
    assert start.item() == pytest.approx(math.log(2)) and sums["correct"] == 0.5  # the policy is the reference


def test_dpo_is_a_sum_with_the_gradient_of_equation_7():
    chosen, rejected, a, b = (x.clone() for x in torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(8)))
    chosen, rejected, a = chosen.requires_grad_(), rejected.requires_grad_(), a.requires_grad_()
    for smoothing in (0.0, 0.1):
        assert torch.autograd.gradcheck(lambda x, y, s=smoothing: dpo_loss(x, y, a.detach(), b, beta=0.3, label_smoothing=s)[0], (chosen, rejected))
    whole, sums = dpo_loss(chosen, rejected, a, b, beta=0.3)
    whole.backward()
    weight = 0.3 * (0.3 * ((rejected - b) - (chosen - a))).sigmoid()
    assert_close(chosen.grad, -weight)
    assert_close(rejected.grad, weight)
    assert a.grad is None and not any(value.requires_grad for value in sums.values())
    found = [dpo_loss(chosen[part], rejected[part], a[part], b[part], beta=0.3) for part in (slice(0, 4), slice(4, 4), slice(4, 9))]
    assert_close(sum(loss for loss, _ in found), whole, rtol=1e-12, atol=0)
    assert all(sum(numbers[key] for _, numbers in found).item() == pytest.approx(sums[key].item()) for key in DPO_SUMS)


# ---- bad input ---------------------------------------------------------------------------------------------------------------------


def test_nan_is_not_hidden():
    rewards = torch.tensor([1.0, float("nan"), 0.0, 1.0])
    loss, sums = ranking_loss(rewards, offsets(2, 2), torch.tensor([1, 2, 2, 1]))
    assert loss.isnan() and sums["pairs"] == 2 and sums["correct"] == 1
    assert dpo_loss(rewards, rewards, rewards, rewards, beta=0.1)[0].isnan()


def test_bad_input_is_named():
    r, k, cu = torch.ones(3), torch.tensor([1, 2, 3]), offsets(3)
    for error, words, call in (
        (ValueError, "ties is 'drop'", lambda: ranking_loss(r, cu, k, ties="drop")), (ValueError, "ranks has shape", lambda: ranking_loss(r, cu, k[:2])),
        (TypeError, "ranks is float32", lambda: ranking_loss(r, cu, r)), (TypeError, "rewards is int64", lambda: ranking_loss(k, cu, k)),
        (ValueError, r"margins has shape \(3,\)", lambda: ranking_loss(r, cu, k, torch.zeros(3))), (ValueError, "cu_seqlens must rise", lambda: ranking_loss(r, offsets(2), k)),
        (TypeError, "margins is int64", lambda: ranking_loss(r, cu, k, k[:1])), (ValueError, "ranks has shape", lambda: leads(r, cu, k[:2])),
        (ValueError, r"rewards has shape \(1, 3\)", lambda: ranking_loss(r[None], cu, k)), (ValueError, "ranks is on meta", lambda: ranking_loss(r, cu, k.to("meta"))),
        (ValueError, "bins is 0", lambda: calibration_sums(r, bins=0)), (ValueError, "a reward is not finite", lambda: calibration_sums(r / 0)),
        (ValueError, "rejected has shape", lambda: dpo_loss(r, r[:1], r, r, beta=0.1)), (TypeError, "reference_chosen is int64", lambda: dpo_loss(r, r, k, r, beta=0.1)),
    ):
        with pytest.raises(error, match=words):
            call()
