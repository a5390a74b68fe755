"""`submit`: the script. What sbatch, srun and bash make of it, and how a life of the job ends. Slurm's commands are fakes (fake_slurm.py)."""
import os
import shlex
from pathlib import Path

import pytest
from fake_slurm import CPU, GPU, FakeSlurm, jobs, life, sbatch_options, shell

from megatron_ext.cli import main as front
from megatron_ext.submit.render import script as script_of


@pytest.fixture
def fake(tmp_path, monkeypatch) -> FakeSlurm:
    found = FakeSlurm.make(tmp_path)
    monkeypatch.setenv("PATH", f"{found.bin}:/usr/bin:/bin")
    return found


# ---- the script -----------------------------------------------------------------------------------------------------------------------------

def test_what_slurm_is_told(tmp_path):
    (job,) = jobs(*GPU, "cluster.nodes=4", "cluster.min_nodes=2", "cluster.gpu_type=h100", "cluster.qos=long", "cluster.constraint=ib&h100",
                  "cluster.exclude=n[3,17]", "cluster.reservation=big day", "cluster.comment=it's #1",
                  "cluster.options=[--switches=1,--licenses=a b]", f"run.dir={tmp_path}/50%")
    text = script_of(job)
    assert sbatch_options(text) == {
        "job-name": "pretrain", "nodes": "2-4", "mincpus": "64", "gpus-per-node": "h100:8", "mem": "0",
        "partition": "gpu", "account": "nlp", "qos": "long", "time": "1-00:00:00", "constraint": "ib&h100", "exclude": "n[3,17]",
        "reservation": "big day", "comment": "it's #1", "chdir": os.getcwd(), "output": f"{tmp_path}/50%%/slurm-%j.log", "open-mode": "append",
        "signal": "B:USR1@600", "mail-type": "NONE", "requeue": "", "exclusive": "", "switches": "1", "licenses": "a b",
    }
    assert "# 32 ranks = 4 nodes x 8; DP 32 across nodes" in text
    (job,) = jobs(*GPU, "cluster.nodes=4", "cluster.launcher=torchrun", f"run.dir={tmp_path}/run")
    fixed = sbatch_options(script_of(job))
    assert (fixed["nodes"], fixed["ntasks-per-node"], fixed["cpus-per-task"]) == ("4", "1", "64") and "mincpus" not in fixed


def test_hostile_values_reach_the_ranks_as_they_are(tmp_path, fake):
    """bash itself says what it makes of the script."""
    hostile = "$(touch pwned) `id` 'q' \"d\" ; & | < > * ~ 한국어 #"
    (job,) = jobs(*CPU, f"run.dir={tmp_path}/{hostile}", f"cluster.env=[FABRIC={hostile}]", f"cluster.comment=\\ {hostile}", "cluster.launcher=torchrun")
    said = shell(script_of(job), tail='printf "%s\\0" "$run_dir" "$FABRIC" "${words[@]}"').split("\0")[:-1]
    assert said[0] == str(tmp_path / hostile) and said[1] == hostile and said[2:] == list(job.runs[0].words)
    assert f"run.dir={tmp_path}/{hostile}" in said and "checkpoint.load=auto" in said
    assert not Path("pwned").exists() and sbatch_options(script_of(job))["comment"] == f"\\ {hostile}"


@pytest.mark.parametrize(("words", "wanted"), [
    ((), "--ntasks=6 --ntasks-per-node=2 --cpus-per-task=3 --distribution=block --kill-on-bad-exit=1 PY -m megatron_ext train"),
    (("cluster.container=pyxis", "cluster.image=nvcr.io#nvidia/pytorch:25.09-py3", "cluster.mounts=[/data,/scratch/me:/scratch:ro]"),
     "--container-image=nvcr.io#nvidia/pytorch:25.09-py3 --container-mounts=/data:/data,/scratch/me:/scratch:ro,CWD:CWD,RUN:RUN"),
    (("cluster.container=apptainer", "cluster.image=my image.sif"),
     "--kill-on-bad-exit=1 apptainer exec --bind=CWD:CWD --bind=RUN:RUN --pwd=CWD my image.sif PY -m"),
    (("cluster.launcher=torchrun",), "--ntasks=3 --ntasks-per-node=1 --cpus-per-task=6 --distribution=block --kill-on-bad-exit=1 bash -c"),
])
def test_how_ranks_are_started(tmp_path, fake, words, wanted):
    (job,) = jobs(*CPU, "cluster.nodes=3", "cluster.tasks_per_node=2", "cluster.cpus_per_task=3", "cluster.python=PY", f"run.dir={tmp_path}/run",
                  "train.global_batch_size=48", *words)
    fake.say(step="exit 0")
    shell(script_of(job), tail="MASTER_ADDR=n1 port=2000 nodes=3; launch; wait")
    told = " ".join(shlex.split(*fake.log()))
    assert told.startswith("srun --nodes=3 --relative=0 ") and wanted.replace("CWD", os.getcwd()).replace("RUN", f"{tmp_path}/run") in told
    if "cluster.launcher=torchrun" in words:
        assert "-m megatron_ext.parallel.torchrun --nnodes=3 --nproc-per-node=2 --master-addr=n1 --master-port=2000 --max-restarts=0 -m megatron_ext" in told


