"""Ranks that srun or torchrun started: who they are, and what they tell when one of them fails. Real processes with those launchers' environments, no torch.

The launchers themselves: tests/test_slurm.py.
"""
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from megatron_ext.errors import UserError
from megatron_ext.parallel import failures, slurm
from megatron_ext.parallel.failures import Failures, is_lost_peer

ROOT = Path(__file__).resolve().parent.parent

PROBE = """
import os, signal, sys, time
from dataclasses import replace
from megatron_ext.config.schema import Config, RunConfig
from megatron_ext.errors import UserError
from megatron_ext.parallel import launch

what, words = sys.argv[1], sys.argv[2:]

def body():
    rank = int(os.environ["RANK"])
    if what == "early" and rank == 1:  # before the configuration is known
        raise UserError("data.path", "x", "is not on this node")
    if what == "early":
        time.sleep(1)
    return launch.in_ranks(replace(Config(), run=RunConfig(dir=words[0].partition("=")[2])), [], lambda: at_work(rank))

def fails():  # when it does: how long the others take from there
    open(os.environ["MEGATRON_EXT_RUN_DIR"] + ".failed", "w").close()

def at_work(rank):
    if what == "raise_1":
        if rank == 1:
            time.sleep(0.5)
            raise KeyError("the true cause, wandb_api_key=0123456789abcdef0123")
        while not os.path.exists(os.environ["MEGATRON_EXT_RUN_DIR"] + "/failures"):
            time.sleep(0.02)
        raise RuntimeError("[pair.cc:553] Connection closed by peer [10.0.0.1]:4711")
    if what == "hang_0":
        if rank == 1:
            fails()
            raise KeyError("the true cause")
        time.sleep(60)
    if what == "user_error":
        raise UserError("data.path", "x", "is wrong on every rank")
    if what == "kill_1":
        if rank == 1:
            fails()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.3)
        raise ConnectionResetError("Connection reset by peer")
    if what == "port" and rank == 0:
        raise RuntimeError("The server socket has failed to listen. port: 20000, code: -98, name: EADDRINUSE")
    if what in ("port", "early"):
        time.sleep(60)
    return 75 if what == "unfinished" else 0

sys.exit(launch.guarded(body, words))
"""


@pytest.fixture(scope="module")
def probe(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("failures") / "probe.py"
    file.write_text(textwrap.dedent(PROBE))
    return file


def srun(rank: int, ranks: int, restart: int = 0) -> dict[str, str]:
    found = {"SLURM_JOB_ID": "12", "SLURM_STEP_ID": "3", "SLURM_PROCID": str(rank), "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": str(ranks),
             "SLURM_STEP_NODELIST": "n[1-3]", "SLURM_NODEID": str(rank), "SLURM_STEP_TASKS_PER_NODE": f"1(x{ranks})"}
    return found | ({"SLURM_RESTART_COUNT": str(restart)} if restart else {})


def torchrun(rank: int, ranks: int) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "MASTER_ADDR": "n1", "MASTER_PORT": "1",
            "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0"}


