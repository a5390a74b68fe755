"""`submit` against a real Slurm (slurm/lab): what it has not is refused before, and names that hurt shells reach sbatch and the ranks whole.

A shell script stands in the place of Python: nothing is trained here.
"""
import json
import subprocess
import sys
from pathlib import Path

import pytest
from fake_slurm import CPU, without
from slurm_lab import Job, Lab

HURTS = "50% $(id) `id` 'q' \"d\" ; & 한국어 #1"


def refusal(lab: Lab, *words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "megatron_ext", "submit", *words], env=lab.environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2 and done.stdout == "", done.stdout + done.stderr
    return done.stderr


@pytest.mark.parametrize(("words", "message"), [
    (("cluster.partition=long",), "error: cluster.partition=long: unknown here; this cluster has lab, short"),
    (("cluster.nodes=8", "train.global_batch_size=64"), "error: cluster.nodes=8: partition lab has 4 nodes, and 8 are asked for"),
    (("cluster.partition=short", "cluster.nodes=1", "cluster.time=30"), "error: cluster.time=30: is more than the 00:05:00 of partition short"),
    (("cluster.tasks_per_node=null", "cluster.gpus_per_node=8", "launch.device=auto", "train.global_batch_size=128"),
     "error: cluster.gpus_per_node=8: partition lab has 0 nodes with 8 GPUs, and 2 are asked for; its nodes have at most 4"),
    (("cluster.cpus_per_task=5",), "nodes with 5 cores (1 tasks of 5), and 2 are asked for; its nodes have at most 4 cores"),
    (("cluster.reservation=maintenance",), "error: cluster.reservation=maintenance: Slurm refuses job pretrain: "),
])
def test_more_than_it_has(lab: Lab, tmp_path, words, message):
    assert message in refusal(lab, *without(CPU, words), f"run.dir={tmp_path}/run", *words)
    assert lab.run("squeue", "--noheader", "--states=all", "--format=%Z %o").count(str(tmp_path)) == 0


def test_names_that_hurt_and_an_array_whose_first_point_comes_back(lab: Lab, tmp_path):
    """The first point ends unfinished in its first life: it alone is requeued, and goes on in the same log."""
    python = tmp_path / "python"
    python.write_text(f"""#!/bin/bash
printf '%s\\0' "$@" >"{tmp_path}/words.$SLURM_ARRAY_TASK_ID.$SLURM_PROCID"
[ "$SLURM_ARRAY_TASK_ID$SLURM_RESTART_COUNT" = 0 ] && exit 75
exit 0
""")
    python.chmod(0o755)
    run = tmp_path / HURTS
    (array,) = lab.submit(*CPU, f"run.dir={run}", f"cluster.python={python}", f"cluster.comment={HURTS}", "cluster.nodes=1", "--sweep", "optim.lr=1e-3,2e-3")
    (second,) = [point for point in json.loads((run / "sweep.json").read_text()) if point["index"] == 1]
    logs = [run / f"slurm-{array.number}_{index}.log" for index in (0, 1)]
    points = [Job(lab, f"{array.number}_{index}", array.script, log, [run]) for index, log in enumerate(logs)]
    points[0].until(lambda: points[0].restarts == 1, seconds=60)
    for point in points:
        point.ends(seconds=60)
        assert point.said().rstrip().endswith(": done")
    assert (tmp_path / "words.1.0").read_bytes().decode().split("\0")[:-1] == ["-m", "megatron_ext", "train", *second["words"]]
    assert f"run.dir={run}/001_lr-2e-3" in second["words"] and Path(second["run.dir"]).is_dir()
    said = logs[0].read_text()
    assert f"job {array.number}_0, life 1" in said and "unfinished; requeued" in said and f"job {array.number}_0, life 2" in said
    assert "life 2" not in logs[1].read_text() and HURTS in lab.run("scontrol", "show", "job", array.number)


def test_a_restart_takes_fewer_nodes_where_it_may(lab: Lab, tmp_path):
    """Four nodes in the first life; two of them are taken away, and the second one starts on what is left."""
    python = tmp_path / "python"
    python.write_text("""#!/bin/bash
trap 'exit 75' USR1
echo "rank $SLURM_PROCID of $SLURM_STEP_NUM_TASKS on $SLURMD_NODENAME, life ${SLURM_RESTART_COUNT:-0}"
[ -n "$SLURM_RESTART_COUNT" ] && exit 0
for _ in {1..600}; do sleep 0.1; done
""")
    python.chmod(0o755)
    (job,) = lab.submit(*CPU, f"run.dir={tmp_path}/run", f"cluster.python={python}", "cluster.nodes=4", "cluster.min_nodes=2", "cluster.tasks_per_node=2",
                        "train.micro_batch_size=1")
    job.until(lambda: job.said().count(", life 0") == 8)
    lab.run("scontrol", "update", "nodename=vn[2,4]", "state=drain", "reason=test")
    try:
        lab.run("scancel", "--batch", "--signal=USR1", job.number)
        job.ends(seconds=60)
    finally:
        lab.run("scontrol", "update", "nodename=vn[2,4]", "state=resume")
    second = {line for line in job.said().splitlines() if line.endswith(", life 1")}
    assert second == {f"rank {rank} of 4 on {node}, life 1" for rank, node in enumerate(("vn1", "vn1", "vn3", "vn3"))}
