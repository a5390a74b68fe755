"""Training as jobs of a real Slurm, on the virtual nodes of slurm/lab: whatever happens to a job on its way, its losses are those of a run to which
nothing happened, to the last bit. Jobs are made by `python -m megatron_ext submit`, as users make them; the undisturbed runs by `train`, outside of Slurm.
"""
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from slurm_lab import Job, Lab
from small import TINY, losses, records, train

TWO = ("cluster=slurm_cpu", "cluster.time=10", "cluster.signal_lead=30")  # two nodes, one rank each
STEPS = ("train.steps=40", "train.global_batch_size=16", "train.micro_batch_size=2", "checkpoint.keep=0", "launch.device=cpu")
# What the recipe of the chain sets otherwise.
PLAIN = ("parallel=single", "precision=fp32", "train.tokens=null", "optim.min_lr=1e-4", "checkpoint.best=false")
OFTEN, ON_SIGNAL = "checkpoint.every=5", "checkpoint.every=0"


def words(run: Path, data: Path, *more: str) -> list[str]:
    last = {word.split("=")[0]: word for word in (*TINY, *STEPS, *PLAIN, *TWO, f"data.path={data}", f"run.dir={run}", *more)}
    return list(last.values())


def identical(run: Path, reference: Path) -> None:
    assert losses(run) == losses(reference)


@pytest.fixture(scope="module")
def reference(small_data, tmp_path_factory) -> Path:
    """Two data-parallel ranks, undisturbed."""
    run = tmp_path_factory.mktemp("reference") / "run"
    train(run, small_data, *STEPS, *PLAIN, "launch.ranks=2")
    assert len(losses(run)) == 40
    return run


def told_to_stop(job: Job, *command: str) -> None:
    """In mid-training."""
    job.until(lambda: job.steps() >= 3)
    job.lab.run(*command)


# ---- the chain --------------------------------------------------------------------------------------------------------------------


def test_stages_follow_one_another_and_each_starts_from_the_one_before(lab: Lab, reference, small_data, tmp_path):
    """Two stages over two nodes by srun; the second one waits for the first. One fake GPU a node, so that Slurm hands out devices."""
    stages = [f"adapt:data.path={small_data}", "adapt:train.steps=4", "adapt:data.weights=[]"]
    pretrain, adapt = lab.submit("run", *words(tmp_path / "chain", small_data, "run.stages=[pretrain,adapt]", "cluster.gpus_per_node=1"), *stages)
    assert "afterok" in lab.show(adapt.number)["Dependency"] and adapt.state == "PENDING"
    pretrain.ends()
    assert lab.show(pretrain.number)["NumNodes"] == "2"
    identical(pretrain.run, reference)

    alone = tmp_path / "adapt"
    train(alone, small_data, *STEPS, *PLAIN, "stage=adapt", "train.steps=4", f"checkpoint.start={reference}", "launch.ranks=2")
    adapt.ends()
    identical(adapt.run, alone)
    assert len(losses(alone)) == 4 and records(adapt.run, "events")[0]["checkpoint"].startswith(str(pretrain.run))


def test_bad_input_is_told_once_not_tried_again_and_ends_the_chain(lab: Lab, small_data, tmp_path):
    """What was right at submission: the data has gone by the time that the job starts."""
    data = tmp_path / "data"
    data.symlink_to(small_data)
    stages = ["adapt:train.steps=4", f"adapt:data.path={data}", "adapt:data.weights=[]", "cluster.options=[--begin=now+3]"]
    pretrain, adapt = lab.submit("run", *words(tmp_path / "chain", data, "run.stages=[pretrain,adapt]"), *stages)
    data.unlink()
    pretrain.ends("FAILED")
    adapt.ends("CANCELLED", 60)
    said = pretrain.said()
    assert len(re.findall(r"(?m)^error: data\.", said)) == said.count("\nerror: ") == 1 and "Traceback" not in said
    assert "bad input; not tried again" in said
    assert lab.show(pretrain.number)["ExitCode"] == "2:0" and pretrain.restarts == 0


# ---- told to stop ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_usr1_saves_requeues_and_resumes(lab: Lab, reference, small_data, tmp_path, launcher):
    (job,) = lab.submit(*words(tmp_path / "run", small_data, ON_SIGNAL, f"cluster.launcher={launcher}"))
    told_to_stop(job, "scancel", "--batch", "--signal=USR1", job.number)
    job.until(lambda: job.restarts == 1)
    job.ends()
    begun = job.lives()
    assert len(begun) == 2 and begun[0] == 0 and 3 <= begun[1] < 40  # nothing but the signal has saved
    assert "Traceback" not in job.said() and "unfinished; requeued, the next life goes on from step_" in job.said()
    identical(job.run, reference)


