"""`submit`: what is asked for is what Slurm is told, and what cannot work is refused before. Slurm's commands are fakes; tests/test_slurm.py has a real one."""
import json
import os
import random
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_slurm import FakeSlurm

from megatron_ext.cli import main as front
from megatron_ext.config.cluster import on_nodes, seconds, tensor_parallel_stays
from megatron_ext.config.compose import compose
from megatron_ext.config.geometry import Grid
from megatron_ext.errors import UserError
from megatron_ext.submit import disk, limits, placement, plan, slurm

CPU = ("cluster=slurm_cpu", "train.steps=20", "optim.warmup_steps=5", "checkpoint.every=5")
GPU = ("cluster=slurm_gpu", "cluster.partition=gpu", "cluster.account=nlp", "model=llama3_8b", "train.global_batch_size=384", "train.micro_batch_size=1",
       "precision=bf16")


@pytest.fixture
def fake(tmp_path, monkeypatch) -> FakeSlurm:
    found = FakeSlurm.make(tmp_path)
    monkeypatch.setenv("PATH", f"{found.bin}:/usr/bin:/bin")
    return found


@pytest.fixture
def no_slurm(tmp_path, monkeypatch) -> None:
    """A PATH with nothing on it but what the scripts of a test need."""
    (tmp_path / "few").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "few"))


def jobs(*words: str, sweep: tuple[str, ...] = ()):
    return plan.jobs(SimpleNamespace(overrides=words, sweeps=sweep))


def refused(*words: str, sweep: tuple[str, ...] = ()) -> str:
    with pytest.raises(UserError) as error:
        jobs(*words, sweep=sweep)
    return str(error.value)


def sbatch_options(text: str) -> dict[str, str]:
    """The #SBATCH lines as sbatch reads them: up to the first line that is a command."""
    found = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            break
        if line.startswith("#SBATCH "):
            (word,) = shlex.split(line.removeprefix("#SBATCH "))
            name, _, value = word.removeprefix("--").partition("=")
            assert name not in found
            found[name] = value
    return found


# ---- what is asked for ---------------------------------------------------------------------------------------------------------------

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
    (("cluster.nodes=6", "cluster.min_nodes=4", "train.global_batch_size=48", "train.micro_batch_size=1"), "(on 5 nodes, which cluster.min_nodes=4 allows)"),
])
def test_mistakes_are_refused(tmp_path, words, message):
    keys = {word.partition("=")[0] for word in words}
    assert message in refused(*(word for word in CPU if word.partition("=")[0] not in keys), f"run.dir={tmp_path}/run", *words)


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
    config = on_nodes(compose(["cluster=slurm_cpu", "cluster.tasks_per_node=2", "stage=ppo", "rewards.functions=[length]", "ppo.advantage=rloo", "parallel.tp=2", "reference_layout.tp=4"]))
    assert [error.key for error in tensor_parallel_stays(config)] == ["reference_layout.tp"]
    assert list(tensor_parallel_stays(replace(config, cluster=replace(config.cluster, cross_node_tp=True)))) == []


def test_context_parallelism_over_nodes_is_said():
    config = on_nodes(compose([*GPU, "cluster.nodes=2", "parallel.tp=4", "parallel.cp=4"]))
    assert "context parallelism of the policy reaches over nodes" in placement.notes(config)[0]


