"""The stages after pretraining: what cannot work is refused, what is meant is read back, and a chain says where it came from."""
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from records import child_of, write_record

from megatron_ext.checkpoint import ancestry, checkpoint_hash, manifest
from megatron_ext.cli import cast, notes
from megatron_ext.cli.verbs.train import STAGES
from megatron_ext.config import geometry, rlhf, stages
from megatron_ext.config.build import from_dict, to_dict
from megatron_ext.config.compose import compose
from megatron_ext.config.overrides import options_of
from megatron_ext.config.ranges import CHOICES
from megatron_ext.config.schema import LoraConfig
from megatron_ext.config.validate import problems
from megatron_ext.errors import UserError
from megatron_ext.train.start import adopt

ROOT = Path(__file__).resolve().parent.parent
SIZES = ("model.num_layers=4", "model.hidden_size=64", "model.num_attention_heads=4", "data.sequence_length=64", "model.max_sequence_length=128")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """sft: a policy of 4 layers; reward: a smaller model of 2 layers with 2 heads; other: one with another tokenizer."""
    root = tmp_path_factory.mktemp("runs")
    pretrain = write_record(root / "pretrain", 100, *SIZES)
    sft = write_record(root / "sft", 20, *SIZES, "stage=sft", **child_of(pretrain))
    small = ("stage=reward", "model.num_layers=2", "model.hidden_size=32", "model.num_attention_heads=2")
    write_record(root / "reward", 30, *small, head="scalar", **child_of(sft))
    write_record(root / "other", 30, *small, head="scalar", data={"tokenizer": "f" * 64})
    return root


@functools.cache
def base(stage: str, runs: Path):
    """What `check stage=... checkpoint.start=...` makes of conf/, with rewards where the stage needs them."""
    words = [f"stage={stage}", f"checkpoint.start={runs / 'sft'}"] + [f"rewards.models=[{runs / 'reward'}]"] * (stage in stages.ONLINE)
    return adopt(compose(words), words)


def composed(stage: str, runs: Path, *words: str):
    """With `words` on top: keys alone, so that Hydra is asked once a stage."""
    values = to_dict(base(stage, runs))
    for word in words:
        key, _, value = word.partition("=")
        group, name = key.split(".")
        values[group][name] = yaml.safe_load(value)
    return from_dict(values)


def said(config) -> str:
    return "\n".join(map(str, problems(config)))


@pytest.mark.parametrize("stage", stages.CHAT + ("adapt",))
def test_the_defaults_of_a_stage_are_valid(stage, runs):
    config = composed(stage, runs)
    assert said(config) == "" and config.stage.name == stage and rlhf.doubts(config) in ([], rlhf.doubts(config)[:1])
    assert config.model.num_layers == 4 and config.data.sequence_length == 64, "taken over from the checkpoint that it starts from"
    assert config.checkpoint.best and config.optim.warmup_steps < config.train.steps


def test_the_published_settings():
    """InstructGPT (arXiv 2203.02155): section 4 of ANCHORS.md."""
    sft, reward, ppo = (compose([f"stage={name}"]) for name in ("sft", "reward", "ppo"))
    assert (sft.optim.lr, sft.optim.min_lr, sft.train.global_batch_size, sft.model.hidden_dropout) == (9.65e-6, 9.65e-7, 32, 0.2)
    assert (reward.optim.lr, reward.optim.min_lr, reward.train.global_batch_size) == (9e-6, 9e-7, 64)
    one = geometry.Iteration.of(ppo)
    assert (one.episodes, one.minibatch, one.epochs, one.run_episodes) == (512, 64, 1, 256_000)
    assert (ppo.ppo.clip, ppo.ppo.gamma, ppo.ppo.lam, ppo.ppo.kl_coef, ppo.generate.temperature, ppo.critic.lr) == (0.2, 1, 0.95, 0.02, 1, 9e-6)
    assert 2.55e-6 <= ppo.optim.lr <= 8.05e-6 and (sft.optim.beta1, sft.optim.beta2) == (0.9, 0.95)