def run(probe: Path, what: str, run_dir: Path, environment=srun, ranks: int = 3) -> tuple[list[int], list[str]]:
    """(exit codes, what each wrote to standard error)."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MEGATRON_EXT_", "MASTER_", "RANK", "WORLD_SIZE"))}
    started = [subprocess.Popen([sys.executable, probe, what, f"run.dir={run_dir}"], env={**clean, "PYTHONPATH": str(ROOT), **environment(rank, ranks)},
                                stderr=subprocess.PIPE, text=True) for rank in range(ranks)]
    said = [process.communicate(timeout=120)[1] for process in started]
    return [process.returncode for process in started], said


def since_failure(directory: Path) -> float:
    """Seconds: not since the start, which takes long where imports do."""
    return time.time() - (directory / "run.failed").stat().st_mtime


def code(run_dir: Path, life: str = "12.0") -> str:
    return (run_dir / "failures" / life / "code").read_text()


@pytest.mark.parametrize("environment, life", [(srun, "12.0"), (torchrun, "torchrun.none.0")])
def test_the_first_traceback_is_told_once_and_the_others_leave_with_its_code(probe, tmp_path, environment, life):
    codes, said = run(probe, "raise_1", tmp_path / "run", environment)
    assert codes == [1, 1, 1] and code(tmp_path / "run", life) == "1\n"
    assert said[1].startswith("error: rank 1 of 3 (") and "failed first:\nTraceback" in said[1] and "the true cause" in said[1]
    assert "0123456789abcdef0123" not in said[1]
    for rank in (0, 2):
        assert said[rank].startswith(f"rank {rank} of 3 (") and said[rank].endswith(") ended: rank 1 failed\n") and said[rank].count("\n") == 1


@pytest.mark.parametrize(("launcher", "stays"), [(srun, [(failures.FORWARD, True)]), (torchrun, [(0.0, True)])], ids=["srun", "torchrun alone"])
def test_a_rank_stays_behind_its_last_word_until_srun_has_passed_that_on(tmp_path, monkeypatch, capsys, launcher, stays):
    stayed = []
    monkeypatch.setattr(failures.time, "sleep", lambda seconds: stayed.append((seconds, "the true cause" in capsys.readouterr().err)))
    assert Failures.of(tmp_path / "run", {"RANK": "0", "WORLD_SIZE": "2"} | launcher(0, 2)).end(1, "Traceback\nKeyError: the true cause") == 1
    assert stayed == stays


def test_a_rank_that_waits_for_ever_is_ended(probe, tmp_path):
    codes, said = run(probe, "hang_0", tmp_path / "run", ranks=2)
    assert codes == [1, 1] and since_failure(tmp_path) < 10 and said[0].endswith("ended: rank 1 failed\n")


def test_bad_input_is_one_line_of_one_rank(probe, tmp_path):
    codes, said = run(probe, "user_error", tmp_path / "run")
    assert codes == [2, 2, 2] and "".join(said) == "error: data.path=x: is wrong on every rank\n" and code(tmp_path / "run") == "2\n"


def test_bad_input_of_one_node_ends_all_even_before_the_run_directory_is_there(probe, tmp_path):
    codes, said = run(probe, "early", tmp_path / "new" / "run")
    assert codes == [2, 2, 2] and said[1] == "error: data.path=x: is not on this node\n" and "rank 1 failed" in said[0]
    assert (tmp_path / "new" / "run").stat().st_mode & 0o777 == 0o700


def test_a_rank_that_died_without_a_word_is_told_of_by_one_other(probe, tmp_path):
    codes, said = run(probe, "kill_1", tmp_path / "run")
    assert sorted(codes) == [-9, 137, 137] and since_failure(tmp_path) < 10 and code(tmp_path / "run") == "137\n"
    told, other = sorted((said[0], said[2]), key=len, reverse=True)
    assert "lost a peer, and no rank says why: one was killed, or its node is gone. What it saw: ConnectionResetError" in told
    assert "Traceback" not in told + other and " ended: a peer was lost (rank " in other


@pytest.mark.parametrize("environment, life, codes", [(srun, "12.0", [75, 75]), (torchrun, "torchrun.none.0", [0, 0])])
def test_unfinished_runs_say_so_in_a_file(probe, tmp_path, environment, life, codes):
    """torchrun would take 75 for a crash, print a table and end the others."""
    assert run(probe, "unfinished", tmp_path / "run", environment, ranks=2) == (codes, ["", ""])
    assert code(tmp_path / "run", life) == "75\n"


def test_a_run_that_is_done_leaves_nothing(probe, tmp_path):
    assert run(probe, "done", tmp_path / "run", ranks=2) == ([0, 0], ["", ""]) and not (tmp_path / "run").exists()


def test_a_port_in_use_asks_for_another_life(probe, tmp_path):
    codes, said = run(probe, "port", tmp_path / "run", ranks=2)
    assert codes == [75, 75] and "port 16531 of n1 is in use" in said[0] and "Traceback" not in said[0]  # 16384 + 12 * 12 + 3


def test_every_life_has_its_own_failures(probe, tmp_path):
    """An earlier life's failure, or that of an earlier step of the same job, does not end this one."""
    run(probe, "raise_1", tmp_path / "run", ranks=2)
    later = run(probe, "done", tmp_path / "run", lambda rank, ranks: srun(rank, ranks, restart=1), ranks=2)
    step = run(probe, "done", tmp_path / "run", lambda rank, ranks: srun(rank, ranks) | {"SLURM_STEP_ID": "4"}, ranks=2)
    assert later[0] == step[0] == [0, 0]
    mine = Failures(tmp_path / "run" / "failures" / "12.0", rank=0, ranks=2, name="first.3.json", since=time.time() + 1)
    assert mine.first() is None  # by its time, where nothing names a start


