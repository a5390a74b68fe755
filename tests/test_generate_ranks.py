"""The same completions and the same loss in every layout: one spawn of four ranks (generate_ranks.py), the tests compare."""
import json
from pathlib import Path

import pytest
from generate_ranks import COUNT, EOD, JOBS, SEQUENCES, SETTINGS
from spawn import spawn

HERE = Path(__file__).parent
OTHERS = [job for job in JOBS if not job.endswith("/one")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, dict]:
    """Facts of every layout; all its ranks have the same."""
    directory = tmp_path_factory.mktemp("generate")
    spawn([str(HERE / "generate_ranks.py"), str(directory)], 4, timeout=300)
    found: dict[str, dict] = {}
    for rank in range(4):
        for name, facts in json.loads((directory / f"rank{rank}.json").read_text()).items():
            assert found.setdefault(name, facts) == facts, f"{name}: its ranks disagree"
    return found


def same(found: list[dict], expected: list[dict]) -> None:
    """Everything equal, probabilities to rounding."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        for key, value in other.items():
            if "logprobs" in key:
                assert one[key] == pytest.approx(value, abs=2e-5)
            elif key == "words":  # rounding decides whether the word on the edge of top-p is in
                assert one[key] == pytest.approx(value, abs=1)
            else:
                assert one[key] == value


@pytest.mark.parametrize("name", OTHERS)
def test_every_layout_draws_the_same_tokens(runs, name):
    reference = runs[f"{name.split('/')[0]}/one"]
    for settings in (*SETTINGS, "few"):
        same(runs[name][settings], reference[settings])


def test_the_modules_own_forward_pass_draws_the_same_tokens(runs):
    same(runs["llama/tp2sp"]["modules"], runs["llama/one"]["sampled"])


def test_the_newest_weights_generate(runs):
    one, other = runs["trained/one"]["greedy"], runs["trained/dp2"]["greedy"]
    assert [sample["tokens"] for sample in one] == [sample["tokens"] for sample in other]
    assert [sample["tokens"] for sample in one] != [sample["tokens"] for sample in runs["llama/one"]["greedy"]]


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_the_reference_is_worth_comparing_with(runs, model):
    """Samples differ, and some end early."""
    one = runs[f"{model}/one"]
    assert len({tuple(sample["tokens"]) for sample in one["sampled"]}) == len(one["sampled"]) == 12
    ended = [sample["stop"] for sample in one["ended"]]
    assert {"eod", "max_tokens"} == set(ended) and ended.count("eod") >= 3
    assert all((sample["tokens"][-1] == EOD) == (sample["stop"] == "eod") for sample in one["ended"])
    assert all(len(sample["tokens"]) == COUNT for sample in one["greedy"])


@pytest.mark.parametrize("name", [*OTHERS, "llama/interleaved"])
def test_every_layout_finds_the_same_loss(runs, name):
    """Thirteen sequences in micro-batches of two over one or two data ranks: fillers are masked, and every token counts once."""
    found, expected = runs[name]["evaluation"], runs[f"{name.split('/')[0]}/one"]["evaluation"]
    assert found["tokens"] == expected["tokens"] < SEQUENCES * 16
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)


@pytest.mark.parametrize("name", OTHERS)
def test_every_layout_finds_the_same_likelihoods(runs, name):
    found, expected = runs[name]["likelihoods"], runs[f"{name.split('/')[0]}/one"]["likelihoods"]
    assert [one["greedy"] for one in found] == [one["greedy"] for one in expected]
    assert [one["logprob"] for one in found] == pytest.approx([one["logprob"] for one in expected], abs=2e-5)