@pytest.mark.parametrize(("stage", "words", "expected"), [
    ("sft", ["checkpoint.start=null"], ["checkpoint.start=null", "stage=sft", "checkpoint.start=outputs/run"]),
    ("adapt", ["checkpoint.start=null", "checkpoint.load=auto", "run.dir=/tmp/no-such-run"], ["checkpoint.start=null"]),
    ("ppo", ["checkpoint.start=/no/such"], ["checkpoint.start=/no/such", "is not there"]),
    ("adapt", ["chat.path=/etc"], ["chat.path=/etc", "stage=sft"]),
    ("sft", ["chat.path=/no/such.jsonl"], ["chat.path=/no/such.jsonl", "not there"]),
    ("sft", ["chat.format=preference"], ["chat.format=preference", "prompt_response"]),
    ("reward", ["chat.format=messages"], ["chat.format=messages", "ranking"]),
    ("sft", ["chat.max_length=65"], ["chat.max_length=65", "data.sequence_length=64"]),
    ("dpo", ["chat.max_length=129"], ["chat.max_length=129", "model.max_sequence_length=128"]),
    ("reward", ["train.tokens=1000"], ["train.tokens=1000", "train.steps"]),
    ("ppo", ["rewards.models=[]"], ["rewards.models=[]", "nothing to get better at", "critic.load=null", "ppo.advantage=reinforce"]),
    ("grpo", ["rewards.models=[]"], ["rewards.models=[]", "nothing to get better at"]),
    ("rloo", ["rewards.model_weight=0"], ["weighted with 0"]),
    ("grpo", ["rewards.models=[/no/such]"], ["rewards.models=/no/such", "not there"]),
    ("ppo", ["rewards.functions=[length,code]", "rewards.weights=[1]"], ["rewards.weights=[1]", "2 rewards.functions"]),
    ("ppo", ["rewards.functions=[length]", "rewards.weights=[.nan]"], ["rewards.weights=[nan]", "finite"]),
    ("ppo", ["rewards.missing_eos=.inf"], ["rewards.missing_eos=inf", "finite number or null"]),
    ("ppo", ["critic.load=/no/such"], ["critic.load=/no/such", "not there"]),
    ("ppo", ["critic.pretrain=500"], ["critic.pretrain=500", "never learn"]),
    ("ppo", ["critic.min_lr=1"], ["critic.min_lr=1.0", "critic.lr=9e-06"]),
    ("ppo", ["critic.warmup_steps=600"], ["critic.warmup_steps=600", "500 iterations"]),
    ("ppo", ["ppo.minibatches=6"], ["ppo.minibatches=6", "512 x 1 = 512", "1, 2, 4, 8"]),
    ("grpo", ["rollout.samples=1"], ["rollout.samples=1", "at least 2"]),
    ("ppo", ["ppo.advantage=rloo"], ["rollout.samples=1", "ppo.advantage=rloo"]),
    ("ppo", ["generate.temperature=0"], ["generate.temperature=0.0", "most probable"]),
    ("ppo", ["generate.top_k=1"], ["generate.top_k=1", "most probable"]),
    ("grpo", ["generate.samples=4"], ["generate.samples=4", "rollout.samples"]),
    ("ppo", ["generate.max_tokens=128"], ["generate.max_tokens=128", "no room"]),
    ("ppo", ["rollout.max_prompt=65"], ["rollout.max_prompt=65", "at most 64"]),
    ("ppo", ["ppo.kl_in=loss"], ["ppo.kl=k1", "gradient of zero", "k2"]),
    ("ppo", ["ppo.kl_coef=0", "ppo.kl_target=6"], ["ppo.kl_target=6", "0 stays 0"]),
    ("ppo", ["ppo.ptx_coef=27.8", "chat.path=/etc"], ["ppo.ptx_coef=27.8", "data.path"]),
    ("ppo", ["model.hidden_dropout=0.1"], ["model.hidden_dropout=0.1", "ratio would not be 1"]),
    ("dpo", ["model.attention_dropout=0.1"], ["model.attention_dropout=0.1"]),
    ("ppo", ["parallel.cp=2", "launch.ranks=2"], ["parallel.cp=2", "any"]),
    ("reward", ["parallel.pp=2", "parallel.vpp=2", "launch.ranks=2"], ["parallel.vpp=2", "packs"]),
    ("dpo", ["precision.fp8=current"], ["kernels.layers=auto", "kernels.layers=fp8"]),
    ("ppo", ["reward_layout.tp=2", "launch.ranks=1"], ["launch.ranks=1", "reward_layout.tp"]),
    ("ppo", ["critic_layout.pp=2", "launch.ranks=3"], ["critic_layout.tp x pp x cp = 1 x 2"]),
    ("ppo", ["rollout_layout.tp=3", "launch.ranks=3"], ["rollout_layout.tp=3", "1, 2, 4"]),
    ("dpo", ["reference_layout.pp=3", "launch.ranks=3"], ["reference_layout.pp=3", "model.num_layers=4"]),
    ("ppo", ["rollout_layout.sp=true", "launch.ranks=1"], ["rollout_layout.sp=true", "rollout_layout.tp greater than 1"]),
    ("ppo", ["lora.rank=8", "reference_layout.tp=1"], ["reference_layout", "without its adapters"]),
    ("sft", ["lora.rank=8", "kernels.layers=te"], ["kernels.layers=te", "adapters"]),
    ("sft", ["lora.rank=8", "lora.targets=[linear_q]"], ["lora.targets=[linear_q]", "not linear_q"]),
    ("sft", ["lora.rank=8", "lora.targets=[]"], ["lora.targets=[]", "linear_proj"]),
    ("pretrain", ["lora.rank=8"], ["lora.rank=8", "random"]),
    ("sft", ["stop.kl_budget=5"], ["stop.kl_budget=5.0", "stage=sft", "ppo, grpo, rloo"]),
    ("pretrain", ["stop.reward_accuracy=0.8"], ["stop.reward_accuracy=0.8", "reward"]),
    ("ppo", ["stop.plateau_patience=3"], ["stop.plateau_patience=3", "sft"]),
    ("ppo", ["stop.reward_disagreement=2"], ["stop.reward_disagreement=2.0", "at least 2"]),
    ("reward", ["stop.calibration_error=0.1"], ["stop.calibration_error=0.1", "stop.reward_accuracy"]),
    ("reward", ["stop.reward_accuracy=0.8", "validation.every=0"], ["stop.reward_accuracy=0.8", "validation.every is 0"]),
    ("sft", ["validation.every=0", "validation.at_end=false"], ["checkpoint.best=true", "validation.every"]),
    ("reward", ["stop.reward_accuracy=0.5"], ["stop.reward_accuracy=0.5", "greater than 0.5"]),
    ("ppo", ["stop.window=1"], ["stop.window=1", "at least 2"]),
    ("ppo", ["ppo.advantage=gea"], ["did you mean gae", "or null"]),
])
def test_refused(stage, words, expected, runs):
    text = said(composed(stage, runs, *words))
    assert all(part in text for part in expected), text


