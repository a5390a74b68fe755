"""Two lives in one run directory: who has it, who waits, who is told to leave, who is refused. No torch; two machines are one machine with two names."""
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ext.errors import UserError
from megatron_ext.parallel import lease
from megatron_ext.parallel.lease import Holder, Lease, hold

ROOT = Path(__file__).resolve().parent.parent
HOLDING = """
import os, sys, time
from pathlib import Path
from megatron_ext.parallel import lease
if sys.argv[2] == "elsewhere":
    lease._machine = lambda: "another machine"
with lease.hold(Path(sys.argv[1]), beat=float(sys.argv[4]), stale=60.0):
    print("holds", flush=True)
    time.sleep(float(sys.argv[3]))
print("gave it back", flush=True)
"""


def holding(run_dir: Path, *, where: str = "here", seconds: float = 600, beat: float = 0.1, **environment: str) -> subprocess.Popen:
    """Another process that holds the lease."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MEGATRON_EXT_", "RANK"))}
    process = subprocess.Popen([sys.executable, "-c", HOLDING, run_dir, where, str(seconds), str(beat)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**clean, "PYTHONPATH": str(ROOT), **environment})
    assert process.stdout.readline() == "holds\n", process.stderr.read()
    return process


@pytest.fixture
def job(monkeypatch):
    """Makes this process a life of a Slurm job."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "MEGATRON_EXT_"))]:
        monkeypatch.delenv(name)

    def be(number: int, restarts: int = 0) -> None:
        monkeypatch.setenv("SLURM_JOB_ID", str(number))
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))

    return be


def taken(run_dir: Path, said: list[str], *, stale: float = 60.0):
    """stale: so long that no stall of a holder, whose heartbeats wait for the disk, is its end."""
    return hold(run_dir, say=said.append, beat=0.1, stale=stale, leave=said.append)


def test_it_is_given_back(tmp_path, job):
    said = []
    with taken(tmp_path, said) as held:
        first = held.read()
        end = time.monotonic() + 60
        while held.read().beat == first.beat and time.monotonic() < end:
            time.sleep(0.05)
        assert held.read().beat > first.beat and held.read().time > first.time and first.pid == os.getpid()
    assert list(tmp_path.iterdir()) == [] and said == []


def test_a_process_that_was_killed_leaves_it_at_once(tmp_path, job):
    other = holding(tmp_path)
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # which leaves it as it is: a zombie is dead too
    start = time.monotonic()
    with taken(tmp_path, []):
        assert time.monotonic() - start < 30  # not `stale`


def test_the_same_number_may_be_another_process(tmp_path, job):
    said = []
    with taken(tmp_path, said) as held:
        mine = held.read()
    assert not mine.ended() and replace(mine, started=mine.started - 100).ended()


def test_a_living_holder_is_named_and_kept(tmp_path, job):
    other = holding(tmp_path, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="2")
    try:
        job(8)
        with pytest.raises(UserError, match=rf"^run.dir={re.escape(str(tmp_path))}: Slurm job 7 on \S+ \(process {other.pid}, restart 2\) is at work in it"), \
                taken(tmp_path, []):
            pass
        assert other.poll() is None and [path.name for path in tmp_path.iterdir()] == ["lease.json"]
    finally:
        other.kill()


def test_one_of_another_machine_is_kept_while_it_beats_and_replaced_when_it_stands_still(tmp_path, job):
    other = holding(tmp_path, where="elsewhere", SLURM_JOB_ID="7")
    try:
        job(8)
        with pytest.raises(UserError, match="Slurm job 7 .* is at work"), taken(tmp_path, []):
            pass
        os.kill(other.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, other.pid, os.WSTOPPED)
        said, start = [], time.monotonic()
        with taken(tmp_path, said, stale=2.0) as held:
            assert 1.9 < time.monotonic() - start < lease.STALE and "Slurm job 7" in said[0] and "waiting 2 s for a sign of life" in said[0]
            os.kill(other.pid, signal.SIGCONT)  # it was not dead: now it finds out
            assert other.wait(timeout=60) == 1 and "has taken over" in other.stderr.read()
            assert held.read().pid == os.getpid()
    finally:
        other.kill()


def test_an_earlier_life_of_the_same_job_is_told_to_leave(tmp_path, job):
    """A slurmd that died leaves its tasks running while the job starts anew."""
    other = holding(tmp_path, where="elsewhere", SLURM_JOB_ID="7")
    try:
        job(7, restarts=1)
        said = []
        with taken(tmp_path, said) as held:
            assert other.wait(timeout=60) == 1
            assert f"Slurm job 7 on {held.mine.host} (process {os.getpid()}, restart 1) has taken over" in other.stderr.read()
            assert held.read().restarts == 1 and "it is told to leave" in said[0]
    finally:
        other.kill()


def test_an_earlier_life_does_not_take_it_back(tmp_path, job):
    other = holding(tmp_path, where="elsewhere", SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")
    try:
        job(7)
        with pytest.raises(UserError, match="restart 1"), taken(tmp_path, []):
            pass
    finally:
        other.kill()


def test_waiting_ends_when_the_holder_gives_it_back(tmp_path, job):
    other = holding(tmp_path, where="elsewhere", seconds=0.05, beat=60)  # which is at work no more when it beats: that would be refused
    with taken(tmp_path, []):
        assert other.wait(timeout=60) == 0


def test_of_two_takers_one_has_it(tmp_path, job):
    dead = holding(tmp_path)
    dead.kill()
    dead.wait()
    winners = [Lease(tmp_path, replace(Holder.this(), job=name), beat=0.1, stale=1.0, say=print, leave=lambda reason: None) for name in ("process 1", "process 2")]
    for each in winners:
        each._draft()
    os.replace(winners[0]._draft(), winners[0].path)
    os.replace(winners[1]._draft(), winners[1].path)
    assert [each._own() for each in winners] == [False, True]


def test_a_damaged_or_very_old_lease_is_nobodys(tmp_path, job):
    (tmp_path / "lease.json").write_text("{")
    with taken(tmp_path, []) as held:
        old = replace(held.read(), machine="another machine", time=time.time() - 3600, job="Slurm job 3")
    import json
    from dataclasses import asdict

    (tmp_path / "lease.json").write_text(json.dumps(asdict(old)))
    start = time.monotonic()
    with taken(tmp_path, []):
        assert time.monotonic() - start < 30  # not `stale`


def test_a_directory_that_cannot_be_written_is_refused(tmp_path, job):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"), taken(tmp_path / "file" / "run", []):
        pass
    with taken(tmp_path / "new" / "run", []) as held:
        assert held.path == tmp_path / "new" / "run" / "lease.json"


def test_the_defaults_outlast_a_slow_file_system():
    assert lease.STALE >= 5 * lease.BEAT
