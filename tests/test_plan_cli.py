"""`plan` and what `check` refuses, as they are typed."""
import json

import pytest

from megatron_ext.cli.main import main
from megatron_ext.config.compose import compose
from megatron_ext.config.validate import problems
from megatron_ext.errors import UserError
from megatron_ext.plan import acquisition, rlhf
from megatron_ext.plan.calibration import load
from megatron_ext.plan.memory import fits, fullest
from megatron_ext.plan.search import Candidate, nearest, refuse, search


def said(capsys, *words: str) -> str:
    assert main(list(words)) == 0
    return capsys.readouterr().out


def test_the_plan_of_530_billion_parameters_at_2240_ranks(capsys):
    """The line of the contract; MT-NLG took 60.1 seconds for a batch of 1,920 on 280 DGX A100 (arXiv 2201.11990), with full recomputation."""
    out = said(capsys, "plan", "model=mt_nlg_530b", "parallel.tp=8", "parallel.pp=35", "launch.ranks=2240")
    assert "529,581,506,560 parameters" in out and "memory      GiB a rank" in out and "step        unknown: name a GPU" in out
    found = json.loads(said(capsys, "plan", "model=mt_nlg_530b", "parallel.tp=8", "parallel.pp=35", "launch.ranks=2240", "hardware=a100_80g",
                            "parallel.recompute=full", "train.global_batch_size=1920", "train.tokens=270000000000", "plan.price=2", "--json"))
    assert found["fits"] and found["memory"][0]["parameters"] == 2_058_580_480 and found["step"]["seconds"] == pytest.approx(60.1, rel=0.15)
    assert sum(found["step"]["parts"].values()) == pytest.approx(found["step"]["seconds"]) and found["step"]["bubble"] == pytest.approx(34 / 240)
    budget = found["budget"]
    assert budget["gpu_hours"] == pytest.approx(24 * budget["days"] * 2240) and budget["cost"] == pytest.approx(2 * budget["gpu_hours"])
    assert budget["days"] == pytest.approx(270e9 / found["step"]["tokens_per_second"] / 0.9 / 86400)
    assert budget["checkpoint_bytes"] == pytest.approx(14 * 529.6e9, rel=1e-3)
    assert "parallel.sp=true" in found["assumed"] and "precision.dtype=bf16" in found["assumed"]


def test_search_lists_what_fits_and_why_the_rest_does_not(capsys):
    config = compose(["model=llama3_70b", "precision=bf16", "hardware=h100_sxm", "launch.ranks=64", "train.global_batch_size=64", "data.sequence_length=8192"])
    found = search(config, load(), 128256)
    assert found.best and all(fits(one.config, 128256) for one in found.best)
    assert [one.step.seconds for one in found.best] == sorted(one.step.seconds for one in found.best)
    why = dict(found.refused)
    assert "most of it gradients" in why["TP 1 x PP 1"] and "of 79.1" in why["TP 1 x PP 1"]
    out = json.loads(said(capsys, "plan", "search", "model=llama32_1b", "launch.ranks=4", "--json"))
    assert out["fitting"] == out["tried"] > 0 and out["best"][0]["step"] is None, "no GPU is named"
    again = compose(["model=llama3_70b", "precision=bf16", "hardware=h100_sxm", "launch.ranks=64", "train.global_batch_size=64",
                     "data.sequence_length=8192", *found.best[0].words])
    assert fits(again, 128256), "the words of the best layout can be typed"


def test_search_names_no_layout_that_a_family_does_not_take():
    """T5's decoder says 114 of 512 tokens, padded to 120: sequence parallelism cannot split them over 16 ranks, which 128 heads and an NVL72 would allow."""
    config = compose(["model=t5_11b", "precision=bf16", "hardware=gb200", "launch.ranks=16", "train.global_batch_size=16", "data.sequence_length=512",
                      "plan.shown=100"])
    found = search(config, load(), 32128)
    assert max(one.config.parallel.tp for one in found.best) == 8
    assert all(not problems(one.config, "plan") for one in found.best)


def test_search_lists_layouts_of_a_gpu_whose_fp8_peak_nobody_knows(capsys):
    """Its step has a time, from bf16; an MFU of FP8 products it has not."""
    out = said(capsys, "plan", "search", "model=llama32_1b", "hardware=a100_80g", "precision=fp8_current", "launch.ranks=4")
    best = out.split("tokens/s")[1].splitlines()[1]
    assert " s " in best and best.endswith("unknown")


LARGE = ("model=llama3_8b", "precision=bf16", "hardware=h100_sxm", "launch.ranks=8", "train.global_batch_size=64", "data.sequence_length=8192",
         "train.micro_batch_size=1")


def test_check_refuses_what_the_gpu_cannot_hold_and_names_the_nearest_layout(capsys):
    assert main(["check", *LARGE]) == 2
    error = capsys.readouterr().err
    assert "hardware.name=h100_sxm: has 79.1 GiB" in error and "the nearest layout that fits: parallel.tp=" in error
    words = error.split("the nearest layout that fits: ")[1].split()
    told = {word.partition("=")[0] for word in words}
    assert main(["check", *(word for word in LARGE if word.partition("=")[0] not in told), *words]) == 0
    assert main(["check", *(word for word in LARGE if "hardware" not in word)]) == 0, "without a GPU nothing is judged"


