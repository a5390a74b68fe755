"""The node check in a job of a real Slurm: a node that falls short is named, the job requeued without it, and goes on. And the acceptance test as a job."""
import json
import sys
import time
from pathlib import Path

from slurm_lab import ROOT, Lab

# On one node the run directory is another one: something is mounted over it, as on a node whose shared file system is not there.
BATCH = '''#!/bin/bash
#SBATCH --job-name=checked --nodes=2 --ntasks-per-node=1 --cpus-per-task=1 --time=5 --requeue --open-mode=append
set -euo pipefail
export OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=lo
source {root}/megatron_ext/contact/hook.sh
echo "life ${{SLURM_RESTART_COUNT:-0}} on $SLURM_JOB_NODELIST"
check_nodes {run} 2 srun --kill-on-bad-exit=0 unshare --mount bash -c \
    'if [ "$SLURMD_NODENAME" = vn2 ]; then mount -t tmpfs none {run}; fi; exec "$@"' \
    check {python} -m megatron_ext.contact.node_check --dir {run} --device cpu --seconds 0.02 --file 1 --gemm-share 0 --pair-share 0
echo "goes on without the bad node"
'''


def ended(lab: Lab, number: str, seconds: float) -> dict[str, str]:
    end = time.monotonic() + seconds
    while (job := lab.show(number))["JobState"] not in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"):
        assert time.monotonic() < end, f"job {number}: {job['JobState']}, {job['Reason']}"
        time.sleep(0.5)
    return job


def test_a_bad_node_is_left_out_of_the_next_life(lab: Lab, tmp_path):
    run, script, log = tmp_path / "run", tmp_path / "job.sbatch", tmp_path / "job.log"
    run.mkdir()
    script.write_text(BATCH.format(root=ROOT, run=run, python=sys.executable))
    number = lab.run("sbatch", "--parsable", f"--chdir={ROOT}", f"--output={log}", "--nodelist=vn[1-2]", "--exclude=vn4", script).strip()
    # Pinned only to begin there: a job that stays pinned to a bad node could not go on.
    job = ended_or_pending(lab, number, 240)
    assert job["ReqNodeList"] == "vn[1-2]", job
    lab.run("scontrol", "update", f"JobId={number}", "ReqNodeList=")
    job = ended(lab, number, 300)
    said = log.read_text()
    assert job["JobState"] == "COMPLETED" and job["Restarts"] == "1", said
    assert job["NodeList"] == "vn[1,3]" and set(job["ExcNodeList"].split(",")) == {"vn2", "vn4"}, job
    assert "bad   vn2: what rank 0 wrote to the run directory is not seen here" in said and f"job {number} will not run on vn4,vn2 again" in said
    assert said.count("goes on") == 1 and said.splitlines()[-1] == "goes on without the bad node"
    verdict = json.loads((run / "node_check.json").read_text())
    assert verdict["good"] and verdict["nodes"] == ["vn1", "vn3"] and not (run / "node_check.bad").exists()


def ended_or_pending(lab: Lab, number: str, seconds: float) -> dict[str, str]:
    """The job once it waits for its second life."""
    end = time.monotonic() + seconds
    while not ((job := lab.show(number))["JobState"] == "PENDING" and job["Restarts"] == "1"):
        assert job["JobState"] in ("PENDING", "RUNNING", "COMPLETING"), job
        assert time.monotonic() < end, job
        time.sleep(0.5)
    return job


def test_acceptance_as_a_job(lab: Lab, tmp_path):
    log: Path = tmp_path / "acceptance.log"
    number = lab.run("sbatch", "--parsable", f"--output={log}", "--cpus-per-task=1", "--export=ALL,OMP_NUM_THREADS=1,GLOO_SOCKET_IFNAME=lo,PYTHON="
                     f"{sys.executable},ACCEPTANCE_DIR={tmp_path}/run,ACCEPTANCE_ARGS=--device cpu --checks collectives bandwidth --limit 60,"
                     "NODE_CHECK_ARGS=--device cpu --seconds 0.02 --file 1 --gemm-share 0", f"--chdir={ROOT}", ROOT / "slurm" / "acceptance.sbatch").strip()
    job = ended(lab, number, 500)
    said = log.read_text()
    assert job["JobState"] == "COMPLETED", said
    assert "node check: good" in said and "acceptance: all good" in said and "2 rank(s) on 2 node(s), CPU, gloo" in said
    assert "across nodes" in said