@pytest.mark.parametrize(("stage", "words"), [
    ("ppo", ["rewards.models=[]", "rewards.functions=[length,my.module:score]", "rewards.weights=[1,-0.5]", "ppo.advantage=reinforce"]),
    ("ppo", ["ppo.kl_in=loss", "ppo.kl=k2"]), ("ppo", ["ppo.kl_in=loss", "ppo.kl_coef=0"]),
    ("ppo", ["ppo.ptx_coef=27.8"]),  # the embedded corpus belongs to the embedded tasks
    ("ppo", ["parallel.tp=2", "parallel.sp=true", "launch.ranks=2", "reward_layout.tp=1", "data.sequence_length=63"]),
    ("reward", ["train.global_batch_size=7", "launch.ranks=3"]),  # packed: nothing has to divide
    ("reward", ["stop.reward_accuracy=0.8", "stop.calibration_error=0.05", "stop.plateau_patience=3"]),
    ("ppo", ["stop.kl_budget=10", "stop.reward_per_kl=0", "stop.length_drift=2", "stop.entropy_floor=0.1"]),
    ("dpo", ["precision.fp8=current", "kernels.layers=fp8"]),
])
def test_accepted(stage, words, runs):
    assert said(composed(stage, runs, *words)) == ""


def test_a_run_that_resumes_needs_no_start(runs, tmp_path):
    write_record(tmp_path / "mine", 5, *SIZES, "stage=sft")
    words = ["checkpoint.start=null", "checkpoint.load=auto"]
    assert said(composed("sft", runs, *words, f"run.dir={tmp_path / 'mine'}")) == ""
    assert "checkpoint.start=null" in said(composed("sft", runs, *words, f"run.dir={tmp_path / 'none'}"))


def test_names_are_those_of_the_code():
    assert set(STAGES) == set(options_of("stage")) == {*stages.TEXT, *stages.CHAT}
    assert rlhf.LORA_TARGETS == LoraConfig().targets
    from rlhf import advantages, grpo, kl, policy_losses, ppo, rloo

    assert set(CHOICES["ppo.advantage"]) == set(advantages.ADVANTAGES) and set(CHOICES["ppo.policy_loss"]) == set(policy_losses.POLICY_LOSSES)
    assert CHOICES["ppo.kl"] == kl.KINDS
    assert {name for name, one in advantages.ADVANTAGES.items() if one.critic} == {"gae"}, "config/stages.py: has_critic"
    for name, algorithm in (("ppo", ppo.PPO), ("grpo", grpo.GRPO), ("rloo", rloo.RLOO)):
        assert (stages.ADVANTAGE[name], stages.POLICY_LOSS[name]) == (algorithm.advantage, algorithm.policy_loss)