def test_run_refuses_a_later_stage_that_does_not_fit_before_the_first_is_started(capsys, tmp_path):
    words = ["model=llama32_1b", "precision=bf16", "hardware=a100_40g", "launch.ranks=2", f"run.dir={tmp_path / 'run'}", "data.vocab_size=4096"]
    assert main(["run", *words]) == 2
    error = capsys.readouterr().err
    assert "hardware.name=a100_40g: has 39.4 GiB" in error and "(stage ppo)" in error and not (tmp_path / "run").exists()


def test_a_layout_that_is_named_takes_back_what_was_typed_and_it_has_not():
    typed = [*LARGE, "parallel.pp=2", "parallel.vpp=2", "parallel.tp=2", "parallel.sp=true", "parallel.cp=2", "parallel.recompute=full",
             "parallel.recompute_layers=4"]
    plain = compose([*LARGE, "parallel.pp=8"])
    told = Candidate(plain, fullest(plain, 128256)).instead_of(compose(typed))
    changed = {word.partition("=")[0] for word in told}
    assert compose([*(word for word in typed if word.partition("=")[0] not in changed), *told]).parallel == plain.parallel
    assert Candidate(plain, fullest(plain, 128256)).instead_of(plain) == ["parallel.tp=1", "parallel.pp=8", "train.micro_batch_size=1"]


def test_where_no_layout_fits_it_says_so():
    config = compose(["model=gpt3_175b", "precision=bf16", "hardware=a100_40g", "launch.ranks=8", "train.global_batch_size=64", "data.sequence_length=2048"])
    assert nearest(config, 50257) is None
    with pytest.raises(UserError, match="no layout on as many ranks fits"):
        refuse(config, 50257)


def test_stages_that_pack_are_told_what_they_can_change():
    words = ["model=llama3_70b", "precision=bf16", "hardware=h100_sxm"]
    with pytest.raises(UserError, match=r"micro-batches of rollout.batch_tokens=\d+ tokens needs .*parallel.pp, ppo.offload=true, or a smaller rollout.batch_tokens"):
        refuse(compose(["stage=dpo", *words]), 128256)
    for alone in (["stage=reward"], ["stage=dpo", "ppo.offload=true"]):
        with pytest.raises(UserError, match="parallel.pp, or a smaller rollout.batch_tokens"):
            refuse(compose([*alone, *words]), 128256)


def test_the_four_models_of_ppo():
    words = ["stage=ppo", "model=llama32_1b", "precision=bf16", "launch.ranks=8", "hardware=h100_sxm", "rewards.models=[r]", "rollout.batch_tokens=8192"]
    config = compose(words)
    found = {one.role: one for one in rlhf.members(config, 128256)}
    assert list(found) == ["policy", "reference", "reward", "critic"]
    assert found["reference"].held == pytest.approx(2 * found["reference"].parameters, rel=0.01), "bf16 weights alone"
    assert found["policy"].held == pytest.approx((6 + 12 / 8) * found["policy"].parameters, rel=0.02)
    assert found["reward"].parameters < found["reference"].parameters + 10_000
    together, where = rlhf.together(config, 128256)
    assert together > sum(one.held for one in found.values()) and "policy, reference, reward, critic together" in where
    alone, _ = rlhf.together(compose([*words, "ppo.offload=true"]), 128256)
    assert alone < together
    time = rlhf.iteration_time(config, load(), 128256)
    assert time.generation > 0 and time.training > time.scoring / 4


def test_gpus_by_when(capsys):
    config = compose(["model=llama3_8b", "precision=bf16", "hardware=h100_sxm", "parallel.tp=2", "parallel.sp=true", "launch.ranks=16", "data.sequence_length=8192",
                      "train.micro_batch_size=1", "train.global_batch_size=128", "plan.stages=[base:1e12:30,sft:1e9:7:3]"])
    base, sft = acquisition.acquire(config, load(), 128256)
    assert base.end <= 30 and sft.start == 30 and sft.copies == 3 and sft.gpus % 6 == 0
    # 6 N D operations (Kaplan et al. 2020) and attention in 30 days at 90 %: 4.8e22 / (30 x 86,400 x 0.9) = 2.1e16 a second, 40 to 80 GPUs at 26 to 52 %.
    assert 40 <= base.gpus <= 80 and base.gpu_hours == pytest.approx(24 * (base.end - base.start) * base.gpus)
    out = said(capsys, "plan", "acquire", "model=llama32_1b", "hardware=h100_sxm", "plan.stages=[base:1e10:3]")
    assert "base" in out and "GPU-hours" in out
    assert main(["plan", "acquire", "model=llama32_1b", "hardware=h100_sxm", "plan.stages=[base:many:3]"]) == 2
    assert "plan.stages=base:many:3: must be NAME:TOKENS:DAYS" in capsys.readouterr().err
    assert main(["plan", "acquire", "model=llama32_1b", "hardware=h100_sxm", "plan.stages=[]"]) == 2
    assert "plan.stages=[]: name the stages" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "message"), [
    (("plan", "serach"), "did you mean"),
    (("plan", "--rank", "x"), "must be a whole number"),
    (("plan", "hardware=h1000"), "hardware=h1000"),
    (("plan", "model=tiny", "plan.margin=1.5"), "plan.margin=1.5"),
    (("plan", "model=tiny", "plan.calibration=/nowhere.json"), "is no calibration"),
])
def test_what_cannot_be_planned_is_told_in_one_line(words, message, capsys):
    assert main(list(words)) == 2
    assert message in capsys.readouterr().err


def test_pictures(tmp_path, capsys):
    said(capsys, "plan", "model=llama32_1b", "launch.ranks=8", "hardware=h100_sxm", f"output={tmp_path}")
    assert {path.name for path in tmp_path.iterdir()} == {"memory.png", "time.png", "scaling.png"}
