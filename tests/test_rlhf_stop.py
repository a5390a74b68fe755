"""rlhf/stop.py: each criterion stops when it should, not an iteration sooner, says what it saw, and survives a resume to the bit."""
import json
import math
import random

import numpy as np
import pytest

from megatron_ext.config.schema import Config, StopConfig
from megatron_ext.train.stop import Best
from rlhf.stop import PolicyCriteria, RewardCriteria, slope


def policy(**stop) -> PolicyCriteria:
    return PolicyCriteria(Config(stop=StopConfig(**stop)))


def over(criteria, *iterations: dict, first: int = 1) -> list:
    """The verdict after each iteration."""
    return [criteria.after_iteration({"step": first + i, **one}) for i, one in enumerate(iterations)]


def test_slope_is_that_of_numpy():
    source = random.Random(0)
    x, y = [source.gauss(5, 2) for _ in range(17)], [source.gauss(-1, 3) for _ in range(17)]
    assert slope(x, y) == pytest.approx(np.polyfit(x, y, 1)[0], rel=1e-12)
    assert slope([1, 2, 3], [2.0, 4.0, 6.0]) == 2.0 and math.isnan(slope([1, 1], [0, 1]))


def test_nothing_is_asked_for():
    source = random.Random(1)
    wild = [{"kl_k1": 10.0 ** i, "reward": -i, "entropy": 0.0, "response_length": source.random(), "reward_disagreement": i} for i in range(30)]
    assert over(policy(), *wild) == [None] * 30


def test_kl_budget_of_rollouts_and_of_validations():
    criteria = policy(kl_budget=5.0)
    assert over(criteria, {"kl_k1": 4.9, "reward": 1.0}, {"kl_k1": 5.0, "reward": 1.0}, {"kl_k1": math.nan, "reward": 1.0}, {}) == [None] * 4
    stop = criteria.after_iteration({"step": 5, "kl_k1": 5.01, "reward": 1.0})
    assert stop.kind == "kl_budget" and not stop.failed
    assert stop.reason == "at iteration 5 the KL to the reference of its rollouts was 5.010 nats a response, above the budget of 5"
    held_out = policy(kl_budget=5.0).after_iteration({"step": 1, "kl_k1": 1.0, "reward": 0.0, "validation_kl_k1": 6.0})
    assert held_out.kind == "kl_budget" and "held-out prompts was 6.000" in held_out.reason


def test_entropy_floor_waits_for_its_window():
    found = over(policy(entropy_floor=0.5, window=3), *({"entropy": value} for value in (0.1, 0.9, 0.6, 0.4, 0.4)))
    assert found[:4] == [None] * 4  # means .533 and .633
    assert found[4].kind == "entropy_floor" and "0.4667" in found[4].reason and "floor of 0.5" in found[4].reason


@pytest.mark.parametrize(("lengths", "word"), [([10, 10, 19, 20, 22], "long"), ([10, 10, 6, 5, 4], "short")])
def test_length_drift_both_ways(lengths, word):
    found = over(policy(length_drift=2.0, window=2), *({"response_length": float(value)} for value in lengths))
    assert found[:4] == [None] * 4  # the start is 10; means 14.5 and 19.5, or 8 and 5.5
    assert found[4].kind == "length_drift" and "against 10.0 in the first 2" in found[4].reason and f"times as {word}" in found[4].reason


def test_disagreement_against_its_start():
    found = over(policy(reward_disagreement=1.5, window=2), *({"reward_disagreement": value} for value in (0.1, 0.3, 0.2, 0.4, 0.21)))
    assert found[:4] == [None] * 4  # start .2: means .25, .3 (not more than 1.5 times)
    assert over(policy(reward_disagreement=1.5, window=2), *({"reward_disagreement": value} for value in (0.2, 0.2, 0.4, 0.4)))[3].kind \
        == "reward_disagreement"


def test_reward_per_kl():
    points = [(1.0, 1.0), (2.0, 1.5), (3.0, 1.75), (4.0, 1.8)]
    found = over(policy(reward_per_kl=0.2, window=3), *({"kl_k1": kl, "reward": reward} for kl, reward in points))
    assert found[:3] == [None] * 3  # .375 a nat
    assert found[3].kind == "reward_per_kl" and "earned 0.1500 reward" in found[3].reason and "KL 2.000 to 4.000" in found[3].reason


def test_reward_per_kl_is_not_asked_while_kl_falls_or_stands():
    falls = [{"kl_k1": 5.0 - i, "reward": 1.0 + i} for i in range(5)]  # a slope of -1, and nothing is paid
    assert over(policy(reward_per_kl=0.1, window=3), *falls) == [None] * 5
    assert over(policy(reward_per_kl=0.1, window=3), *[{"kl_k1": 0.0, "reward": 0.0}] * 5) == [None] * 5


