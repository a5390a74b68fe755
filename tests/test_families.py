"""A miniature of every family in every layout: the same weights, losses and gradients as on one rank (parity_ranks.py), and a resume bit for bit.

One spawn of two ranks trains them all, 6 steps on real text in fp32; a campaign of four has TP x PP and four stages. The bounds are those of
test_parity.py, which has Llama and GPT-2.
"""
import json
import subprocess
import sys
from pathlib import Path

import pytest
from families_ranks import MODELS, jobs_of
from parity_ranks import difference, run_ranks
from small import ROOT, environment, losses, prepare_text, records, train

from megatron_ext.cli.options import Options
from megatron_ext.config.compose import compose
from megatron_ext.errors import UserError
from megatron_ext.generate import inputs

SCRIPT = Path(__file__).with_name("families_ranks.py")


def layouts(ranks: int) -> list[str]:
    return [job.name for job in jobs_of(ranks) if not job.name.endswith("/one")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, dict]:
    directory = tmp_path_factory.mktemp("families")
    prepare_text(directory, split=(1.0, 0.0, 0.0))
    return run_ranks(directory, script=SCRIPT, arguments=["2"], count=2)


def same_training(runs: dict, name: str) -> None:
    reference = f"{name.split('/')[0]}/one"
    assert runs[name]["initial"] == runs[reference]["initial"] != "", "not the same initial weights"
    assert len(runs[name]["losses"]) == 6
    assert difference(runs, name, reference) <= 2e-6
    assert difference(runs, name, reference, "norms", steps=3) <= 5e-6


@pytest.mark.parametrize("name", layouts(2))
def test_every_layout_trains_as_one_rank_does(runs, name):
    same_training(runs, name)


@pytest.mark.campaign
def test_four_ranks_train_as_one_does(tmp_path):
    prepare_text(tmp_path, split=(1.0, 0.0, 0.0))
    runs = run_ranks(tmp_path, script=SCRIPT, arguments=["4"])
    for name in layouts(4):
        same_training(runs, name)


def test_they_learn_and_are_not_one_model(runs):
    for name in MODELS:
        found = runs[f"{name}/one"]["losses"]
        assert found[-1] < found[0], name
    assert len({tuple(runs[f"{name}/one"]["losses"]) for name in MODELS}) == len(MODELS)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_pipeline_stages_go_on_bit_for_bit_and_other_layouts_to_rounding(runs, name):
    for dropout in (0.1, 0.0):
        first, again = runs[f"{name}/{dropout}/first"], runs[f"{name}/{dropout}/pp2"]
        assert (again["losses"], again["norms"], again["final"]) == (first["losses"], first["norms"], first["final"]) and again["final"]
        assert again["initial"] != again["final"]
    assert difference(runs, f"{name}/0.0/tp2sp", f"{name}/0.0/first") <= 2e-6
    assert runs[f"{name}/0.0/first"]["losses"] != runs[f"{name}/0.1/first"]["losses"]


# ---- through the command line --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("model=micro_bert", "data.masked_share=0.2"), ("model=micro_t5", "model.decoder_layers=3", "model.num_query_groups=null")])
def test_the_command_line_trains_validates_evaluates_and_refuses_to_generate(words, small_data, tmp_path):
    run = tmp_path / "run"
    train(run, small_data, *words, "validation.samples=8", "validation.at_end=true", "train.steps=3", "optim.warmup_steps=1")
    assert sorted(losses(run)) == [1, 2, 3]
    validation = [event["validation_loss"] for event in records(run, "events") if event["kind"] == "validation"]
    assert len(validation) == 1 and 4 < validation[0] < 7

    with pytest.raises(UserError, match="generate needs a decoder"):
        inputs.read(compose([f"checkpoint.load={run}"]), Options("generate", ("generate",)))
    if "micro_t5" in words[0]:
        line = [sys.executable, "-m", "megatron_ext", "evaluate", f"checkpoint.load={run}", "evaluate.split=validation", "evaluate.samples=8", "--json"]
        done = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=400)
        assert done.returncode == 0, done.stderr[-2000:]
        assert json.loads(done.stdout)["loss"] == pytest.approx(validation[0], rel=1e-6) and json.loads(done.stdout)["bits_per_byte"] is None