def test_what_a_stage_does_not_read_is_said(runs):
    config = composed("ppo", runs, "train.global_batch_size=64", "ppo.kl=k3", "ppo.beta=0.3")
    found = notes.notes(config, ["stage=ppo", "train.global_batch_size=64", "ppo.kl=k3", "ppo.beta=0.3", "ppo.clip=0.2"])
    assert len(found) == 3 and "train.global_batch_size is not read" in found[0] and "ppo.beta is not read" in found[1] and "ppo.kl=k3" in found[2]
    assert "critic.lr is not read" in notes.notes(composed("grpo", runs), ["critic.lr=1"])[0]
    assert notes.notes(composed("sft", runs), ["chat.packing=false", "train.micro_batch_size=8"]) == []
    assert "chat.packing is not read" in notes.notes(composed("reward", runs), ["chat.packing=false"])[0]
    assert any("reinforce has no ratio" in one for one in rlhf.doubts(composed("rloo", runs, "ppo.minibatches=2")))


def test_every_key_that_is_said_to_mean_nothing_exists(runs):
    from megatron_ext.config.build import key_types

    known = key_types()
    for stage in (*stages.TEXT, *stages.CHAT):
        for key in stages.meaningless(compose([f"stage={stage}"])):
            assert key in known or key.endswith(".") and any(one.startswith(key) for one in known), key


def test_the_models_of_a_stage(runs):
    config = composed("ppo", runs, "parallel.tp=2", "launch.ranks=4", "reward_layout.tp=1", "critic_layout.pp=2", "rollout_layout.tp=1")
    found = {one.role: one for one in cast.members(config, 512)}
    assert list(found) == ["policy", "reference", "reward", "critic", "rollout"]
    assert [one.layout for one in found.values()] == [f"TP {tp} x DP {dp} x PP {pp}" for tp, dp, pp in
                                                      ((2, 2, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 4, 1))]
    assert found["reward"].model.num_layers == 2 and found["critic"].source == runs / "reward" / "checkpoints" / "step_00000030"
    # hidden 32, 2 layers: attention 4 x 32^2, feed-forward 3 x 32 x 128 (8/3 x 32 up to 64), two norms; the table, the last norm, head and bias
    assert found["reward"].parameters == 2 * (4 * 32 * 32 + 3 * 32 * 128 + 64) + 512 * 32 + 32 + 33
    assert cast.members(composed("sft", runs), 512) == []
    assert [one.role for one in cast.members(composed("dpo", runs), 512)] == ["policy", "reference"]
    assert [one.role for one in cast.members(composed("grpo", runs, "lora.rank=4"), 512)] == ["policy", "reward"]


@pytest.mark.parametrize(("words", "expected"), [
    (["reward_layout.tp=4", "launch.ranks=4"], ["reward_layout.tp=4", "model.num_attention_heads=2"]),
    (["critic_layout.pp=4", "launch.ranks=4"], ["critic_layout.pp=4", "model.num_layers=2"]),
    (["rewards.models=[{runs}/sft]"], ["rewards.models", "is a language model"]),
    (["critic.load={runs}/sft"], ["critic.load", "is a language model"]),
    (["rewards.models=[{runs}/other]"], ["rewards.models", "another tokenizer"]),
    (["rewards.functions=[lenght]"], ["rewards.functions=lenght", "did you mean length"]),
])
def test_a_reward_that_cannot_be_used(words, expected, runs):
    config = composed("ppo", runs, *(word.format(runs=runs) for word in words))
    assert said(config) == ""
    with pytest.raises(UserError) as error:
        cast.members(config, 512)
    assert all(part in str(error.value) for part in expected), str(error.value)


