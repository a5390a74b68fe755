"""The stages of RLHF as a user starts them, small: each algorithm, what it writes, what it needs, and what it makes of bad input."""
import json
import math

import pytest
import torch
from rlhf_small import MICRO, PPO
from small import newest, records

from megatron_ext import platform
from megatron_ext.checkpoint import best_of, checkpoint_hash, find, read_record
from megatron_ext.checkpoint.ancestry import chain as ancestry
from megatron_ext.cli.main import main

NUMBERS = (
    "reward", "reward_std", "kl_k1", "kl_k3", "kl_coef", "entropy", "clip_fraction", "ratio", "ratio_max", "policy_loss", "response_length", "eos_rate",
    "logprob_difference", "grad_norm", "lr", "seconds_rollout", "seconds_scoring", "seconds_update", "share_rollout", "share_scoring", "share_update",
    "tokens_per_second", "episodes", "skipped_prompts", "device_bytes_peak",
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    platform.disconnect()


@pytest.fixture
def go(rlhf_chain, tmp_path, monkeypatch, capfd):
    """go(stage, *words, run=..., code=0): the run's directory, or with another exit code what was printed as an error."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    records_of = {"sft": "sft", "reward": "rankings", "dpo": "rankings"}

    def run(stage: str, *words: str, run="run", code: int = 0):
        directory = tmp_path / run
        given = [f"stage={stage}", f"run.dir={directory}", *MICRO, f"checkpoint.start={rlhf_chain['pretrain']}"]
        if stage != "adapt":
            given.append(f"chat.path={rlhf_chain[records_of.get(stage, 'prompts')]}")
        if stage in ("ppo", "grpo", "rloo"):
            given += [*PPO, f"rewards.models=[{rlhf_chain['reward']}]"]
        else:
            given += ["train.steps=3", "train.global_batch_size=4", "train.micro_batch_size=2", "optim.lr=1e-3", "optim.min_lr=1e-3"]
        last = {word.split("=")[0]: word for word in (*given, *words)}
        capfd.readouterr()
        found = main(["train", *last.values()])
        error = capfd.readouterr().err
        assert found == code, error
        assert "Traceback" not in error
        return error if code else directory

    return run


def events(run, kind):
    return [event for event in records(run, "events") if event["kind"] == kind]


# ---- each stage -----------------------------------------------------------------------------------------------------------------------


def test_ppo_says_what_happened(go):
    """Every number under its usual name; a page of samples; the best checkpoint is named; the record says where all models came from."""
    run = go("ppo", "validation.every=1", "validation.at_end=true", "checkpoint.best=true", "log.report=true", "ppo.ema=0.5",
             "rewards.functions=[length:target=5,overlap]", "rewards.weights=[0.1,0.2]", "generate.temperature=0.8", "stop.kl_budget=1000")
    found = records(run)
    assert [one["step"] for one in found] == [1, 2, 3] and found[-1]["episodes"] == 18
    for name in (*NUMBERS, "value_loss", "value_clip_fraction", "explained_variance", "critic_grad_norm", "critic_lr", "reward_model", "reward_length",
                 "reward_overlap", "failed_rewards", "validation_reward", "validation_kl_k1"):
        assert all(math.isfinite(one[name]) for one in found), name
    first = found[0]
    assert first["first_ratio_max"] == 1.0 and first["first_clip_fraction"] == 0.0 and abs(first["kl_k1"]) < 1e-6 and first["logprob_difference"] <= 2e-5
    assert first["reward"] == pytest.approx(first["reward_model"] + 0.1 * first["reward_length"] + 0.2 * first["reward_overlap"], abs=1e-5)
    assert sum(first[f"share_{part}"] for part in ("rollout", "scoring", "update")) == pytest.approx(1)
    samples = records(run, "samples")
    assert {one["step"] for one in samples} == {0, 3} and {one["prompt"] for one in samples if one["step"] == 0} == \
        {one["prompt"] for one in samples if one["step"] == 3}
    assert best_of(run / "checkpoints") is not None and len(events(run, "best")) >= 1
    report = (run / "report.md").read_text(encoding="utf-8")
    assert "KL" in report and (run / "samples.md").exists() and list(run.glob("*.png"))
    record = read_record(newest(run))
    assert set(record["roles"]) >= {"reference", "rewards"} and record["stage"] == "ppo"
    assert [link["stage"] for link in ancestry(find(str(run), run))] == ["ppo", "pretrain"]


@pytest.mark.parametrize("stage, words", [
    ("grpo", ("rollout.samples=3", "ppo.kl=k3", "ppo.kl_in=loss")), ("rloo", ("rollout.samples=3", "ppo.epochs=1", "ppo.minibatches=1")),
    ("grpo", ("rollout.samples=2", "ppo.policy_loss=gspo", "ppo.clip=0.0003")), ("rloo", ("rollout.samples=2", "ppo.policy_loss=cispo")),
], ids=["grpo", "rloo", "gspo", "cispo"])
def test_other_algorithms_are_a_name_away(go, stage, words):
    run = go(stage, "train.steps=2", *words)
    found = records(run)
    assert len(found) == 2 and all(math.isfinite(one[name]) for one in found for name in NUMBERS)
    assert "value_loss" not in found[0] and found[0]["first_ratio_max"] == 1.0


def test_dpo_starts_at_ln_2_and_prefers_what_is_chosen(go):
    run = go("dpo", "train.steps=12", "validation.every=12", "ppo.beta=0.5")
    found = records(run)
    assert found[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)  # policy and reference are the same model
    assert found[-1]["validation_accuracy"] > 0.6 and found[-1]["validation_loss"] < math.log(2)


def test_reward_learns_the_order_and_demonstrations_score_zero(go, rlhf_chain):
    run = go("reward", "train.steps=20", "train.global_batch_size=16", "validation.every=10", "checkpoint.best=true", "optim.lr=3e-3")
    last = records(run)[-1]
    assert last["validation_accuracy"] > 0.8 and 0 <= last["validation_calibration_error"] < 0.5
    assert events(run, "calibration")[-1]["bins"]
    # The mean over the best responses, asked of the finished checkpoint in the way that ppo asks: 0.
    found = records(go("ppo", "train.steps=1", f"rewards.models=[{run}]", run="after"))[0]
    assert math.isfinite(found["reward_model"])
    assert abs(read_record(find(str(run), run, best=True))["reward_bias"]) > 0


def test_sft_lowers_the_loss_of_responses(go):
    run = go("sft", "train.steps=10", "validation.every=5", "train.global_batch_size=8", "optim.lr=5e-3", "model.hidden_dropout=0")
    found = [one["validation_loss"] for one in records(run) if "validation_loss" in one]
    assert found[-1] < found[0] - 0.1


def test_adapt_goes_on_from_a_checkpoint_with_other_text(go, small_data):
    run = go("adapt", f"data.paths=[{small_data},{small_data}]", "data.weights=[0.7,0.3]", "data.sequence_length=64")
    assert len(records(run)) == 3 and read_record(newest(run))["parent"] is not None


# ---- what ppo can do besides ----------------------------------------------------------------------------------------------------------


def test_pretraining_text_is_mixed_in(go, small_data):
    plain = records(go("ppo", "train.steps=2", run="plain"))
    mixed = records(go("ppo", "train.steps=2", "ppo.ptx_coef=2.0", f"data.path={small_data}", run="mixed"))
    assert all(math.isfinite(one["ptx_loss"]) and one["ptx_loss"] > 1 for one in mixed)
    assert mixed[0]["reward"] == plain[0]["reward"] and mixed[0]["first_ratio_max"] == 1.0  # the same rollouts
    assert mixed[0]["grad_norm"] != plain[0]["grad_norm"] and mixed[1]["policy_loss"] != plain[1]["policy_loss"]


def test_models_wait_in_host_memory(go):
    """With off-loading the peak is at most the policy in training and one forward model; numbers do not change."""
    here = go("ppo", run="here")
    away = go("ppo", "ppo.offload=true", "ppo.ema=0.9", run="away")
    numbers = ("reward", "kl_k1", "policy_loss", "value_loss", "grad_norm")
    assert [[one[name] for name in numbers] for one in records(here)] == [[one[name] for name in numbers] for one in records(away)]
    sizes = events(here, "memory")[-1]["bytes"]
    assert set(sizes) == {"policy", "critic", "reference", "reward"} and records(here)[-1]["device_bytes_peak"] == sum(sizes.values())
    assert set(events(away, "memory")[-1]["bytes"].values()) == {0}
    peak = records(away)[-1]["device_bytes_peak"]
    assert peak <= sizes["policy"] + max(sizes["reference"], sizes["reward"]) and peak < 0.6 * sum(sizes.values())


def test_with_adapters_the_reference_costs_nothing(go):
    run = go("ppo", "lora.rank=4", "optim.lr=1e-2", "optim.min_lr=1e-2")
    found = records(run)
    assert abs(found[0]["kl_k1"]) < 1e-6 and found[-1]["kl_k3"] > 1e-6 and found[0]["first_ratio_max"] == 1.0
    assert set(events(run, "memory")[0]["bytes"]) == {"policy", "critic", "reward"}


def test_the_average_can_be_generated_from(go, capfd):
    run = go("ppo", "ppo.ema=0.5")
    for average in ("false", "true"):
        assert main(["generate", "--json", f"checkpoint.load={run}", f"checkpoint.average={average}", "--prompt", "What does", "generate.max_tokens=4",
                     "launch.device=cpu"]) == 0
    assert len(capfd.readouterr().out.strip().splitlines()) == 2
    assert main(["generate", f"checkpoint.load={go('ppo', run='none')}", "checkpoint.average=true", "--prompt", "a", "launch.device=cpu"]) == 2
    assert "ppo.ema" in capfd.readouterr().err


def test_two_reward_models_are_an_ensemble(go, rlhf_chain):
    other = go("reward", "train.steps=2", run="other")
    found = records(go("ppo", "train.steps=1", f"rewards.models=[{rlhf_chain['reward']},{other}]"))[0]
    assert found["reward_disagreement"] > 0


def test_stop_criteria_end_the_stage_with_a_sentence(go):
    run = go("ppo", "train.steps=9", "stop.kl_budget=0.0001", "optim.lr=1e-2", "optim.min_lr=1e-2")
    stop = events(run, "stop")[-1]
    assert stop["criterion"] == "kl_budget" and "0.0001" in stop["reason"] and 2 <= records(run)[-1]["step"] < 9


# ---- going on -------------------------------------------------------------------------------------------------------------------------


def test_a_finished_run_stays_as_it_is_and_goes_on_from_its_own_start_alone(go):
    """Its checkpoint is the one that later stages know by its hash. A start whose best checkpoint is another one now is no silent change of the run."""
    run, words = go("dpo", "train.steps=1"), ("train.steps=1", "checkpoint.load=auto")
    before = checkpoint_hash(newest(run))
    assert checkpoint_hash(newest(go("dpo", *words))) == before
    other = go("dpo", "train.steps=1", run="other")
    error = go("dpo", *words, f"checkpoint.start={other}", code=2)
    assert "checkpoint.start" in error and "is not what this run began with" in error and checkpoint_hash(newest(run)) == before


def test_a_resume_with_more_reward_models_is_refused(go, rlhf_chain):
    go("grpo", "rollout.samples=2", "train.steps=1")
    error = go("grpo", "rollout.samples=2", "train.steps=2", "checkpoint.load=auto", f"rewards.models=[{rlhf_chain['reward']},{rlhf_chain['reward']}]", code=2)
    assert "rewards.models" in error and "began with 1" in error


# ---- bad input ------------------------------------------------------------------------------------------------------------------------


def test_prompts_that_are_too_long_are_skipped_and_counted(go, tmp_path, rlhf_chain):
    rows = rlhf_chain["prompts"].read_text(encoding="utf-8") + json.dumps({"prompt": "long " * 900}) + "\n" + '{"prompt": ""}\n{bro\n'
    (tmp_path / "prompts.jsonl").write_text(rows, encoding="utf-8")
    run = go("ppo", "train.steps=1", f"chat.path={tmp_path / 'prompts.jsonl'}")
    assert records(run)[0]["skipped_prompts"] == 3
    told = events(run, "record_skipped")
    assert sum(event["count"] for event in told) == 3 and not any("long long" in json.dumps(event) for event in told)


FUNCTIONS = '''
import time
def bad(prompt): return len(prompt) % 2 == 0
def raises(prompt, response, **more):
    if bad(prompt): raise ValueError("no")
    return 1.0
def nan(prompt, response, **more): return float("nan") if bad(prompt) else 2.0
def hangs(prompt, response, **more):
    if bad(prompt): time.sleep(60)
    return 3.0
def never(prompt, response, **more): raise ValueError("no")
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine_rewards.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_reward_functions_that_fail_are_counted_and_the_run_goes_on(go, mine):
    run = go("ppo", "train.steps=2", "rewards.functions=[mine_rewards:raises,mine_rewards:nan,mine_rewards:hangs]", "rewards.timeout=0.3")
    found = records(run)
    assert len(found) == 2 and all(one["failed_rewards"] > 0 and math.isfinite(one["reward"]) for one in found)
    reasons = {event["function"]: event["reason"] for event in events(run, "reward_failed")}
    assert len(reasons) == 3 and all(reasons.values()), reasons


def test_a_reward_function_that_always_fails_ends_the_run(go, mine):
    error = go("ppo", "rewards.functions=[mine_rewards:never]", code=1)
    assert "never" in error and "3 scorings in a row" in error


@pytest.mark.parametrize("stage, words, key", [
    ("ppo", ("rewards.models=[]",), "rewards"), ("ppo", ("rewards.models=[/no/such]",), "rewards.models"), ("grpo", ("rollout.samples=1",), "rollout.samples"),
    ("ppo", ("generate.temperature=0",), "generate.temperature"), ("ppo", ("ppo.minibatches=4",), "ppo.minibatches"), ("sft", ("chat.path=/no/such",), "chat.path"),
    ("ppo", ("checkpoint.start=null",), "checkpoint.start"), ("ppo", ("rewards.functions=[no_such]",), "rewards.functions"), ("sft", ("stop.kl_budget=1",), "stop.kl_budget"),
    ("reward", ("chat.template=/no/such",), "chat.template"),
])
def test_what_cannot_work_is_refused_by_name(go, stage, words, key):
    assert key in go(stage, *words, code=2)


def test_a_language_model_gives_no_rewards(go, rlhf_chain):
    assert "reward" in go("ppo", f"rewards.models=[{rlhf_chain['pretrain']}]", code=2)


def test_logprobs_that_part_stop_the_run(go):
    """A bound that cannot be met stands for a decoder that computes something else than the trainer."""
    error = go("ppo", "rollout.logprob_bound=1e-12", code=1)
    assert "logprobs of generation and training differ" in error
