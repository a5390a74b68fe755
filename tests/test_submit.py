"""`submit`: what is asked for. Mistakes are refused, ranks lie where the placement says, the chain and sweeps are what was meant.

Slurm's commands are fakes here (fake_slurm.py); tests/test_slurm.py has a real one.
"""
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_slurm import CPU, GPU, FakeSlurm, jobs, sbatch_options, shell, without

from megatron_ext.cli import main as front
from megatron_ext.config.cluster import on_nodes, seconds, tensor_parallel_stays
from megatron_ext.config.compose import compose
from megatron_ext.config.geometry import Grid
from megatron_ext.errors import UserError
from megatron_ext.submit import limits, placement

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def fake(tmp_path, monkeypatch) -> FakeSlurm:
    found = FakeSlurm.make(tmp_path)
    monkeypatch.setenv("PATH", f"{found.bin}:/usr/bin:/bin")
    return found


def refused(*words: str, sweep: tuple[str, ...] = ()) -> str:
    with pytest.raises(UserError) as error:
        jobs(*words, sweep=sweep)
    return str(error.value)


# ---- what is asked for ---------------------------------------------------------------------------------------------------------------

def test_what_the_gpu_cannot_hold_is_not_submitted():
    few = refused("train", *GPU, "cluster.nodes=1", "hardware=h100_sxm", "parallel.tp=1", "parallel.pp=1", "hardware.memory=16")
    assert few.startswith("hardware.name=h100_sxm: has 16 GiB") and "fits" in few
    chain = refused("run", *GPU[:3], "model=llama32_1b", "precision=bf16", "cluster.nodes=1", "hardware=a100_40g", "hardware.memory=4", "train.global_batch_size=64")
    assert chain.startswith("hardware.name=a100_40g: has 4 GiB")


@pytest.mark.parametrize(("text", "expected"), [
    ("30", 1800), ("1:30", 90), ("01:00:00", 3600), ("1-12", 129600), ("2-00:00:30", 172830), ("1-2:3", 93780), ("UNLIMITED", float("inf")),
])
def test_times_are_slurms(text, expected):
    assert seconds(text) == expected


@pytest.mark.parametrize(("words", "message"), [
    (("cluster.time=tomorrow",), "cluster.time=tomorrow: is no time of Slurm's"),
    (("cluster.time=0",), "cluster.time=0: leaves no time"),
    (("cluster.time=1", "cluster.signal_lead=60"), "cluster.signal_lead=60: seconds before the end, of a job of 60 seconds"),
    (("cluster.min_nodes=3",), "cluster.min_nodes=3: must be at most cluster.nodes=2"),
    (("cluster.nodes=0",), "cluster.nodes=0: must be at least 1"),
    (("cluster.launcher=mpirun",), "must be one of srun, torchrun"),
    (("cluster.gpus_per_node=4", "cluster.tasks_per_node=2"), "cluster.tasks_per_node=2: must be cluster.gpus_per_node=4"),
    (("cluster.gpu_type=h100",), "asks for no GPU"),
    (("cluster.partition=a\nb",), r"cluster.partition='a\nb': must be one line"),
    (("cluster.account= ",), "cluster.account=' ': must be one line"),
    (("run.dir=a\\b",), "in the name of a log Slurm takes no backslash"),
    (("cluster.options=[-N4]",), "cluster.options=-N4: is no long option"),
    (("cluster.options=[--output=/tmp/x]",), "cluster.options=--output=/tmp/x: is set from the other keys"),
    (("cluster.env=[NCCL_DEBUG]",), "must be NAME=VALUE"),
    (("cluster.env=[A B=1]",), "must be NAME=VALUE"),
    (("cluster.image=x.sif",), "cluster.image=x.sif: needs cluster.container"),
    (("cluster.container=pyxis",), "cluster.image=null: name the image"),
    (("cluster.container=pyxis", "cluster.image=x", "cluster.mounts=[data]"), "cluster.mounts=data: must be SOURCE"),
    (("parallel.tp=2",), "parallel.tp=2: groups of tensor parallelism would reach over nodes of 1 ranks"),
    (("launch.ranks=3",), "launch.ranks=3: but cluster.nodes=2 nodes hold 2; leave launch.ranks out"),
    (("train.global_batch_size=33",), "train.global_batch_size=33: must be a multiple"),
    (("checkpoint.load=/tmp",), "checkpoint.load=/tmp: would be loaded again by every life"),
    (("train.stepz=3",), "did you mean train.steps"),
    (("stage=sft",), "checkpoint.start=null: stage=sft goes on from an earlier stage"),
    (("checkpoint.start=/no/such",), "checkpoint.start=/no/such"),
    (("data.path=/no/such",), "data.path=/no/such"),
    (("data.paths=[/no/such]",), "data.paths=/no/such: is not there"),
    (("run", "data.path=/no/such", "cluster.nodes=1", "cluster.tasks_per_node=2"), "data.path=/no/such"),
    (("run", "input=/no/such", "cluster.nodes=1", "cluster.tasks_per_node=2"), "input=/no/such: is not there"),
    (("run", "train"), "submit=run train: is one of both"),
    (("cluster.nodes=6", "cluster.min_nodes=5", "train.global_batch_size=48", "train.micro_batch_size=1"),
     "(on 5 nodes, which cluster.min_nodes=5 allows)"),
])
def test_mistakes_are_refused(tmp_path, words, message):
    assert message in refused(*without((*CPU, f"run.dir={tmp_path}/run"), words), *words)


