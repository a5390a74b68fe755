"""A miniature of every family in every layout: the same weights, losses and gradients as on one rank (parity_ranks.py), and a resume bit for bit.

One spawn of two ranks trains them all, 10 steps on real text in fp32; a campaign of four has TP x PP and four stages. The bounds are those of
test_parity.py, which has Llama and GPT-2.
"""
from pathlib import Path

import pytest
from parity_ranks import difference, run_ranks
from small import losses, newest, prepare_text, records, train

from megatron_ext.checkpoint.compare import compare

pytestmark = pytest.mark.both
SCRIPT = Path(__file__).with_name("families_ranks.py")
LAYOUTS = (
    "bert/tp2", "bert/tp2sp", "bert/pp2", "bert/dp2", "bert/plain", "untied/tp2sp", "untied/interleaved", "documents/tp2",
    "t5/tp2", "t5/tp2sp", "t5/pp2", "t5/interleaved", "t5/dp2", "t5/full", "transformer/tp2sp", "transformer/pp2", "transformer/micro4",
    "gptj/tp2sp", "gptj/pp2", "palm/pp2", "palm/dp2", "palm/tp2", "palm/tp2sp", "opt/tp2sp", "opt/pp2",
)
FAMILIES = ("bert", "untied", "documents", "t5", "transformer", "gptj", "palm", "opt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, dict]:
    directory = tmp_path_factory.mktemp("families")
    prepare_text(directory, split=(1.0, 0.0, 0.0))
    return run_ranks(directory, script=SCRIPT, arguments=["2"], count=2)


def same_training(runs: dict, name: str) -> None:
    reference = f"{name.split('/')[0]}/one"
    assert runs[name]["initial"] == runs[reference]["initial"] != "", "not the same initial weights"
    assert len(runs[name]["losses"]) == 10
    assert difference(runs, name, reference) <= 2e-6
    assert difference(runs, name, reference, "norms", steps=3) <= 5e-6


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_as_one_rank_does(runs, name):
    same_training(runs, name)


@pytest.mark.campaign
def test_four_ranks_train_as_one_does(tmp_path):
    prepare_text(tmp_path, split=(1.0, 0.0, 0.0))
    runs = run_ranks(tmp_path, script=SCRIPT, arguments=["4"])
    for name in ("bert/tp2pp2", "t5/tp2pp2", "t5/pp4", "gptj/tp2pp2"):
        same_training(runs, name)


def test_they_learn_and_are_not_one_model(runs):
    for name in FAMILIES:
        found = runs[f"{name}/one"]["losses"]
        assert found[-1] < found[0] - 0.2, name
    assert len({tuple(runs[f"{name}/one"]["losses"]) for name in FAMILIES}) == len(FAMILIES)


# ---- through the command line --------------------------------------------------------------------------------------------------------

SMALL = ("model.hidden_size=32", "checkpoint.every=4", "checkpoint.keep=0", "validation.samples=8", "validation.at_end=true", "parallel.pp=2", "launch.ranks=2",
         "model.hidden_dropout=0.1", "model.attention_dropout=0.1")


@pytest.mark.parametrize("model", ["micro_bert", "micro_t5"])
def test_a_run_is_stopped_and_goes_on_bit_for_bit_and_in_another_layout(model, small_data, tmp_path):
    """Two pipeline stages with dropout; then one rank goes on from the same checkpoint."""
    words = (f"model={model}", *SMALL)
    if model == "micro_bert":
        words += ("model.num_layers=2",)
    whole, again, one = tmp_path / "whole", tmp_path / "again", tmp_path / "one"
    half = f"checkpoint.load={whole}/checkpoints/step_00000004"
    train(whole, small_data, *words)
    train(again, small_data, *words, half)
    assert sorted(losses(again)) == [5, 6, 7, 8] and losses(again) == {step: losses(whole)[step] for step in losses(again)}
    assert compare(newest(again), newest(whole)) == []
    validation = [event["validation_loss"] for event in records(whole, "events") if event["kind"] == "validation"]
    assert len(validation) == 1 and 4 < validation[0] < 7
    train(one, small_data, *words, half, "parallel.pp=1", "launch.ranks=1", "train.steps=5", "optim.decay_steps=8")
    assert losses(one)[5] == pytest.approx(losses(whole)[5], rel=0.05)  # other dropout