def test_modules_files_and_threads(tmp_path, fake):
    (tmp_path / "env.sh").write_text("export FROM_FILE=$FROM_MODULE-and-file\n")
    (job,) = jobs(*CPU, f"run.dir={tmp_path}/run", "cluster.modules=[cuda/12.8,nccl]", f"cluster.source=[{tmp_path}/env.sh]", "launch.threads=5",
                  "cluster.env=[NCCL_DEBUG=INFO]")
    module = 'module() { [ "$1" = load ] && FROM_MODULE="$2+$3"; }; '
    text = script_of(job).replace("#!/bin/bash", module, 1)
    said = shell(text, tail='echo "$FROM_FILE $OMP_NUM_THREADS $NCCL_DEBUG ${RANK:-none}"', RANK="3")
    assert said == "cuda/12.8+nccl-and-file 5 INFO none\n"


# ---- a life of the job -------------------------------------------------------------------------------------------------------------------

def checkpoint(run: Path, step: int) -> None:
    (run / f"checkpoints/step_{step:08d}").mkdir(parents=True)
    (run / f"checkpoints/step_{step:08d}/manifest.json").touch()


@pytest.fixture
def script(fake, tmp_path) -> Path:
    assert front.run(["submit", *CPU, f"run.dir={tmp_path}/run", "cluster.max_restarts=4"]) == 0
    return tmp_path / "run/pretrain.sbatch"


OBEYS = 'trap "exit 75" USR1; touch "$FAKE/there"; for _ in {1..1200}; do sleep 0.05; done; exit 9'


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
    for name in ("USR1", "TERM"):
        code, said, told = life(fake, script, OBEYS, signals=[f"SIG{name}"])
        assert (code, told) == (0, ["scontrol requeue 42"]) and f"{name}: telling the ranks" in said, said
    # srun kills the rest when the first rank has left: what was asked for still counts, and is no crash
    code, said, told = life(fake, script, OBEYS.replace("exit 75", "exit 137"), signals=["SIGUSR1"])
    assert (code, told) == (0, ["scontrol requeue 42"]) and "told to stop by USR1" in said
    # a job that was cancelled stays cancelled
    fake.say(state="COMPLETING None\n")
    code, said, told = life(fake, script, OBEYS, signals=["SIGTERM"])
    assert (code, told) == (75, []) and "the job is COMPLETING" in said
    # a job whose ranks were too slow to save before the limit comes back, unless that goes on without a new checkpoint
    slow = 'told=0; trap "" TERM; trap "((++told)); touch \"$FAKE/there\"" USR1; touch "$FAKE/there"; for _ in {1..1200}; do sleep 0.05; ((told < 2)) || exit; done'
    fake.say(state="COMPLETING TimeLimit\n")
    ends = [life(fake, script, slow, signals=["SIGUSR1", "SIGTERM"]) for _ in range(3)]
    assert [code for code, *_ in ends] == [0, 0, 75] and ends[0][2] == ["scontrol requeue 42"] and "a longer cluster.signal_lead" in ends[0][1]


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


def test_nodes_that_the_layout_does_not_fit_are_idle(fake, tmp_path):
    """A batch of 8: three nodes of the four that were asked for are two."""
    words = [*CPU, f"run.dir={tmp_path}/run", "cluster.nodes=4", "cluster.min_nodes=1", "train.global_batch_size=8", "train.micro_batch_size=1"]
    assert front.run(["submit", *words]) == 0
    for hosts, used in (("n1", 1), ("n1,n2,n3", 2), ("n1,n2,n3,n4", 4)):
        code, said, _ = life(fake, tmp_path / "run/pretrain.sbatch", "exit 0", SLURM_JOB_NODELIST=hosts)
        assert code == 0 and f"srun --nodes={used} --relative=0 --ntasks={used} " in fake.log()[0]
        assert ("the layout fits 2 of the 3 nodes; the others are idle" in said) == (used == 2)


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


def test_a_node_that_falls_short_is_left_out(fake, tmp_path):
    assert front.run(["submit", *CPU, f"run.dir={tmp_path}/run", "cluster.node_check=true", "cluster.max_restarts=2"]) == 0
    script, bad = tmp_path / "run/pretrain.sbatch", f"echo n2 >{tmp_path}/run/node_check.bad; exit 1"
    code, said, told = life(fake, script, bad)
    assert (code, told) == (0, ["scontrol requeue 42", "scontrol update JobId=42 ExcNodeList=n7,n2"]), said
    check = next(line for line in fake.log() if "node_check" in line)
    assert check.startswith("srun --nodes=2 --ntasks=2 ") and "--kill-on-bad-exit=0" in check and check.endswith(f"--device cpu --dir {tmp_path}/run")
    assert life(fake, script, bad, SLURM_RESTART_COUNT="2")[0::2] == (1, [])
    code, _, told = life(fake, script, "exit 0")
    assert code == 0 and [" train " in line for line in fake.log()] == [False, True]
