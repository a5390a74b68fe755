"""Real ranks under a watchdog (tests/watchdog_ranks.py, gloo) that are stopped by SIGSTOP or stuck in Python."""
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from spawn import ROOT

from megatron_ext.health import heartbeat, watchdog
from megatron_ext.parallel.job import held_port


@pytest.fixture
def port():
    """Of the ranks' store, and nobody else's before they have imported torch."""
    with held_port() as found:
        yield found


def ranks_of(script: str, directory, count: int, port: int, **environment: str) -> list[subprocess.Popen]:
    shared = {
        **os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo", **environment,
    }
    for name in ("MEGATRON_EXT_FAILURES", "MEGATRON_EXT_PARENT"):
        shared.pop(name, None)
    return [
        subprocess.Popen([sys.executable, "-W", "ignore", str(ROOT / "tests" / script), str(directory)], env={**shared, "RANK": str(rank)},
                         stdout=(directory / f"out{rank}").open("w"), stderr=(directory / f"error{rank}").open("w"))
        for rank in range(count)
    ]


def wait_until(reached, processes) -> None:
    deadline = time.monotonic() + 240
    while not reached():
        assert all(process.poll() is None for process in processes) and time.monotonic() < deadline
        time.sleep(0.02)


def test_a_stopped_rank_ends_the_job(tmp_path, port):
    """Rank 0 is stopped, which serves the store and would lead. Before, both have been through a long phase and a suspension, which are no hangs."""
    ranks = ranks_of("watchdog_ranks.py", tmp_path, 2, port, HANG_TIMEOUT="2", LONG_PHASE="2.5")
    health = tmp_path / "health"
    try:
        wait_until(lambda: (read := heartbeat.read(health, 1)) and read.step > 50, ranks)
        for rank in ranks:
            rank.send_signal(signal.SIGSTOP)
        time.sleep(3)  # longer than the limit
        for rank in ranks:
            rank.send_signal(signal.SIGCONT)
        step = heartbeat.read(health, 1).step
        wait_until(lambda: heartbeat.read(health, 1).step > step + 20, ranks)
        stopped = time.monotonic()
        ranks[0].send_signal(signal.SIGSTOP)
        assert ranks[1].wait(timeout=120) == 1
        # Evidence takes its time (py-spy reads all of torch's symbols: 2 s, 8 s on a busy machine). What comes behind it is no wait for the stopped rank.
        kept = max(path.stat().st_mtime for path in health.iterdir() if path.suffix in (".stacks", ".pyspy"))
        assert time.time() - kept < watchdog.GRACE and time.monotonic() - stopped < 2 + 3 * watchdog.GRACE  # nor was it the last resort that ended it
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    said = (tmp_path / "error1").read_text()
    assert f"rank 0 ({socket.gethostname()}, pid {ranks[0].pid}): no heartbeat" in said and "SIGSTOP" in said and said.count("hang:") == 1
    (event,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert (event["kind"], event["cause"], event["group_ranks"], event["waiters"]) == ("hang", "silent", "0-1", "1")
    assert [suspect["pid"] for suspect in event["suspects"]] == [ranks[0].pid] and event["collective"] in ("all_reduce", "all_gather_into_tensor")
    assert "watchdog_ranks.py" in (health / "rank_1.stacks").read_text() and b'"entries"' in (health / "rank_1.flight.json").read_bytes()


def test_a_rank_stuck_in_python_ends_the_job(tmp_path, port):
    """Rank 1 is stuck at step 30, and the collective that rank 0 waits in is one that was begun before (`handle.wait()`), of a group with a name."""
    # Not shorter: a quarter of it without a heartbeat, which a disk may hold up, and rank 1 is said to be silent.
    ranks = ranks_of("watchdog_ranks.py", tmp_path, 2, port, HANG_TIMEOUT="6", STUCK_RANK="1")
    try:
        assert [rank.wait(timeout=240) for rank in ranks] == [1, 1]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    said = [(tmp_path / f"error{rank}").read_text() for rank in range(2)]
    assert said[0].count("hang:") == 1 and "hang:" not in said[1]
    (event,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert (event["cause"], event["step"], event["collective"], event["group"], event["waiters"]) == ("idle", 30, "all_gather_into_tensor", "dp", "0")
    assert [suspect["rank"] for suspect in event["suspects"]] == [1] and "stuck (watchdog_ranks.py" in event["suspects"][0]["cause"]
    assert "in stuck" in (tmp_path / "health" / "rank_1.stacks").read_text() and (tmp_path / "health" / "rank_0.stacks").exists()