def test_geometry_of_each_unit(runs):
    assert "64 prompts (all responses to a prompt together)" in geometry.text(composed("reward", runs), 512)
    assert "64 pairs" in geometry.text(composed("dpo", runs), 512)
    assert "32 sequences = micro-batch 8 x 4" in geometry.text(composed("sft", runs), 512)
    config = composed("ppo", runs, "rollout.prompts=6", "rollout.samples=4", "ppo.minibatches=3", "ppo.epochs=2", "train.steps=11",
                      "generate.max_tokens=28", "rollout.max_prompt=50")
    one = geometry.Iteration.of(config)
    assert (one.episodes, one.minibatch, one.optimizer_steps, one.tokens, one.run_optimizer_steps) == (24, 8, 6, 24 * 78, 66)
    text = geometry.text(config, 512)
    assert "24 episodes = 6 prompts x 4 responses" in text and "6 optimizer steps = 2 passes x 3 minibatches of 8 episodes" in text
    assert geometry.Iteration.of(composed("ppo", runs, "generate.max_tokens=28")).prompt_tokens == 100


# ---- the chain ----------------------------------------------------------------------------------------------------------------------

def test_chain_and_where_it_breaks(tmp_path):
    pretrain = write_record(tmp_path / "pretrain", 100)
    sft = write_record(tmp_path / "sft", 20, "stage=sft", **child_of(pretrain))
    reward = write_record(tmp_path / "reward", 5, "stage=reward", head="scalar", **child_of(sft))
    named = [{"path": str(path), "hash": checkpoint_hash(path)} for path in (sft, reward)]
    ppo = write_record(tmp_path / "ppo", 3, "stage=ppo", roles={"reference": named[0], "rewards": [named[1]]}, **child_of(sft))
    found = ancestry.chain(ppo)
    assert [(one["stage"], one["step"]) for one in found] == [("ppo", 3), ("sft", 20), ("pretrain", 100)]
    assert [one["hash"] for one in found] == [checkpoint_hash(path) for path in (ppo, sft, pretrain)] and found[-1]["parent"] is None
    assert [one["role"] for one in found[0]["roles"]] == ["reference", "reward"] and found[2]["data"]["sources"] == ["1" * 64]
    lines = ancestry.described(found)
    assert len(lines) == 4 and "reward " + named[1]["hash"][:12] in lines[1] and "sources 111111111111" in lines[-1]
    assert json.loads(json.dumps(found)) == found

    pretrain.rename(tmp_path / "aside")
    assert ancestry.chain(ppo)[-1] == {"hash": checkpoint_hash(tmp_path / "aside"), "path": str(pretrain), "broken": "is not there any more"}
    write_record(tmp_path / "pretrain", 100, samples=1)
    assert "is another checkpoint now" in ancestry.chain(ppo)[-1]["broken"] and "broken: " in ancestry.described(ancestry.chain(ppo))[-1]
    (sft / manifest.MANIFEST).write_text("{}")
    assert "not a checkpoint manifest" in ancestry.chain(ppo)[-1]["broken"]
    with pytest.raises(UserError, match="not a checkpoint manifest"):
        ancestry.chain(sft)


def test_runs_that_were_moved_together_are_found(tmp_path):
    pretrain = write_record(tmp_path / "here/pretrain", 100)
    write_record(tmp_path / "here/sft", 20, "stage=sft", **child_of(pretrain))
    (tmp_path / "here").rename(tmp_path / "there")
    found = ancestry.chain(tmp_path / "there/sft/checkpoints/step_00000020")
    assert [one["path"] for one in found] == [str(tmp_path / f"there/{run}") for run in ("sft/checkpoints/step_00000020", "pretrain/checkpoints/step_00000100")]


def test_a_record_of_an_older_version_says_where_it_stops(tmp_path):
    pretrain = write_record(tmp_path / "pretrain", 100)
    old = write_record(tmp_path / "old", 1, parent=checkpoint_hash(pretrain))
    assert ancestry.chain(old)[-1] == {"hash": checkpoint_hash(pretrain), "path": None, "broken": "the record does not say where it was"}


# ---- the command line ----------------------------------------------------------------------------------------------------------------

def test_check_prints_all_of_it_without_torch(runs):
    words = ["check", "stage=ppo", f"checkpoint.start={runs / 'sft'}", f"rewards.models=[{runs / 'reward'}]", "parallel.tp=2", "launch.ranks=2",
             "rollout_layout.tp=1", "train.global_batch_size=64"]
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "megatron_ext", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    imported = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert not imported & {"torch", "numpy", "megatron"}
    for part in ("512 episodes = 512 prompts x 1 responses", "rollout    ", "TP 1 x DP 2 x PP 1", "generation  by the rollout: up to 64 tokens, temperature 1",
                 "chain       sft step 20", "            pretrain step 100", "note        train.global_batch_size is not read"):
        assert part in done.stdout, done.stdout
