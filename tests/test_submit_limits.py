"""`submit`: more than the cluster or the disk has is refused before anything is submitted. Slurm's commands are fakes (fake_slurm.py)."""
import os
from types import SimpleNamespace

import pytest
from fake_slurm import CPU, GPU, FakeSlurm, jobs, without

from megatron_ext.cli import main as front
from megatron_ext.config.compose import compose
from megatron_ext.errors import UserError
from megatron_ext.submit import disk, limits, slurm


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


# ---- what the cluster has ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("words", "message"), [
    (("cluster.partition=gpus",), "cluster.partition=gpus: unknown here; did you mean gpu? this cluster has lab, gpu, old"),
    (("cluster.nodes=16",), "cluster.nodes=16: partition gpu gives a job at most 8 nodes"),
    (("cluster.time=3-00",), "cluster.time=3-00: is more than the 2 days 00:00:00 of partition gpu"),
    (("cluster.account=physics",), "cluster.account=physics: may not use partition gpu; it is for nlp, vision"),
    (("cluster.account=null",), "cluster.account=null: partition gpu is for nlp, vision: name one"),
    (("cluster.qos=fast",), "cluster.qos=fast: partition gpu takes normal, long"),
    (("cluster.constraint=nvl",), "cluster.constraint=nvl: partition gpu has 0 nodes with the feature nvl, and 1 are asked for"),
    (("cluster.gpus_per_node=16",), "cluster.gpus_per_node=16: partition gpu has 0 nodes with 16 GPUs, and 1 are asked for; its nodes have at most 8"),
    (("cluster.gpu_type=b200",), "nodes with 8 b200 GPUs, and 1 are asked for; its nodes have at most 0"),
    (("cluster.cpus_per_task=32",), "cluster.cpus_per_task=32: partition gpu has 0 nodes with 256 cores (8 tasks of 32), and 1 are asked for"),
    (("cluster.partition=old", "cluster.nodes=4", "cluster.gpus_per_node=2", "cluster.time=1:0:0"), "cluster.partition=old: takes no jobs now"),
    (("cluster.partition=old", "cluster.account=guests"), "cluster.account=guests: may not use partition old"),
    (("cluster.partition=lab", "cluster.gpus_per_node=0", "cluster.nodes=8", "cluster.cpus_per_task=1", "launch.device=cpu"),
     "cluster.nodes=8: partition lab has 4 nodes, and 8 are asked for"),
])
def test_more_than_the_cluster_has_is_refused(fake, tmp_path, words, message):
    (job,) = jobs(*without(GPU, words), f"run.dir={tmp_path}/run", *words)
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
    (job,) = jobs(*without(GPU, ("cluster.account=",)), f"run.dir={tmp_path}/run")
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


def test_gpus_of_sinfo(fake):
    assert [(one.count, one.gpus, one.usable) for one in slurm.nodes("gpu")] == [(6, {"h100": 8}, True), (2, {"a100": 4}, True), (2, {"h100": 8}, False)]
    assert [(one.gpus, one.usable) for one in slurm.nodes("lab")] == [({}, True), ({}, False)] and slurm.nodes("old")[0].gpus == {"": 2}


# ---- disk -----------------------------------------------------------------------------------------------------------------------------------

def test_checkpoints_are_as_large_as_is_said(tmp_path):
    """tiny with 2048 words: 4 layers of 4 x 256^2 + 3 x 256 x 704 + 512, two tables of 2048 x 256, a norm of 256 = 4,262,144 parameters, by hand.
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
    found = [str(error) for error in disk.problems([job])]
    assert bool(found) == refuses and all("free, and the run will hold up to" in text for text in found)
    if refuses:
        with pytest.raises(UserError):
            front.run(["submit", *CPU, f"run.dir={tmp_path}/run"])
        assert fake.log() == []


def test_a_directory_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (job,) = jobs(*CPU, "run.dir=/proc/sys/run")
    assert "run.dir=/proc/sys/run: cannot be written (/proc/sys: " in str(next(disk.problems([job])))
    with pytest.raises(UserError, match="is a file, or lies below one"):
        jobs(*CPU, f"run.dir={__file__}/run")
    (job,) = jobs(*CPU, f"run.dir={tmp_path}/a/b")
    assert list(disk.problems([job])) == [] and list(tmp_path.iterdir()) == []  # nothing stays behind


def test_all_runs_of_a_submission_share_the_disk(tmp_path, monkeypatch):
    """Five stages of tiny: pretrain in bf16 (14 bytes a parameter), adapt, sft and reward in fp32 (12), ppo with a critic as large as the policy (24); each up to
    three checkpoints and one in the making."""
    stages = jobs("run", "cluster=slurm_cpu", "cluster.nodes=1", "cluster.tasks_per_node=2", f"run.dir={tmp_path}/run")
    want = 4 * (14 + 12 + 12 + 12 + 24) * 4_262_144
    for free, number in ((want, 0), (want - 1, 1)):
        monkeypatch.setattr(os, "statvfs", lambda _, free=free: SimpleNamespace(f_bavail=free, f_frsize=1))
        found = [str(error) for error in disk.problems(stages)]
        assert len(found) == number and all("and 5 runs will hold up to" in text for text in found)
