"""Ranks start and end together: by real processes, without torch where torch adds nothing."""
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from megatron_ext.config.compose import compose
from megatron_ext.config.schema import Config
from megatron_ext.errors import UserError
from megatron_ext.parallel import job, launch

ROOT = Path(__file__).resolve().parent.parent

# What a rank does, by the first word of its command line.
PROBE = """
import os, signal, subprocess, sys, time
from megatron_ext.errors import UserError
from megatron_ext.parallel import launch

RANK = int(os.environ["RANK"])

def body():
    what = sys.argv[1]
    if what == "tell":
        print("rank", RANK, os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"], os.environ["OMP_NUM_THREADS"], flush=True)
    elif what == "stdin":
        open(sys.argv[2] + str(RANK), "w").write(sys.stdin.read())
    elif what == "raise_1":
        if RANK == 1:
            raise RuntimeError("the true cause")
        while not os.path.exists(os.path.join(os.environ[launch.FAILURES], "rank_00001.json")):  # no peer is lost before: ranks may start in any order
            time.sleep(0.02)
        raise ConnectionError("connection closed by peer")
    elif what == "user_error":
        raise UserError("data.path", "x", "is wrong on every rank")
    elif what == "kill_1":
        victim = os.path.join(os.environ[launch.FAILURES], "victim")
        if RANK == 1:
            print("last words", flush=True)
            os.symlink(str(os.getpid()), victim)
            os.kill(os.getpid(), signal.SIGKILL)
        while not os.path.islink(victim) or os.path.exists("/proc/" + os.readlink(victim)):  # until the parent has seen its end
            time.sleep(0.02)
        raise ConnectionError("connection closed by peer")
    elif what == "hang_0":
        if RANK == 1:
            raise RuntimeError("the true cause")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    elif what == "exit_3":
        sys.stderr.write(f"rank {RANK} before leaving\\n")
        os._exit(3 if RANK == 1 else 0)
    elif what == "sleep":
        child = subprocess.Popen(["sleep", "601"])
        open(sys.argv[2] + str(RANK), "w").write(f"{os.getpid()} {child.pid}")
        time.sleep(600)
    elif what == "graceful":
        asked = []
        signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
        open(sys.argv[2] + str(RANK), "w").write("ready")
        while not asked:
            time.sleep(0.02)
        open(sys.argv[2] + str(RANK), "w").write("saved")
    elif what == "collective":
        import torch
        import torch.distributed as dist
        dist.init_process_group("gloo")
        total = torch.tensor([RANK + 1.0])
        dist.all_reduce(total)
        print("sum", total.item(), flush=True)
        dist.destroy_process_group()

sys.exit(launch.guarded(body))
"""
PARENT = """
import sys
from megatron_ext.config.compose import compose
from megatron_ext.parallel import job, launch
job.TERM_GRACE = 1.0
config = compose([f"launch.ranks={sys.argv[1]}"] + [word for word in sys.argv[3:] if "=" in word])
command = [sys.executable, sys.argv[2], *[word for word in sys.argv[3:] if "=" not in word]]
content = b"standard input\\n" if "stdin" in sys.argv else None
sys.exit(launch.guarded(lambda: job.start(command, config, stdin=content)))
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    (folder / "probe.py").write_text(textwrap.dedent(PROBE))
    (folder / "parent.py").write_text(textwrap.dedent(PARENT))
    return folder


def environment() -> dict[str, str]:
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "OMP_NUM_THREADS")
    return {**{name: value for name, value in os.environ.items() if name not in hidden}, "PYTHONPATH": str(ROOT)}


def command(scripts: Path, *words: object, ranks: int = 2) -> list[str]:
    return [sys.executable, str(scripts / "parent.py"), str(ranks), str(scripts / "probe.py"), *map(str, words)]


def run(scripts: Path, *words: object, ranks: int = 2) -> subprocess.CompletedProcess:
    return subprocess.run(command(scripts, *words, ranks=ranks), env=environment(), capture_output=True, text=True, timeout=300, check=False)


def wait_for(condition, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether `pid` runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_ranks_know_who_they_are_and_only_rank_0_talks(scripts):
    done = run(scripts, "tell", "launch.threads=3")
    assert (done.returncode, done.stdout, done.stderr) == (0, "rank 0 2 0 3\n", "")


def test_every_rank_reads_standard_input(scripts, tmp_path):
    assert run(scripts, "stdin", tmp_path / "rank").returncode == 0
    assert [(tmp_path / f"rank{i}").read_text() for i in (0, 1)] == ["standard input\n"] * 2


def test_first_exception_ends_the_job_and_is_shown_once(scripts):
    start = time.monotonic()
    done = run(scripts, "raise_1")
    assert done.returncode == 1 and time.monotonic() - start < 60
    assert done.stderr.startswith("error: rank 1 of 2 failed first:\nTraceback") and done.stderr.count("the true cause") == 2  # source and message
    assert "closed by peer" not in done.stderr


def test_user_error_of_all_ranks_is_one_line(scripts):
    done = run(scripts, "user_error")
    assert (done.returncode, done.stderr) == (2, "error: data.path=x: is wrong on every rank\n")


def test_killed_rank_is_named_with_its_last_output(scripts):
    done = run(scripts, "kill_1")
    assert done.returncode == 128 + signal.SIGKILL
    assert "rank 1 of 2 failed first:\nkilled by SIGKILL" in done.stderr and "last words" in done.stderr
    assert "closed by peer" not in done.stderr


def test_rank_that_ignores_sigterm_does_not_hold_the_job(scripts):
    start = time.monotonic()
    done = run(scripts, "hang_0")
    assert done.returncode == 1 and "the true cause" in done.stderr and time.monotonic() - start < 60


def test_exit_code_without_exception(scripts):
    done = run(scripts, "exit_3")
    assert done.returncode == 3 and "ended with exit code 3" in done.stderr and "rank 1 before leaving" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_ranks_die_with_a_killed_parent(scripts, tmp_path):
    parent = subprocess.Popen(command(scripts, "sleep", tmp_path / "rank"), env=environment())
    files = [tmp_path / f"rank{i}" for i in (0, 1)]
    wait_for(lambda: all(file.is_file() and file.read_text() for file in files))
    parent.kill()
    parent.wait()
    pids = [int(file.read_text().split()[0]) for file in files]
    children = [int(file.read_text().split()[1]) for file in files]
    try:
        wait_for(lambda: not any(map(alive, pids)), 60)
    finally:
        for pid in children:  # of ranks that were killed: not ours to promise
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_ranks_and_what_they_started(scripts, tmp_path, number):
    parent = subprocess.Popen(command(scripts, "sleep", tmp_path / "rank"), env=environment(), stderr=subprocess.PIPE, text=True)
    files = [tmp_path / f"rank{i}" for i in (0, 1)]
    wait_for(lambda: all(file.is_file() and file.read_text() for file in files))
    parent.send_signal(number)
    assert parent.wait(timeout=60) == 128 + number and "Traceback" not in parent.stderr.read()
    pids = [int(pid) for file in files for pid in file.read_text().split()]
    wait_for(lambda: not any(map(alive, pids)), 60)


def test_ranks_may_save_and_stop_on_sigterm(scripts, tmp_path):
    parent = subprocess.Popen(command(scripts, "graceful", tmp_path / "rank"), env=environment())
    files = [tmp_path / f"rank{i}" for i in (0, 1)]
    wait_for(lambda: all(file.is_file() and file.read_text() == "ready" for file in files))
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(timeout=60) == 0
    assert [file.read_text() for file in files] == ["saved"] * 2


def test_the_held_port_serves_torch(scripts):
    """Rank 0's store listens on a port that the parent keeps bound: fails when torch stops setting SO_REUSEADDR."""
    done = run(scripts, "collective")
    assert (done.returncode, done.stdout) == (0, "sum 3.0\n"), done.stderr