def test_where_nothing_can_be_written_every_rank_speaks(probe, tmp_path):
    (tmp_path / "file").touch()
    codes, said = run(probe, "user_error", tmp_path / "file" / "run", ranks=2)
    assert codes == [2, 2] and said == ["error: data.path=x: is wrong on every rank\n"] * 2


def test_what_a_lost_peer_looks_like():
    import torch.distributed as dist

    gloo = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:27017")
    assert is_lost_peer(gloo) and is_lost_peer(dist.DistBackendError("NCCL error")) and is_lost_peer(BrokenPipeError())
    assert not is_lost_peer(dist.DistNetworkError("failed to listen, name: EADDRINUSE"))
    assert not is_lost_peer(RuntimeError("shapes (2, 3) and (4, 5)")) and not is_lost_peer(KeyError("Connection closed by peer"))


# ---- who a task is --------------------------------------------------------------------------------------------------------------

def test_srun_tasks_find_themselves():
    environment = srun(4, 6) | {"SLURM_NODEID": "2", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1(x2)", "SLURM_STEP_NODELIST": "n[07-09],m1"}
    slurm.adopt(environment)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
    assert [environment[name] for name in names] == ["4", "0", "6", "1", "n07", "1"]
    assert "GLOO_SOCKET_IFNAME" not in environment and "NCCL_SOCKET_IFNAME" not in environment
    chosen = srun(0, 2) | {"MASTER_ADDR": "ib0.n1", "MASTER_PORT": "4242", "OMP_NUM_THREADS": "7", "SLURM_CPUS_PER_TASK": "8"}
    slurm.adopt(chosen)
    assert [chosen[name] for name in ("MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")] == ["ib0.n1", "4242", "7"]


def test_ports_of_jobs_and_steps_that_may_share_a_node_differ():
    taken = [slurm.port(job, step) for job in range(100_000, 100_000 + slurm.JOBS) for step in range(slurm.STEPS)]
    assert len(set(taken)) == len(taken) and min(taken) > 1024 and max(taken) < 32768  # Linux gives out 32768 and above
    assert slurm.port(5, 0) != slurm.port(5, 0, restart=1)
    assert slurm.master_port(srun(0, 2)) == slurm.port(12, 3) and slurm.master_port(srun(0, 2) | {"SLURM_STEP_RESV_PORTS": "12003-12004"}) == 12003


@pytest.mark.parametrize("text, nodes", [
    ("vn1", ["vn1"]), ("a1,a2", ["a1", "a2"]), ("n[1-3,7],login", ["n1", "n2", "n3", "n7", "login"]), ("gpu-[008-010]", ["gpu-008", "gpu-009", "gpu-010"]),
    ("rack[1-2]n[3-4]", ["rack1n3", "rack1n4", "rack2n3", "rack2n4"]), ("n[1,3-4],n9,m[2]", ["n1", "n3", "n4", "n9", "m2"]), ("n[0099-0100]", ["n0099", "n0100"]),
])
def test_node_lists(text, nodes):
    """As `scontrol show hostnames` reads them; tests/test_slurm.py asks it."""
    assert slurm.hostnames(text) == nodes


@pytest.mark.parametrize("text", ["", ",", "n[1-", "n[3-1]", "n[a-b]", "n]1["])
def test_what_is_no_node_list_is_refused(text):
    with pytest.raises(UserError, match="node list"):
        slurm.hostnames(text)


def test_one_rank_alone_needs_no_names(probe, tmp_path):
    """torchrun with one rank: its traceback as it is, and the file for the batch script."""
    codes, said = run(probe, "user_error", tmp_path / "run", torchrun, ranks=1)
    assert codes == [2] and said == ["error: data.path=x: is wrong on every rank\n"] and code(tmp_path / "run", "torchrun.none.0") == "2\n"
    first = json.loads((tmp_path / "run" / "failures" / "torchrun.none.0" / "first.json").read_text())
    assert (first["rank"], first["code"], first["lost"]) == (0, 2, False)