@pytest.mark.parametrize("word", ["cluster.env=[WANDB_API_KEY=0123456789abcdef0123]", "cluster.env=[DB_PASSWORD=hunter2hunter2]",
                                  "cluster.comment=hf_abcdefghijklmnopqrstuv", "cluster.image=https://me:hunter2hunter2@registry/x"])
def test_secrets_never_stand_in_a_script(tmp_path, word):
    said = refused(*CPU, f"run.dir={tmp_path}/run", *(["cluster.container=pyxis"] if "image" in word else []), word)
    assert "looks like a secret" in said and "0123456789" not in said and "hunter2" not in said and "hf_abc" not in said


def test_a_secret_of_the_environment_is_known_by_its_value(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "swordfish-31337")
    said = refused(*CPU, f"run.dir={tmp_path}/run-swordfish-31337")
    assert said.startswith("run.dir=") and "looks like a secret" in said and "swordfish" not in said


# ---- placement ---------------------------------------------------------------------------------------------------------------------------

def test_crossing_is_what_an_array_says():
    """Against numpy: the ranks as [PP, DP, CP, TP], each group's nodes looked at one by one."""
    source = random.Random(0)
    for _ in range(60):
        tp, cp, dp, pp, tasks = (source.choice((1, 2, 3, 4)) for _ in range(5))
        nodes_of = np.arange(tp * cp * dp * pp).reshape(pp, dp, cp, tp) // tasks
        truth = {kind for axis, kind in enumerate(("pp", "dp", "cp", "tp")) if (nodes_of.min(axis) != nodes_of.max(axis)).any()}
        assert set(placement.crossing(Grid(tp, cp, dp, pp), tasks)) == truth


def test_the_placement_of_sixteen_ranks():
    config = on_nodes(compose([*GPU, "cluster.nodes=2", "parallel.tp=4", "parallel.pp=2"]))
    assert placement.lines(config) == [
        "16 ranks = 2 nodes x 8; TP 4 within nodes; DP 2 within nodes; PP 2 across nodes",
        "  node 0  ranks 0-7   pp 0  dp 0-1  tp 0-3",
        "  node 1  ranks 8-15  pp 1  dp 0-1  tp 0-3",
    ]
    many = placement.lines(on_nodes(compose([*GPU, "cluster.nodes=32", "cluster.min_nodes=16", "parallel.tp=8", "parallel.pp=4"])))
    assert len(many) == 11 and many[5] == "  ..." and "DP 4 at least" in many[-1]


def test_every_model_stays_within_its_node():
    config = on_nodes(compose(["cluster=slurm_cpu", "cluster.tasks_per_node=2", "stage=ppo", "rewards.functions=[length]", "ppo.advantage=rloo",
                               "parallel.tp=2", "reference_layout.tp=4"]))
    assert [error.key for error in tensor_parallel_stays(config)] == ["reference_layout.tp"]
    assert list(tensor_parallel_stays(replace(config, cluster=replace(config.cluster, cross_node_tp=True)))) == []


