"""Agents of two nodes end together, whichever of them does not get a turn at the end; and what a rank's failure leaves behind."""
import os
import re
import subprocess
import sys
from pathlib import Path

from megatron_ext.parallel.job import held_port

ROOT = Path(__file__).resolve().parent.parent
# Node 1's process is not scheduled between its check-in at the last barrier and its look at whether that is full: for LATE seconds, or until node 0 has gone.
LATE = """
import os, runpy, sys, time
from torch.distributed.elastic.utils import store
inner = store._barrier_nonblocking
def late(**settings):
    key = inner(**settings)
    if os.environ["PET_NODE_RANK"] == "1" and "terminal" in key:
        end = time.monotonic() + float(os.environ["LATE"])
        while time.monotonic() < end and os.path.exists("/proc/" + os.environ["FIRST"]):
            time.sleep(0.05)
    return key
store._barrier_nonblocking = late
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
# Says the pid of its rank once it has it; torch's agent that is told to stop before leaves the rank behind.
WATCHES = """
import runpy, sys
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent as Agent
inner = Agent._monitor_workers
def once(self, group):
    print(*self._pcontext.pids().values(), flush=True)
    Agent._monitor_workers = inner
    return inner(self, group)
Agent._monitor_workers = once
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def agents(module: str, *program: str, late: float = 2) -> list[subprocess.CompletedProcess]:
    """Of node 0 and node 1, as `submit` starts them. late: seconds, for which node 1 gets no turn."""
    both: list[subprocess.Popen] = []
    with held_port() as port:
        words = [module, "--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}", "--max-restarts=0", "--no-python", *program]
        for node in (0, 1):
            more = {"PET_NODE_RANK": str(node), "OMP_NUM_THREADS": "1", "LATE": str(late), "FIRST": str(both[0].pid) if both else ""}
            both.append(subprocess.Popen([sys.executable, "-W", "ignore", "-c", LATE, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                         cwd=ROOT, env={**os.environ, **more}))
        try:
            said = [each.communicate(timeout=240) for each in both]
        finally:
            for each in both:
                each.kill()
    return [subprocess.CompletedProcess(each.args, each.returncode, *texts) for each, texts in zip(both, said, strict=True)]


def test_a_late_agent_finds_the_store_still_there():
    first, second = agents("megatron_ext.parallel.torchrun", "true")
    assert (first.returncode, second.returncode) == (0, 0) and first.stderr == second.stderr == ""


def test_torchrun_alone_still_needs_it():
    """Once this fails, torch has mended it, and the module can go."""
    first, second = agents("torch.distributed.run", "true", late=60)
    assert (first.returncode, second.returncode) == (0, 0) and "Error waiting on exit barrier" in second.stderr and "Traceback" in second.stderr


def test_a_failure_is_one_line_of_ours(tmp_path):
    """Both ranks run before either fails: an agent that has nobody left to meet ends for that reason."""
    program = f"touch {tmp_path}/$RANK; until [ -e {tmp_path}/0 ] && [ -e {tmp_path}/1 ]; do sleep 0.05; done; [ $RANK = 1 ] || exit 7; kill -KILL $BASHPID"
    both = agents("megatron_ext.parallel.torchrun", "bash", "-c", program)
    for node, (each, code, told) in enumerate(zip(both, (7, 137), ("ended with exit code 7", "was ended by SIGKILL"), strict=True)):
        said = [line for line in each.stderr.splitlines() if not re.match(r"[EW]\d{4} ", line)]  # torch's log
        assert each.returncode == code and len(said) == 1 and re.fullmatch(rf"torchrun: rank {node} \(node {node}, local rank 0, pid \d+\) {told}", said[0]), each


def test_told_to_stop_it_says_so_and_ends_its_ranks():
    words = ["megatron_ext.parallel.torchrun", "--nnodes=1", "--nproc-per-node=1", "--max-restarts=0", "--no-python", "sleep", "600"]
    started = subprocess.Popen([sys.executable, "-W", "ignore", "-c", WATCHES, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    rank = Path("/proc", started.stdout.readline().strip())
    assert (rank / "comm").read_text() == "sleep\n"
    started.terminate()
    said = started.communicate(timeout=240)[1]
    assert started.returncode == 143 and "torchrun: ended by SIGTERM" in said and "Traceback" not in said and not rank.exists()
