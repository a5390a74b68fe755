"""RLHF says the same in every layout and however the rollouts are cut: one spawn of four ranks (rlhf_ranks.py, rlhf_numbers.py), the tests compare.

The same rollouts with TP1, TP2, TP2 with sequence parallelism, PP2, TP2 x PP2 and DP2, in one micro-batch, a few, and one a sequence, packed or as
rows of a batch; the reference and the reward model in layouts of their own. In fp32 every number is within 2e-6 x max(1, |number|) of one rank's, and
every gradient within 1e-5 of its tensor's norm. Measured: numbers up to 1.7e-6 (KL, the difference of two logprobs; losses 3e-7), gradients 1.6e-6.
"""
import json
from pathlib import Path

import pytest
from rlhf_ranks import FIRST, JOBS, PRECISIONS, RANKS, SETTINGS, SHARDED
from spawn import spawn

pytestmark = pytest.mark.both
HERE = Path(__file__).parent
NUMBER, GRADIENT, GENERATION = 2e-6, 1e-5, 2e-5
CUTS = [(job.name, budget) for job in (*FIRST, *JOBS) for budget in (job.budgets if job in JOBS else ("some", "each"))]
MODELS = [job.name for job in (*FIRST, *JOBS)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, list[dict]]:
    """Facts of every layout, one of each of its ranks."""
    directory = tmp_path_factory.mktemp("rlhf")
    spawn([str(HERE / "rlhf_ranks.py"), str(directory)], RANKS, timeout=300)
    found: dict[str, list[dict]] = {}
    for rank in range(RANKS):
        for name, facts in json.loads((directory / f"rank{rank}.json").read_text()).items():
            found.setdefault(name, []).append(facts)
    return found


def within_bounds(apart: list[dict[str, float]]) -> None:
    """Numbers are on all ranks of a layout, gradients on its first."""
    assert sum("gradient" in name for name in apart[0]) >= 1
    for ranks in apart:
        too_far = {name: value for name, value in ranks.items() if not value <= (GRADIENT if name.startswith("gradient") else NUMBER)}
        assert not too_far, too_far


@pytest.mark.parametrize(("name", "budget"), CUTS)
def test_the_same_rollouts_give_the_same_numbers_and_gradients(runs, name, budget):
    assert {len(facts[budget]) for facts in runs[name]} <= {len(runs[name][0][budget]), len(runs[name][0][budget]) - 5}
    within_bounds([facts[budget] for facts in runs[name]])


@pytest.mark.parametrize("name", [job.name for job in SHARDED])
def test_a_step_with_the_distributed_optimizer(runs, name):
    """Weights after a step, and what the policy says with them, which the next forward pass has to wait for."""
    within_bounds([facts["step"] for facts in runs[name]])


def test_the_comparison_has_something_to_compare(runs):
    """Some tokens are clipped and others not, every term is there, and some layouts have idle data ranks, others rows beside packed ones."""
    truth = runs["one"][0]["truth"]
    assert 0.1 < truth["policy_clip_fraction"] < 0.9 and 0.1 < truth["value_value_clip_fraction"] < 0.9
    assert truth["policy_ratio_max"] > 1.5 and truth["policy_kl_loss"] > 0.01 and truth["policy_entropy"] > 1 and truth["policy_ptx_loss"] == 0.0
    assert truth["mixed_ptx_loss"] > 5 and truth["mixed_entropy"] < truth["policy_entropy"], "fewer words are left"
    assert truth["ranking_ties"] > 0 and 0 < truth["ranking_correct"] < truth["ranking_pairs"] and 0 < truth["dpo_correct"] < 1
    assert len({truth[f"norm_{name}"] for name in ("policy", "mixed", "value", "ranking", "dpo")}) == 5
    assert len({*truth["rewards"]}) == len(truth["rewards"]) == 6 and min(map(abs, truth["old"])) > 1
    shapes = {name: runs[name][0]["micro_batches"] for name in ("one", "tp2", "tp2sp", "pp2", "dp2")}
    assert shapes["dp2"]["all"]["counts"] == [1, 0] and len(set(shapes["dp2"]["some"]["counts"])) == 2
    assert shapes["one"]["each"]["rows"] == shapes["tp2sp"]["each"]["rows"] == [1, 2] and shapes["one"]["all"] == {"counts": [1], "rows": [1], "packed": 1}
    assert shapes["pp2"]["each"]["rows"] == [1] and shapes["pp2"]["each"]["packed"] > 1
    assert shapes["one"]["some"]["counts"][0] > 1 < shapes["tp2"]["each"]["counts"][0]


@pytest.mark.parametrize("name", [job.name for job in FIRST])
def test_the_ptx_mix_adds_its_coefficient_times_the_gradient_of_the_text(runs, name):
    assert runs[name][0]["mixture"] <= 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_the_ratio_is_one_at_the_first_inner_step(runs, name):
    """To the last bit, plainly, and with words cut by top-k and top-p and the PTX mix beside."""
    for facts in runs[name]:
        for first in facts["first"].values():
            assert first["tokens"] > 30
            assert first == {"ratio": first["tokens"], "ratio_max": 1.0, "clip_fraction": 0.0, "approx_kl": 0.0, "kl_loss": 0.0, "tokens": first["tokens"]}


@pytest.mark.parametrize("name", MODELS)
def test_training_says_what_generation_said(runs, name):
    for facts in runs[name]:
        assert set(facts["generation"]) >= {"cut"}
        for settings, found in facts["generation"].items():
            assert found["right"] <= GENERATION, settings


@pytest.mark.parametrize("name", [job.name for job in FIRST])
def test_mistakes_that_have_been_released_would_show(runs, name):
    """Logprobs that are not divided by the sampling temperature; top-k and top-p scored with the full softmax."""
    found = runs[name][0]["generation"]
    assert found["warm"]["without temperature"] > 0.1 < found["cut"]["without temperature"] and found["cut"]["full softmax"] > 0.5
    assert found["plain"]["without temperature"] == found["plain"]["full softmax"] == found["plain"]["right"], "nothing was cut"


@pytest.mark.parametrize("name", PRECISIONS)
def test_low_precision_is_within_its_documented_bound(runs, name):
    facts, = runs[name]
    assert facts["bounds"]["fp32"] == GENERATION
    for settings in SETTINGS:
        assert 1e-3 < facts[settings]["right"] <= facts["bounds"][name]