def test_numbers_of_nodes_that_fit():
    """A batch of 48 over 2 to 8 data ranks: 5 and 7 do not divide it."""
    (job,) = jobs(*CPU, "cluster.nodes=8", "cluster.min_nodes=2", "train.global_batch_size=48", "train.micro_batch_size=2")
    assert job.nodes == (2, 3, 4, 6, 8)
    (job,) = jobs(*CPU, "cluster.nodes=4", "cluster.min_nodes=1", sweep=("train.micro_batch_size=8,4",))
    assert job.nodes == (1, 2, 4)


def test_context_parallelism_over_nodes_is_said():
    config = on_nodes(compose([*GPU, "cluster.nodes=2", "parallel.tp=4", "parallel.cp=4"]))
    assert "context parallelism of the policy reaches over nodes" in placement.notes(config)[0]


# ---- shapes -------------------------------------------------------------------------------------------------------------------------------

def test_the_chain_depends_and_names_where_it_starts(fake, tmp_path, capsys):
    words = [*CPU[:1], "cluster.nodes=1", "cluster.tasks_per_node=2", f"run.dir={tmp_path}/run", "ppo:train.steps=3"]
    assert front.run(["submit", "run", *words, "--json"]) == 0
    said = {job["name"]: job for job in json.loads(capsys.readouterr().out)["jobs"]}
    assert {name: (job["id"], job["after"]) for name, job in said.items()} == {
        "pretrain": ("101", []), "adapt": ("102", ["101"]), "sft": ("103", ["102"]), "reward": ("104", ["103"]), "ppo": ("105", ["103", "104"]),
    }
    assert fake.log()[4] == f"sbatch --parsable --dependency=afterok:103:104 --kill-on-invalid-dep=yes {tmp_path}/run/ppo/ppo.sbatch"
    starts = {"pretrain": set(), "adapt": {f"checkpoint.start={tmp_path}/run/pretrain"}, "sft": {f"checkpoint.start={tmp_path}/run/adapt"},
              "reward": {f"checkpoint.start={tmp_path}/run/sft"},
              "ppo": {f"checkpoint.start={tmp_path}/run/sft", f"rewards.models=[{tmp_path}/run/reward]"}}
    for name, job in said.items():
        script = Path(job["script"]).read_text()
        words = shell(script, tail='printf "%s\\0" "${words[@]}"').split("\0")
        assert {word for word in words if word.startswith(("checkpoint.start=", "rewards.models="))} == starts[name]
        assert f"stage={name}" in words and "checkpoint.load=auto" in words and not any(word.startswith("launch.ranks") for word in words)
        assert ("train.steps=3" in words) == (name == "ppo") and Path(job["script"]).stat().st_mode & 0o777 == 0o700
    assert "megatron_ext prepare output=outputs/data/stdlib-2048" in Path(said["pretrain"]["script"]).read_text()
    assert "data.corpus=stdlib-docs" in Path(said["adapt"]["script"]).read_text()


def test_a_chain_is_submitted_whole_or_not_at_all(fake, tmp_path):
    fake.say(refuse_103="sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified\n")
    with pytest.raises(UserError, match="cluster.account=null: Slurm refuses job sft: Invalid account"):
        front.run(["submit", *CPU[:1], "stages=pretrain,adapt,sft", "cluster.nodes=1", "cluster.tasks_per_node=2", f"run.dir={tmp_path}/run"])
    assert fake.log()[-1] == "scancel 101 102" and len(fake.log()) == 3


def test_a_mistake_in_a_late_stage_submits_nothing(fake, tmp_path):
    for word, message in (("ppo:train.stepz=3", "train.stepz"), ("sft:train.global_batch_size=15", "train.global_batch_size=15")):
        with pytest.raises(UserError, match=message):
            front.run(["submit", "run", *CPU[:1], "cluster.nodes=1", "cluster.tasks_per_node=2", f"run.dir={tmp_path}/run", word])
    assert fake.log() == [] and not (tmp_path / "run").exists()