def test_scancel_ends_it_for_good_and_the_same_script_goes_on(lab: Lab, reference, small_data, tmp_path):
    (job,) = lab.submit(*words(tmp_path / "run", small_data, ON_SIGNAL, "cluster.launcher=torchrun"))
    told_to_stop(job, "scancel", job.number)
    job.ends("CANCELLED")
    until = time.monotonic() + 60
    while lab.processes(str(job.run)) and time.monotonic() < until:
        time.sleep(0.1)
    job.lab.run("sleep", 1)
    assert job.restarts == 0 and lab.processes(str(job.run)) == [] and len(losses(job.run)) < 40 and "Traceback" not in job.said()
    again = Job(lab, lab.run("sbatch", "--parsable", job.script).strip(), job.script, job.log, job.runs)
    again.log = Path(str(job.log).replace(job.number, again.number))
    again.ends()
    assert len(again.lives()) == 2 and again.lives()[1] >= 3  # SIGTERM has saved
    identical(job.run, reference)


# ---- lost nodes --------------------------------------------------------------------------------------------------------------------

LIVES = """
import os, sys, time
from pathlib import Path
from megatron_ext.parallel import lease, slurm
life = slurm.restarts(os.environ)
with lease.hold(Path(sys.argv[1])), open(sys.argv[1] + "/lives", "a", buffering=1) as log:
    for step in range(10_000):  # until it is told to leave, however late Slurm believes that its node is gone
        log.write(f"{life} {time.time()}\\n")
        if life and step > 60:
            sys.exit(0)
        time.sleep(0.1)
"""


def test_lost_nodes(lab: Lab, reference, small_data, tmp_path):
    """Two jobs, since Slurm takes half a minute to believe that a node is gone. One trains on two nodes, of which the second crashes. Of the other's
    node only the daemon dies, so that its process lives on while the job starts anew elsewhere: it must leave before the next life begins to work,
    and its batch script must leave the next life alone. (That one trains nothing.)"""
    (job,) = lab.submit(*words(tmp_path / "run", small_data, OFTEN))
    shared, python = tmp_path / "shared", tmp_path / "python"
    (tmp_path / "lives.py").write_text(LIVES)
    python.write_text(f"#!/bin/sh\nexec {sys.executable} {tmp_path}/lives.py {shared}\n")
    python.chmod(0o755)
    job.until(lambda: job.state == "RUNNING")
    first, second = lab.run("scontrol", "show", "hostnames", lab.show(job.number)["NodeList"]).split()
    (orphan,) = lab.submit(*words(shared, small_data, "cluster.nodes=1", f"cluster.exclude={first},{second}", f"cluster.python={python}"))
    try:
        orphan.until(lambda: (shared / "lives").exists())
        lab.kill_daemon(lab.show(orphan.number)["NodeList"])
        job.until(lambda: job.steps() >= 7)
        lab.crash(second)
        job.until(lambda: job.restarts >= 1)
        orphan.ends()
        job.ends()
    finally:
        lab.revive()
    lives = [(int(life), float(when)) for life, when in (line.split() for line in (shared / "lives").read_text().splitlines())]
    assert {life for life, _ in lives} == {0, 1} and lives == sorted(lives)  # the first one has not written once the second one had begun
    assert orphan.restarts == 1  # "it is told to leave", unless its next heartbeat comes before that can be said
    assert re.search(r"life 1, .*the job has begun anew without it", orphan.said()) and orphan.said().count(": done") == 1

    begun = job.lives()
    assert len(begun) == 2 and begun[1] >= 5 and begun[1] % 5 == 0 and "Traceback" not in job.said()
    assert "lost a peer, and no rank says why: one was killed, or its node is gone" in job.said()
    identical(job.run, reference)


# ---- arrays ------------------------------------------------------------------------------------------------------------------------


def test_an_array_is_as_many_runs(lab: Lab, small_data, tmp_path):
    """One rank each, so that both run at once."""
    fixed = [word for word in words(tmp_path / "sweep", small_data, "cluster.nodes=1", "train.steps=10") if not word.startswith("optim.lr=")]
    (array,) = lab.submit("--sweep", "optim.lr=0.002,0.0005", *fixed)
    alone = []
    for lr in ("0.002", "0.0005"):
        alone.append(tmp_path / f"lr{lr}")
        train(alone[-1], small_data, *STEPS, *PLAIN, "train.steps=10", f"optim.lr={lr}")
    for index, reference in enumerate(alone):
        Job(lab, f"{array.number}_{index}", array.script, array.log, array.runs[index:]).ends()
        identical(array.runs[index], reference)
    assert losses(alone[0]) != losses(alone[1])


def test_nothing_is_left(lab: Lab):
    """No job of these tests is still in the queue, and Slurm is well."""
    assert lab.run("squeue", "--noheader", "--format=%i") == ""
    assert subprocess.run(["scontrol", "ping"], env=lab.environment, capture_output=True, check=False, timeout=10).returncode == 0