# ---- what the cluster has ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("words", "message"), [
    (("cluster.partition=gpus",), "cluster.partition=gpus: unknown here; did you mean gpu? this cluster has lab, gpu, old"),
    (("cluster.nodes=16",), "cluster.nodes=16: partition gpu gives a job at most 8 nodes"),
    (("cluster.time=3-00",), "cluster.time=3-00: is more than the 2 days 00:00:00 of partition gpu"),
    (("cluster.account=physics",), "cluster.account=physics: may not use partition gpu; it is for nlp, vision"),
    (("cluster.account=null",), "cluster.account=null: partition gpu is for nlp, vision: name one"),
    (("cluster.qos=fast",), "cluster.qos=fast: partition gpu takes normal, long"),
    (("cluster.constraint=nvl",), "cluster.constraint=nvl: partition gpu has 0 nodes with the feature nvl, and 1 are asked for"),
    (("cluster.gpus_per_node=16", "parallel.tp=1"), "cluster.gpus_per_node=16: partition gpu has 0 nodes with 16 GPUs, and 1 are asked for; its nodes have at most 8"),
    (("cluster.gpu_type=b200",), "nodes with 8 b200 GPUs, and 1 are asked for; its nodes have at most 0"),
    (("cluster.cpus_per_task=32",), "cluster.cpus_per_task=32: partition gpu has 0 nodes with 256 cores (8 tasks of 32), and 1 are asked for"),
    (("cluster.partition=old", "cluster.nodes=4", "cluster.gpus_per_node=2", "cluster.time=1:0:0"), "cluster.partition=old: takes no jobs now"),
    (("cluster.partition=old", "cluster.account=guests"), "cluster.account=guests: may not use partition old"),
    (("cluster.partition=lab", "cluster.gpus_per_node=0", "cluster.nodes=8", "cluster.cpus_per_task=1", "launch.device=cpu"),
     "cluster.nodes=8: partition lab has 4 nodes, and 8 are asked for"),
])
def test_more_than_the_cluster_has_is_refused(fake, tmp_path, words, message):
    keys = {word.partition("=")[0] for word in words}
    (job,) = jobs(*(word for word in GPU if word.partition("=")[0] not in keys), f"run.dir={tmp_path}/run", *words)
    errors, _ = limits.beyond(job)
    assert message in "\n".join(map(str, errors))


def test_what_fits_is_accepted_and_down_nodes_are_told(fake, tmp_path):
    (job,) = jobs(*GPU, "cluster.nodes=8", "cluster.gpu_type=h100", f"run.dir={tmp_path}/run")
    assert limits.beyond(job) == ([], ["only 6 of the nodes of partition gpu that fit are up now: the job waits for 8"])
    (job,) = jobs(*GPU, "cluster.nodes=6", "cluster.constraint=h100", f"run.dir={tmp_path}/run")
    assert limits.beyond(job) == ([], [])
    (job,) = jobs(*CPU, f"run.dir={tmp_path}/run")  # the default partition
    assert limits.beyond(job) == ([], [])