def test_a_sweep_is_an_array(fake, tmp_path, capsys):
    words = [*CPU, f"run.dir={tmp_path}/run", "cluster.array_limit=3", "validation.every=0", "validation.at_end=false"]
    assert front.run(["submit", *words, "--sweep", "optim.lr=1e-3,3e-4", "--sweep=data.split=[0.9,0.05,0.05],[1,0,0]"]) == 0
    assert "4 points" in capsys.readouterr().out
    script = (tmp_path / "run/pretrain-sweep.sbatch").read_text()
    assert sbatch_options(script)["array"] == "0-3%3" and sbatch_options(script)["output"] == f"{tmp_path}/run/slurm-%A_%a.log"
    points = json.loads((tmp_path / "run/sweep.json").read_text())
    wanted = [("1e-3", "[0.9,0.05,0.05]"), ("1e-3", "[1,0,0]"), ("3e-4", "[0.9,0.05,0.05]"), ("3e-4", "[1,0,0]")]
    for index, (lr, split) in enumerate(wanted):
        words = shell(script, tail='printf "%s\\0" "$run_dir" "${words[@]}"', SLURM_ARRAY_TASK_ID=str(index)).split("\0")
        assert {f"optim.lr={lr}", f"data.split={split}", f"run.dir={words[0]}"} <= set(words[1:]) and words[0] == points[index]["run.dir"]
    assert len({point["run.dir"] for point in points}) == 4 and points[0]["run.dir"].startswith(f"{tmp_path}/run/000_lr-1e-3")


@pytest.mark.parametrize(("sweep", "message"), [
    ("optim.lr", "must be KEY=VALUE"), ("optim.lr=1,,2", "holds an empty value"), ("optim.lr=1,1", "names a value twice"),
    ("run.dir=a,b", "run.dir is the same"), ("cluster.nodes=1,2", "cluster.nodes is the same"),
    ("optim.lr=1e-3,fast", "optim.lr=fast: must be a number"), ("optim.lrr=1,2", "did you mean optim.lr"),
    ("train.global_batch_size=32,33", "train.global_batch_size=33"),
])
def test_sweeps_that_mean_nothing(tmp_path, sweep, message):
    assert message in refused(*CPU, f"run.dir={tmp_path}/run", sweep=(sweep,))


def test_a_sweep_is_of_one_stage_and_of_what_the_array_holds(fake, tmp_path):
    assert "goes with one stage" in refused("run", f"run.dir={tmp_path}", sweep=("optim.lr=1,2",))
    fake.say(config="MaxArraySize = 3\n")
    (job,) = jobs(*CPU, f"run.dir={tmp_path}/run", sweep=("train.seed=1,2,3,4",))
    assert "points are more than the 3 that an array may have here" in str(limits.beyond(job)[0][0])


def test_what_is_said_after_submission(fake, tmp_path, capsys):
    assert front.run(["submit", *CPU, f"run.dir={tmp_path}/my run"]) == 0
    said = capsys.readouterr().out
    assert "submitted   pretrain: job 101" in said and f"log         tail -F '{tmp_path}/my run/slurm-101.log'" in said
    assert "squeue --jobs=101" in said and "scancel 101" in said and "2 ranks = 2 nodes x 1; DP 2 across nodes" in said
    assert fake.log() == [f"sbatch --parsable {tmp_path}/my run/pretrain.sbatch"]


def test_the_examples_are_what_submit_renders():
    done = subprocess.run([sys.executable, ROOT / "slurm/render.py", "--check"], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, ""), "python slurm/render.py makes them anew" + done.stderr
    assert (ROOT / "slurm/chain/submit.sh").read_text().count("--dependency=") == 3


def test_multirun_is_hydras(tmp_path, monkeypatch):
    """Keys that conf/ does not name, groups and lists; each run is a command with a folder of its own."""
    from megatron_ext.submit import multirun

    ran: list[list[str]] = []
    monkeypatch.setattr(multirun.subprocess, "run", lambda command, **_: ran.append(command[3:]))
    monkeypatch.setattr(sys, "argv", ["multirun"])
    multirun.main(["--multirun", f"hydra.sweep.dir={tmp_path}", "model=tiny,micro_llama", "optim.lr=1e-3,3e-4", "data.split=[0.9,0.1,0]"])
    assert len(ran) == 4 and ran[2] == ["train", "model=micro_llama", "++optim.lr=0.001", "++data.split=[0.9,0.1,0]", f"run.dir={tmp_path}/2", "checkpoint.load=auto"]
    config = compose(ran[2][1:])
    assert config.model.name == "micro_llama" and config.optim.lr == 1e-3 and config.run.dir == f"{tmp_path}/2"
    with pytest.raises(UserError, match="hydra.sweep.dir"):
        multirun.main(["--multirun", "run.dir=here"])