def test_a_point_needs_both_of_its_numbers():
    criteria = policy(reward_per_kl=0.2, window=3)
    over(criteria, {"kl_k1": 1.0, "reward": 1.0}, {"kl_k1": 9.0, "reward": math.nan}, {"reward": 9.0}, {"kl_k1": 2.0, "reward": 1.5})
    assert list(criteria.recent["kl_k1"]) == [1.0, 2.0] and list(criteria.recent["reward"]) == [1.0, 1.5]


def test_two_at_once_are_both_told():
    stop = policy(kl_budget=1.0, entropy_floor=1.0, window=2)
    found = over(stop, *[{"kl_k1": 2.0, "reward": 0.0, "entropy": 0.5}] * 2)[1]
    assert found.kind == "kl_budget" and "; also, the entropy" in found.reason


def test_a_resume_at_any_iteration_stops_where_the_whole_run_does():
    source = random.Random(2)
    run = [{"kl_k1": i / 3 + source.random(), "reward": math.sqrt(i) + source.random() / 9, "entropy": 2 - i / 30 + source.random() / 3,
            "response_length": 20 + source.random() * i, "reward_disagreement": 0.1 + source.random() * i / 50} for i in range(40)]
    for stop in ({"reward_per_kl": 0.3}, {"entropy_floor": 1.3}, {"length_drift": 1.5}, {"reward_disagreement": 3.0}, {"kl_budget": 9.0}):
        whole = over(policy(**stop, window=7), *run)
        pieces, criteria = [], policy(**stop, window=7)
        for i, one in enumerate(run):
            state = json.loads(json.dumps(criteria.state_dict()))
            criteria = policy(**stop, window=7)
            criteria.load_state_dict(state)
            pieces += over(criteria, one, first=i + 1)
        assert pieces == whole and any(whole) and whole[0] is None, stop


def test_another_window_after_a_resume_keeps_the_start():
    first = policy(length_drift=2.0, window=4)
    over(first, *({"response_length": value} for value in (10.0, 10.0, 10.0, 10.0, 12.0)))
    second = policy(length_drift=2.0, window=2)
    second.load_state_dict(first.state_dict())
    assert second.start["response_length"] == 10.0 and list(second.recent["response_length"]) == [10.0, 12.0]


def test_reward_accuracy_and_calibration():
    criteria = RewardCriteria(Config(stop=StopConfig(reward_accuracy=0.8, calibration_error=0.05)))
    seen = [(None, None), (0.79, 0.01), (0.9, 0.06), (0.9, math.nan), (math.nan, 0.01)]
    for accuracy, error in seen:
        assert criteria.after_validation({"step": 1, **({} if accuracy is None else {"validation_accuracy": accuracy,
                                                                                      "validation_calibration_error": error})}) is None
    stop = criteria.after_validation({"step": 200, "validation_accuracy": 0.8, "validation_calibration_error": 0.05, "validation_pairs": 1234.0})
    assert stop.kind == "reward_accuracy" and "80.0% of 1,234 held-out pairs" in stop.reason and "step 200" in stop.reason and "0.050" in stop.reason
    plain = RewardCriteria(Config(stop=StopConfig(reward_accuracy=0.8)))
    assert plain.after_validation({"step": 1, "validation_accuracy": 0.81}).kind == "reward_accuracy"
    assert RewardCriteria(Config()).after_validation({"step": 1, "validation_accuracy": 1.0}) is None


def test_best_by_reward_within_the_budget():
    best = policy(kl_budget=5.0).best
    judged = [(1.0, 4.0), (2.0, 6.0), (2.0, 5.0), (2.0, 1.0), (3.0, math.nan), (math.nan, 1.0), (2.5, 4.0)]
    assert [best.better(i, {"validation_reward": reward, "validation_kl_k1": kl}) for i, (reward, kl) in enumerate(judged)] \
        == [True, False, True, False, False, False, True]
    assert not best.better(9, {"validation_reward": 9.0}), "a budget that was not measured is not kept"
    assert policy().best.better(0, {"validation_reward": -1.0, "validation_kl_k1": 99.0})
    resumed = policy(kl_budget=5.0).best
    resumed.load_state_dict(json.loads(json.dumps(best.state_dict())))
    assert (resumed.step, resumed.value) == (6, 2.5) and not resumed.better(10, {"validation_reward": 2.5, "validation_kl_k1": 0.0})


def test_best_of_other_stages():
    loss = Best("validation_loss")
    assert [loss.better(i, {"validation_loss": value}) for i, value in enumerate((3.0, 3.0, math.inf, 2.9))] == [True, False, False, True]
    accuracy = RewardCriteria(Config(stop=StopConfig(reward_accuracy=0.9, calibration_error=0.1))).best
    assert [accuracy.better(i, {"validation_accuracy": a, "validation_calibration_error": e}) for i, (a, e) in
            enumerate(((0.7, 0.05), (0.8, 0.2), (0.75, 0.1)))] == [True, False, True]
    other = Best("validation_reward", largest=True)
    other.load_state_dict(loss.state_dict())
    assert other.value is None, "a choice by another number"