def test_accounts_of_the_accounting(fake, tmp_path, monkeypatch):
    """A default account counts; an association that is for another partition does not."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    fake.say(config="AccountingStorageEnforce = associations,limits\n")
    (job,) = jobs(*[word for word in GPU if "account" not in word], f"run.dir={tmp_path}/run")
    fake.users("nlp|\nphysics|lab\n", "nlp\n")
    assert limits.beyond(job)[0] == []
    fake.users("physics|lab\n", "\n")
    assert "cluster.account=null: partition gpu is for nlp, vision" in str(limits.beyond(job)[0][0])
    (job,) = jobs(*CPU, f"run.dir={tmp_path}/run")
    assert limits.beyond(job)[0] and "charges every job to an account; yours for partition lab: physics" in str(limits.beyond(job)[0][0])
    fake.users("", "\n")
    assert "has none for partition lab" in str(limits.beyond(job)[0][0])
    (job,) = jobs(*CPU, "cluster.account=physics", f"run.dir={tmp_path}/run")
    fake.users("physics|lab\n", "\n")
    assert limits.beyond(job)[0] == []


def test_no_slurm_here(no_slurm, tmp_path, capsys):
    with pytest.raises(UserError, match="PATH=sbatch, srun, scontrol, squeue, sinfo: not found"):
        front.run(["submit", *CPU, f"run.dir={tmp_path}/run"])
    assert front.run(["submit", *CPU, f"run.dir={tmp_path}/run", "--dry-run"]) == 0 and not (tmp_path / "run").exists()
    assert capsys.readouterr().out.startswith("#!/bin/bash\n")


def test_a_controller_that_does_not_answer(fake, tmp_path, capsys):
    (fake.bin / "scontrol").write_text("#!/bin/bash\necho 'slurm_load_partitions: Unable to contact slurm controller (connect failure)' >&2\nexit 1\n")
    with pytest.raises(UserError, match="Unable to contact slurm controller"):
        front.run(["submit", *CPU, f"run.dir={tmp_path}/run"])
    assert front.run(["submit", *CPU, f"run.dir={tmp_path}/run", "--dry-run"]) == 0
    assert "limits are not looked at" in capsys.readouterr().err


# ---- disk -----------------------------------------------------------------------------------------------------------------------------------

def test_checkpoints_are_as_large_as_is_said(tmp_path):
    """tiny with 2048 words: 4 layers of 4 x 256^2 + 3 x 256 x 704 + 512, two tables of 2048 x 256, a norm of 256 = 4,262,144 parameters, worked out by hand.
    bf16 keeps 14 bytes of each: 59,670,016, and a run of `make run` wrote 59,695,920."""
    config = compose(["precision=bf16"])
    assert disk.checkpoint_bytes(config) == 14 * 4_262_144
    assert abs(59_695_920 / disk.checkpoint_bytes(config) - 1) < 1e-3
    assert disk.checkpoint_bytes(compose()) == 12 * 4_262_144


@pytest.mark.parametrize(("free", "there", "refuses"), [(4.1, 0, False), (3.9, 0, True), (1.1, 3, False), (0.9, 3, True)])
def test_a_full_disk_is_refused(fake, tmp_path, monkeypatch, free, there, refuses):
    """Three checkpoints are kept, a fourth is in the making; those that are there need no room."""
    (job,) = jobs(*CPU, f"run.dir={tmp_path}/run")
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=int(free * disk.checkpoint_bytes(job.config)), f_frsize=1))
    for step in range(there):
        (tmp_path / f"run/checkpoints/step_0000000{step}").mkdir(parents=True)
        (tmp_path / f"run/checkpoints/step_0000000{step}/manifest.json").touch()
    found = [str(error) for error in disk.problems(job)]
    assert bool(found) == refuses and all("free and will hold up to" in text for text in found)
    if refuses:
        with pytest.raises(UserError):
            front.run(["submit", *CPU, f"run.dir={tmp_path}/run"])
        assert fake.log() == []


def test_a_directory_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (job,) = jobs(*CPU, "run.dir=/proc/sys/run")
    assert "run.dir=/proc/sys/run: cannot be written (/proc/sys: " in str(next(disk.problems(job)))
    assert "is a file, or lies below one" in refused(*CPU, f"run.dir={__file__}/run")
    (job,) = jobs(*CPU, f"run.dir={tmp_path}/a/b")
    assert list(disk.problems(job)) == [] and list(tmp_path.iterdir()) == []  # nothing stays behind


# ---- the script -----------------------------------------------------------------------------------------------------------------------------

def script_of(job) -> str:
    from megatron_ext.submit.render import script

    return script(job)


def test_what_slurm_is_told(tmp_path):
    (job,) = jobs(*GPU, "cluster.nodes=4", "cluster.min_nodes=2", "cluster.gpu_type=h100", "cluster.qos=long", "cluster.constraint=ib&h100", "cluster.exclude=n[3,17]",
                  "cluster.reservation=big day", "cluster.comment=it's #1", "cluster.options=[--switches=1,--licenses=a b]", f"run.dir={tmp_path}/50%")
    text = script_of(job)
    assert sbatch_options(text) == {
        "job-name": "pretrain", "nodes": "2-4", "ntasks-per-node": "8", "cpus-per-task": "8", "gpus-per-node": "h100:8", "mem": "0", "partition": "gpu", "account": "nlp",
        "qos": "long", "time": "1-00:00:00", "constraint": "ib&h100", "exclude": "n[3,17]", "reservation": "big day", "comment": "it's #1", "chdir": os.getcwd(),
        "output": f"{tmp_path}/50%%/slurm-%j.log", "open-mode": "append", "signal": "B:USR1@600", "mail-type": "NONE", "requeue": "", "exclusive": "",
        "switches": "1", "licenses": "a b",
    }
    assert "# 32 ranks = 4 nodes x 8; DP 32 across nodes" in text


def shell(text: str, *, tail: str, **environment: str) -> str:
    """What bash prints when it reads the settings of a script (all before the common part), then `tail`."""
    head = text.partition("# ---- the same in all scripts")[0]
    return subprocess.run(["bash", "-c", head + tail], capture_output=True, text=True, check=True, env={"PATH": os.environ["PATH"], **environment}, timeout=20).stdout


def test_hostile_values_reach_the_ranks_as_they_are(tmp_path, fake):
    """bash itself says what it makes of the script."""
    hostile = "$(touch pwned) `id` 'q' \"d\" \\ ; & | < > * ~ 한국어 #"
    (job,) = jobs(*CPU, f"run.dir={tmp_path}/{hostile}", f"cluster.env=[FABRIC={hostile}]", f"cluster.comment={hostile}", "cluster.launcher=torchrun")
    said = shell(script_of(job), tail='printf "%s\\0" "$run_dir" "$FABRIC" "${words[@]}"').split("\0")[:-1]
    assert said[0] == str(tmp_path / hostile) and said[1] == hostile and said[2:] == list(job.runs[0].words)
    assert f"run.dir={tmp_path}/{hostile}" in said and "checkpoint.load=auto" in said
    assert not Path("pwned").exists() and sbatch_options(script_of(job))["comment"] == hostile


@pytest.mark.parametrize(("words", "wanted"), [
    ((), "--ntasks=6 --ntasks-per-node=2 --cpus-per-task=3 --distribution=block --kill-on-bad-exit=1 PY -m megatron_ext train"),
    (("cluster.container=pyxis", "cluster.image=nvcr.io#nvidia/pytorch:25.09-py3", "cluster.mounts=[/data,/scratch/me:/scratch:ro]"),
     "--container-image=nvcr.io#nvidia/pytorch:25.09-py3 --container-mounts=/data:/data,/scratch/me:/scratch:ro,CWD:CWD,RUN:RUN --container-workdir=CWD PY -m"),
    (("cluster.container=apptainer", "cluster.image=my image.sif"), "--kill-on-bad-exit=1 apptainer exec --bind=CWD:CWD --bind=RUN:RUN --pwd=CWD my image.sif PY -m"),
    (("cluster.launcher=torchrun",), "--ntasks=3 --ntasks-per-node=1 --cpus-per-task=6 --distribution=block --kill-on-bad-exit=1 bash -c"),
])
def test_how_ranks_are_started(tmp_path, fake, words, wanted):
    (job,) = jobs(*CPU, "cluster.nodes=3", "cluster.tasks_per_node=2", "cluster.cpus_per_task=3", "cluster.python=PY", f"run.dir={tmp_path}/run", "train.global_batch_size=48",
                  *words)
    fake.say(step="exit 0")
    shell(script_of(job), tail="MASTER_ADDR=n1 port=2000; launch; wait", SLURM_JOB_NUM_NODES="3")
    told = " ".join(shlex.split(*fake.log()))
    assert told.startswith("srun --nodes=3 ") and wanted.replace("CWD", os.getcwd()).replace("RUN", f"{tmp_path}/run") in told
    if "cluster.launcher=torchrun" in words:
        assert "-m torch.distributed.run --nnodes=3 --nproc-per-node=2 --master-addr=n1 --master-port=2000 --max-restarts=0 -m megatron_ext train" in told


def test_modules_files_and_threads(tmp_path, fake):
    (tmp_path / "env.sh").write_text("export FROM_FILE=$FROM_MODULE-and-file\n")
    (job,) = jobs(*CPU, f"run.dir={tmp_path}/run", "cluster.modules=[cuda/12.8,nccl]", f"cluster.source=[{tmp_path}/env.sh]", "launch.threads=5", "cluster.env=[NCCL_DEBUG=INFO]")
    module = 'module() { [ "$1" = load ] && FROM_MODULE="$2+$3"; }; '
    text = script_of(job).replace("#!/bin/bash", module, 1)
    said = shell(text, tail='echo "$FROM_FILE $OMP_NUM_THREADS $NCCL_DEBUG ${RANK:-none}"', RANK="3")
    assert said == "cuda/12.8+nccl-and-file 5 INFO none\n"


# ---- shapes -------------------------------------------------------------------------------------------------------------------------------

def test_the_chain_depends_and_names_where_it_starts(fake, tmp_path, capsys):
    assert front.run(["submit", "run", *CPU[:1], "cluster.nodes=1", "cluster.tasks_per_node=2", f"run.dir={tmp_path}/run", "ppo:train.steps=3", "--json"]) == 0
    said = {job["name"]: job for job in json.loads(capsys.readouterr().out)["jobs"]}
    assert {name: (job["id"], job["after"]) for name, job in said.items()} == {
        "pretrain": ("101", []), "adapt": ("102", ["101"]), "sft": ("103", ["102"]), "reward": ("104", ["103"]), "ppo": ("105", ["103", "104"])}
    assert fake.log()[4] == f"sbatch --parsable --dependency=afterok:103:104 --kill-on-invalid-dep=yes {tmp_path}/run/ppo/ppo.sbatch"
    starts = {"pretrain": set(), "adapt": {f"checkpoint.start={tmp_path}/run/pretrain"}, "sft": {f"checkpoint.start={tmp_path}/run/adapt"},
              "reward": {f"checkpoint.start={tmp_path}/run/sft"}, "ppo": {f"checkpoint.start={tmp_path}/run/sft", f"rewards.models=[{tmp_path}/run/reward]"}}
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
    assert front.run(["submit", *CPU, f"run.dir={tmp_path}/run", "cluster.array_limit=3", "--sweep", "optim.lr=1e-3,3e-4", "--sweep=data.split=[0.9,0.05,0.05],[1,0,0]",
                      "validation.every=0", "validation.at_end=false"]) == 0
    assert "4 points" in capsys.readouterr().out
    script = (tmp_path / "run/pretrain-sweep.sbatch").read_text()
    assert sbatch_options(script)["array"] == "0-3%3" and sbatch_options(script)["output"] == f"{tmp_path}/run/slurm-%A_%a.log"
    points = json.loads((tmp_path / "run/sweep.json").read_text())
    for index, (lr, split) in enumerate([("1e-3", "[0.9,0.05,0.05]"), ("1e-3", "[1,0,0]"), ("3e-4", "[0.9,0.05,0.05]"), ("3e-4", "[1,0,0]")]):
        words = shell(script, tail='printf "%s\\0" "$run_dir" "${words[@]}"', SLURM_ARRAY_TASK_ID=str(index)).split("\0")
        assert {f"optim.lr={lr}", f"data.split={split}", f"run.dir={words[0]}"} <= set(words[1:]) and words[0] == points[index]["run.dir"]
    assert len({point["run.dir"] for point in points}) == 4 and points[0]["run.dir"].startswith(f"{tmp_path}/run/000_lr-1e-3")


@pytest.mark.parametrize(("sweep", "message"), [
    ("optim.lr", "must be KEY=VALUE"), ("optim.lr=1,,2", "holds an empty value"), ("optim.lr=1,1", "names a value twice"), ("run.dir=a,b", "run.dir is the same"),
    ("cluster.nodes=1,2", "cluster.nodes is the same"), ("optim.lr=1e-3,fast", "optim.lr=fast: must be a number"), ("optim.lrr=1,2", "did you mean optim.lr"),
    ("train.global_batch_size=32,33", "train.global_batch_size=33"),
])
def test_sweeps_that_mean_nothing(tmp_path, sweep, message):
    assert message in refused(*CPU, f"run.dir={tmp_path}/run", sweep=(sweep,))


def test_a_sweep_is_of_one_stage_and_of_what_the_array_holds(fake, tmp_path):
    assert "goes with one stage" in refused("run", f"run.dir={tmp_path}", sweep=("optim.lr=1,2",))
    fake.say(config="MaxArraySize = 3\n")
    (job,) = jobs(*CPU, f"run.dir={tmp_path}/run", sweep=("train.seed=1,2,3,4",))
    assert "points are more than the 3 that an array may have here" in str(limits.beyond(job)[0][0])


def test_gpus_of_sinfo(fake):
    assert [(one.count, one.gpus, one.usable) for one in slurm.nodes("gpu")] == [(6, {"h100": 8}, True), (2, {"a100": 4}, True), (2, {"h100": 8}, False)]
    assert [(one.gpus, one.usable) for one in slurm.nodes("lab")] == [({}, True), ({}, False)] and slurm.nodes("old")[0].gpus == {"": 2}


def test_what_is_said_after_submission(fake, tmp_path, capsys):
    assert front.run(["submit", *CPU, f"run.dir={tmp_path}/my run"]) == 0
    said = capsys.readouterr().out
    assert "submitted   pretrain: job 101" in said and f"log         tail -F '{tmp_path}/my run/slurm-101.log'" in said
    assert "squeue --jobs=101" in said and "scancel 101" in said and "2 ranks = 2 nodes x 1; DP 2 across nodes" in said
    assert fake.log() == [f"sbatch --parsable {tmp_path}/my run/pretrain.sbatch"]


# ---- a life of the job -------------------------------------------------------------------------------------------------------------------

def life(fake: FakeSlurm, script: Path, step: str, *, signal: str | None = None, **environment: str) -> tuple[int, str, list[str]]:
    """Runs a script as Slurm would, with `step` in the place of what srun starts. signal: sent to the script once the step says it is there."""
    fake.say(step=step, log="")
    there = fake.folder / "there"
    there.unlink(missing_ok=True)
    process = subprocess.Popen(["bash", str(script)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env={"PATH": os.environ["PATH"], "SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "n1,n2", "SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "0", **environment})
    if signal is not None:
        while not there.exists() and process.poll() is None:
            pass
        subprocess.run(["bash", "-c", f"kill -{signal} {process.pid}"], check=True)
    said = process.communicate(timeout=20)[0]
    return process.returncode, said, [line for line in fake.log() if not line.startswith("srun")]


def checkpoint(run: Path, step: int) -> None:
    (run / f"checkpoints/step_{step:08d}").mkdir(parents=True)
    (run / f"checkpoints/step_{step:08d}/manifest.json").touch()


@pytest.fixture
def script(fake, tmp_path) -> Path:
    assert front.run(["submit", *CPU, f"run.dir={tmp_path}/run", "cluster.max_restarts=4"]) == 0
    return tmp_path / "run/pretrain.sbatch"


OBEYS = 'trap "exit 75" USR1; touch "$FAKE/there"; for _ in {1..200}; do sleep 0.05; done; exit 9'


def obeys(fake: FakeSlurm) -> str:
    return f"FAKE={fake.folder}; {OBEYS}"


def test_how_a_life_ends(fake, script, tmp_path):
    assert life(fake, script, "exit 0")[0::2] == (0, [])
    assert life(fake, script, "exit 2")[0::2] == (2, [])  # bad input: never again
    code, said, told = life(fake, script, "exit 75")
    assert (code, told) == (0, ["scontrol requeue 42"]) and "requeued, the next life goes on from none" in said
    checkpoint(tmp_path / "run", 5)
    (tmp_path / "run/checkpoints/step_00000006.tmp-x").mkdir()
    assert "goes on from step_00000005" in life(fake, script, "exit 75", SLURM_RESTART_COUNT="3")[1]
    code, said, told = life(fake, script, "exit 75", SLURM_RESTART_COUNT="4")
    assert (code, told) == (75, []) and "cluster.max_restarts=4 are used up" in said
    assert life(fake, script, "exit 0", SLURM_RESTART_COUNT="5")[0::2] == (1, [])  # Slurm itself requeued it after a node failed


def test_signals_reach_the_ranks(fake, script):
    for signal in ("USR1", "TERM"):
        code, said, told = life(fake, script, obeys(fake), signal=signal)
        assert (code, told) == (0, ["scontrol requeue 42"]) and f"{signal}: telling the ranks" in said, said
    # srun kills the rest when the first rank has left: what was asked for still counts, and is no crash
    code, said, told = life(fake, script, obeys(fake).replace("exit 75", "exit 137"), signal="USR1")
    assert (code, told) == (0, ["scontrol requeue 42"]) and "told to stop by USR1" in said
    # a job that was cancelled stays cancelled
    fake.say(state="COMPLETING\n")
    code, said, told = life(fake, script, obeys(fake), signal="TERM")
    assert (code, told) == (75, []) and "the job is COMPLETING" in said


def test_a_failed_rank_has_the_word(fake, script, tmp_path):
    """srun says 143; the code that the first rank left is what counts."""
    told = tmp_path / "run/failures/42.0"
    told.mkdir(parents=True)
    for left, code, log in (("2", 2, []), ("75", 0, ["scontrol requeue 42"])):
        (told / "code").write_text(f"{left}\n")
        assert life(fake, script, "exit 143")[0::2] == (code, log)
    assert life(fake, script, "exit 0")[0] == 0
    assert life(fake, script, "exit 143", SLURM_RESTART_COUNT="1")[0::2] == (0, ["scontrol requeue 42"])  # another life: a crash


def test_crashes_without_progress_end_the_job(fake, script, tmp_path):
    codes = [life(fake, script, "exit 137")[0] for _ in range(3)]
    assert codes == [0, 0, 137]
    checkpoint(tmp_path / "run", 10)  # progress: it counts anew
    assert [life(fake, script, "exit 1")[0] for _ in range(3)] == [0, 0, 1]
    assert life(fake, script, "exit 1", SLURM_JOB_ID="43")[0] == 0  # submitted again after the bug was mended
    fake.say(requeue_code="1\n")
    assert life(fake, script, "exit 75", SLURM_JOB_ID="44")[0] == 75


def test_requeueing_can_be_turned_off(fake, tmp_path):
    words = [*CPU, f"run.dir={tmp_path}/run"]
    assert front.run(["submit", *words, "cluster.requeue=false"]) == 0
    script = tmp_path / "run/pretrain.sbatch"
    assert "no-requeue" in sbatch_options(script.read_text())
    assert life(fake, script, "exit 75")[0::2] == (75, []) and life(fake, script, "exit 7")[0::2] == (7, [])
    assert front.run(["submit", *words, "cluster.requeue_on_failure=false"]) == 0
    assert life(fake, script, "exit 75")[0::2] == (0, ["scontrol requeue 42"]) and life(fake, script, "exit 7")[0::2] == (7, [])


def test_a_point_of_an_array_requeues_itself_alone(fake, tmp_path):
    assert front.run(["submit", *CPU, f"run.dir={tmp_path}/run", "--sweep", "optim.lr=1e-3,2e-3"]) == 0
    array = {"SLURM_ARRAY_JOB_ID": "42", "SLURM_ARRAY_TASK_ID": "1"}
    assert life(fake, tmp_path / "run/pretrain-sweep.sbatch", "exit 75", **array)[0::2] == (0, ["scontrol requeue 42_1"])
    assert life(fake, tmp_path / "run/pretrain-sweep.sbatch", "exit 0", **(array | {"SLURM_ARRAY_TASK_ID": "7"}))[0] == 2


def test_what_runs_before_the_ranks(fake, tmp_path):
    assert front.run(["submit", *CPU[:1], "stages=pretrain", "cluster.nodes=1", "cluster.tasks_per_node=2", f"run.dir={tmp_path}/run"]) == 0
    script = tmp_path / "run/pretrain/pretrain.sbatch"
    fake.say(step="exit 0", log="")
    assert life(fake, script, "exit 0")[0] == 0
    assert next(line for line in fake.log() if "prepare" in line).startswith("srun --nodes=1 --ntasks=1 ") and len(fake.log()) == 2
    code, _, _ = life(fake, script, "exit 2")
    assert code == 2 and not any(" train " in line for line in fake.log())