def test_two_held_ports_differ_and_are_given_to_nobody():
    with job.held_port() as first, job.held_port() as second, socket.socket() as other:
        other.bind(("", 0))
        assert len({first, second, other.getsockname()[1]}) == 3


def test_port_in_use_is_refused(scripts):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run(scripts, "tell", f"launch.master_port={port}")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"error: launch.master_port={port}: Address already in use; leave it at 0 and a free port is chosen\n"


def test_a_free_port_that_is_asked_for_is_used():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with job.held_port(port) as held:
        assert held == port


def test_the_cause_is_the_first_failure_or_the_killed_rank():
    early, late = job.Failure(0, 1.0, 1, "a"), job.Failure(1, 1.1, 1, "b")
    killed, later = job.Failure(2, 1.2, 137, "c"), job.Failure(2, 9.0, 137, "c")
    assert job.cause([late, early]) == early and job.cause([early, killed]) == killed and job.cause([early, later]) == early


def test_launchers_are_recognised():
    assert launch.launched_ranks({}) is None
    assert launch.launched_ranks({"RANK": "1", "WORLD_SIZE": "4"}) == 4
    assert launch.launched_ranks({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) is None  # the batch script itself
    assert launch.launched_ranks({"SLURM_PROCID": "3", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "8"}) == 8
    assert launch.launched_ranks({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}) is None  # starts its own


def test_ranks_follow_the_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    assert launch.with_ranks(Config(), asked=False).launch.ranks == 1
    assert launch.with_ranks(Config(), asked=False, default=4).launch.ranks == 4
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert launch.with_ranks(Config(), asked=False, default=2).launch.ranks == 4
    with pytest.raises(UserError, match="started 4 ranks"):
        launch.with_ranks(compose(["launch.ranks=2"]), asked=True)


def test_slurm_tasks_become_ranks(monkeypatch, tmp_path):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "OMP_NUM_THREADS", launch.RUN_DIR):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "77",
                        "MASTER_ADDR": "host"}.items():
        monkeypatch.setenv(name, value)
    assert launch.in_ranks(compose([f"run.dir={tmp_path}"]), [], lambda: int(os.environ["RANK"]) * 100 + int(os.environ["WORLD_SIZE"])) == 304
    assert os.environ["LOCAL_RANK"] == "1" and 1024 < int(os.environ["MASTER_PORT"]) < 32768


@pytest.mark.parametrize(("gpus", "words", "expected"), [
    ("", ["launch.device=cuda"], "launch.device=cuda: no NVIDIA GPU"),
    ("0", ["launch.ranks=2"], "launch.ranks=2: this machine has 1 visible GPU"),
    ("", ["launch.ranks=2240"], "launch.ranks=2240: this machine has"),
])
def test_what_the_machine_cannot_carry_is_refused(monkeypatch, gpus, words, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    with pytest.raises(UserError) as error:
        launch.check_machine(compose(words))
    assert str(error.value).startswith(expected)


def test_visible_gpus(tmp_path):
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert launch.visible_gpus({}, tmp_path) == 2
    assert launch.visible_gpus({"CUDA_VISIBLE_DEVICES": "1"}, tmp_path) == 1
    assert launch.visible_gpus({"CUDA_VISIBLE_DEVICES": "-1"}, tmp_path) == launch.visible_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == 0
