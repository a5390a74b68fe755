"""megatron_ext/health: who is to blame (cases worked out by hand), the records, one watchdog by itself. Real ranks: test_hangs.py."""
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from megatron_ext.health import evidence, heartbeat
from megatron_ext.health.diagnosis import Seen, judge
from megatron_ext.health.heartbeat import Heartbeat, Waiting, parse_spans, spans

LIMIT, INTERVAL = 100.0, 5.0
WORLD = Waiting("all_reduce", "0", "world", (0, 1, 2, 3), number=7)
DP = Waiting("all_reduce", "a", "dp", (0, 2), number=5)
TP = Waiting("all_gather_into_tensor", "b", "tp", (2, 3), number=9)


def seen(rank: int, waiting: Waiting | None = None, *, still: float = 100.0, silent: float = 0.0, **fields) -> Seen:
    issued = {waiting.group: waiting.number} if waiting else {}
    record = Heartbeat(rank, f"node{rank // 2}", 1000 + rank, "life", step=17, phase="step", still=still, allowed=LIMIT, waiting=waiting, quick=True)
    return Seen(rank, replace(record, **{"issued": issued, **fields}), silent)


def verdict(*ranks: Seen, **kwargs):
    return judge(ranks, timeout=LIMIT, interval=INTERVAL, **kwargs)


def named(diagnosis) -> list[int]:
    return [suspect.rank for suspect in diagnosis.suspects]


# --- who is to blame

def test_a_stopped_rank_is_named_though_its_last_word_was_from_a_collective():
    found = verdict(seen(0, WORLD), seen(1, WORLD), seen(2, WORLD, still=0.1, silent=95.0), seen(3, WORLD), process_state=lambda record: "T")
    assert (found.kind, named(found), found.waiting, found.waiters) == ("silent", [2], WORLD, (0, 1, 3))
    suspect = found.suspects[0]
    assert (suspect.host, suspect.pid) == ("node1", 1002) and "SIGSTOP" in suspect.cause
    assert found.event() == {
        "cause": "silent", "step": 17, "seconds": 100.0, "suspects": [{"rank": 2, "host": "node1", "pid": 1002, "cause": suspect.cause}],
        "collective": "all_reduce", "group": "world", "group_ranks": "0-3", "number": 7, "waiters": "0-1,3",
    }
    assert "rank 2 (node1, pid 1002)" in found.text and "ranks 0-1,3 wait in all_reduce number 7 of group world (ranks 0-3)" in found.text


def test_blame_follows_the_groups_to_the_rank_that_nobody_waits_with():
    """0 waits in dp for 2, 2 waits in tp for 3, which is stuck in Python; 1 waits for all in the world's."""
    found = verdict(seen(0, DP), seen(1, WORLD), seen(2, TP, issued={"b": 9, "a": 4}), seen(3, place="load (disk.py:7)", issued={"b": 8}))
    assert (found.kind, named(found)) == ("idle", [3])
    assert found.waiting in (TP, WORLD) and "disk.py:7" in found.text  # both are waited in for 3


def test_an_idle_rank_that_nobody_awaits_is_not_blamed_beside_one_that_is():
    """1 has called the seventh all_reduce without waiting for it, and is somewhere else; 3 has not come to it."""
    found = verdict(seen(0, WORLD), seen(1, issued={"0": 7}), seen(2, WORLD), seen(3, issued={"0": 6}))
    assert (named(found), found.waiters) == ([3], (0, 2))


def test_a_silent_rank_goes_before_an_idle_one():
    found = verdict(seen(0, WORLD), seen(1), seen(2, silent=30.0), seen(3, WORLD))
    assert named(found) == [2]


def test_a_receiver_waits_for_its_sender():
    receive = Waiting("recv", "p", "pp", (0, 2), peer=0)
    found = verdict(seen(0), seen(2, receive))
    assert (found.kind, named(found), found.waiting) == ("idle", [0], receive) and "recv from rank 0 of group pp (ranks 0,2)" in found.text


def test_a_rank_that_has_ended_while_others_wait_for_it():
    found = verdict(seen(0, WORLD), seen(1, WORLD), seen(2, silent=200.0, closed=True), seen(3, WORLD))
    assert (found.kind, named(found)) == ("left", [2])


def test_ranks_that_never_sent_a_heartbeat():
    quiet = Seen(1, None, LIMIT)
    found = verdict(seen(0, WORLD), quiet, seen(2, WORLD), seen(3, WORLD))
    assert named(found) == [1] and found.suspects[0].host is None and "not sent a single heartbeat" in found.text


def test_collectives_in_different_orders():
    """0, 1 and 3 have come to the seventh all_reduce of the world; 2 has gone to its tp group, where 3 does not follow."""
    three = [seen(rank, WORLD, issued={"0": 7, "b": 8}) for rank in (0, 1, 3)]
    found = verdict(*three, seen(2, TP, issued={"0": 6, "b": 9}))
    assert (found.kind, named(found), found.waiters) == ("order", [2], (0, 1, 3))
    pair = [seen(0, Waiting("recv", "p", "pp", (0, 1), peer=1)), seen(1, Waiting("recv", "p", "pp", (0, 1), peer=0))]
    assert (verdict(*pair).kind, named(verdict(*pair))) == ("order", [])  # each may be right


def test_all_in_the_same_collective_is_nobodys_fault():
    found = verdict(*(seen(rank, WORLD) for rank in range(4)))
    assert (found.kind, named(found)) == ("transport", []) and "network" in found.text
    ends = verdict(seen(0, Waiting("send", "p", "pp", (0, 1), peer=1)), seen(1, Waiting("recv", "p", "pp", (0, 1), peer=0)))
    assert ends.kind == "transport"


def test_one_rank_alone():
    found = verdict(seen(0, place="sleep (x.py:1)"))
    assert (found.kind, named(found), found.waiting, found.waiters) == ("idle", [0], None, ())


@pytest.mark.parametrize("ranks", [
    (seen(0, WORLD), seen(1, WORLD), seen(2, still=99.0), seen(3, WORLD)),  # not yet
    (seen(0, WORLD), seen(1, WORLD), seen(2, allowed=600.0, phase="checkpoint"), seen(3, WORLD)),  # it writes a checkpoint
    (seen(0, WORLD), seen(1, WORLD), seen(2, silent=22.0), seen(3, WORLD)),  # nobody knows yet
    (seen(0, WORLD), seen(1, WORLD), seen(2, silent=60.0, quick=False), seen(3, WORLD)),  # loading may hold Python's lock for that long
    (seen(0, WORLD), Seen(1, None, 50.0)),
    (seen(0, closed=True), seen(1, closed=True)),
])
def test_what_is_no_hang(ranks):
    assert verdict(*ranks) is None


def test_a_stopped_rank_ends_long_phases_too():
    loading = {"allowed": 600.0, "phase": "start", "quick": False}
    assert verdict(seen(0, WORLD, still=150.0, **loading), seen(1, silent=99.0, **loading)) is None
    assert named(verdict(seen(0, WORLD, still=150.0, **loading), seen(1, silent=100.0, **loading))) == [1]


# --- what ranks say

def test_spans():
    short = {(0, 1, 2, 3): "0-3", (0, 8, 16, 24): "0-24:8", (1, 5): "1,5", (3,): "3", (): "", (0, 1, 2, 7, 9, 11): "0-2,7-11:2", (4, 5): "4-5"}
    for ranks, text in short.items():
        assert spans(ranks) == text and parse_spans(text) == ranks
    for _ in range(200):
        ranks = tuple(sorted(random.sample(range(60), random.randint(0, 40))))
        assert parse_spans(spans(ranks)) == ranks


def test_records(tmp_path):
    whole = seen(3, Waiting("recv", "p", "pp", tuple(range(0, 1024, 8)), peer=16)).record
    heartbeat.write(tmp_path, whole)
    assert heartbeat.read(tmp_path, 3) == whole
    heartbeat.write(tmp_path, replace(whole, waiting=None, place="f (x.py:1)"))
    assert heartbeat.read(tmp_path, 3).place == "f (x.py:1)"  # nothing is left of the longer one
    many = replace(whole, issued={f"{number:032x}": number for number in range(200)})
    heartbeat.write(tmp_path, many)
    assert heartbeat.path_of(tmp_path, 3).stat().st_size == heartbeat.SIZE and heartbeat.read(tmp_path, 3).waiting == whole.waiting
    assert heartbeat.read(tmp_path, 4) is None
    for torn in (b"", b'{"rank": 1', b"[1]", b'{"rank": 1}', b'{"waiting": null, "unknown": 1}', b"\xff\xfe", b'{"waiting": 3}'):
        heartbeat.path_of(tmp_path, 4).write_bytes(torn)
        assert heartbeat.read(tmp_path, 4) is None


def test_the_state_of_a_process():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    host = socket.gethostname()
    try:
        record = Heartbeat(0, host, child.pid, "life", born=evidence.born(child.pid))
        child.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 60
        while evidence.process_state(record, host) != "T" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert evidence.process_state(record, host) == "T"
        assert evidence.process_state(replace(record, born=record.born + 1), host) == "gone"  # the pid belongs to another process by now
        assert evidence.process_state(record, "elsewhere") is None
    finally:
        child.kill()
        child.wait()
    assert evidence.process_state(record, host) == "gone"


class Recorded:
    """As `Collectives`: group g of the ranks 4 and 6, whose first two collectives went by before it began to count."""

    def recorded(self, group, sequence):
        return ((4, 6), sequence - 2) if group == "g" else ((), 0)

    def name(self, ranks):
        return "dp"


def flight(*entries: tuple) -> bytes:
    return json.dumps({"entries": [
        {"record_id": number, "profiling_name": name, "state": state, "retired": retired, "process_group": ["g", "undefined"],
         "collective_seq_id": sequence, "is_p2p": "send" in name or "recv" in name}
        for number, (name, state, retired, sequence) in enumerate(entries)
    ]}).encode()


def test_the_flight_recorder_says_what_a_device_waits_in():
    done = ("nccl:all_reduce", "completed", True, 8)
    found = evidence.in_flight(flight(done, ("nccl:_all_gather_base", "started", False, 9), ("nccl:all_reduce", "scheduled", False, 10)), Recorded())
    assert found == Waiting("_all_gather_base", "g", "dp", (4, 6), number=7)
    assert evidence.in_flight(flight(done), Recorded()) is None
    assert evidence.in_flight(flight(("nccl:all_reduce", "scheduled", False, 9)), Recorded()) is None  # a kernel before it does not end
    assert evidence.in_flight(flight(("nccl:recv 0<-1", "started", False, 0)), Recorded()) == Waiting("recv", "g", "dp", (4, 6), peer=6)


# --- one watchdog

def test_ranks_look_at_few_others_until_one_of_them_lives(tmp_path, monkeypatch):
    """Rank 20 of 24 by hand, a look a second, limit 40 s: lower ranks count as silent after 10 s. Of them 0 to 4 are stopped."""
    from megatron_ext.health.watchdog import Watchdog

    looked, led = [], []
    dog = Watchdog(tmp_path, rank=20, ranks=24, timeout=40.0, groups={})
    monkeypatch.setattr(dog, "_lead", led.append)

    def read(directory, rank):
        looked[-1].add(rank)
        waiting = replace(WORLD, ranks=tuple(range(24)))
        return Heartbeat(rank, "node", rank, "", beat=0 if rank < silent else len(looked), still=60.0, allowed=40.0, waiting=waiting, quick=True)

    monkeypatch.setattr(heartbeat, "read", read)
    silent = 5
    for _ in range(40):
        looked.append(set())
        dog._follow_or_lead(1.0)
    assert looked[9] == {0} and looked[15] == {0, 1, 2, 3} and looked[25] == set(range(16)) and looked[39] == set(range(16)) and not led

    silent = 20
    dog._own = replace(dog._own, still=60.0, waiting=replace(WORLD, ranks=tuple(range(24))))
    for _ in range(25):
        looked.append(set())
        dog._follow_or_lead(1.0)
    assert [suspect.rank for suspect in led[-1].suspects] == list(range(20)) and looked[-1] == set(range(24)) - {20}


def test_a_quiet_end_leaves_nothing_behind(tmp_path):
    """One rank in this process: threads, wrappers and empty files are gone after close(), and an old record is not taken for this life's."""
    from torch._C._distributed_c10d import ProcessGroup, Work

    from megatron_ext.health.watchdog import Watchdog

    before, threads = (ProcessGroup.__dict__["allreduce"], Work.__dict__["wait"]), set(threading.enumerate())
    dog = Watchdog(tmp_path, rank=0, ranks=1, timeout=0.5, groups={})
    dog.start()
    with dog.phase("checkpoint"):
        time.sleep(0.8)  # 4 x 0.5 s are allowed
        while (record := heartbeat.read(tmp_path / "health", 0)).phase == "start":  # its thread has not had a turn yet
            time.sleep(0.01)
    dog.beat(1, "step")
    assert (record.pid, record.phase, record.allowed) == (os.getpid(), "checkpoint", 2.0)
    dog.close()
    assert (ProcessGroup.__dict__["allreduce"], Work.__dict__["wait"]) == before and set(threading.enumerate()) <= threads
    assert heartbeat.read(tmp_path / "health", 0).closed and sorted(path.name for path in (tmp_path / "health").iterdir()) == ["rank_0.json"]

    off = Watchdog(tmp_path / "off", rank=0, ranks=1, timeout=None, groups={})
    off.start()
    off.beat(1, "step")
    off.close()
    assert not (tmp_path / "off").exists() and ProcessGroup.__dict__["allreduce"] is before[0]


def test_a_directory_that_cannot_be_made_is_warned_of(tmp_path):
    from megatron_ext.health.watchdog import Watchdog

    (tmp_path / "health").write_text("a file")
    dog = Watchdog(tmp_path, rank=0, ranks=1, timeout=10.0, groups={})
    with pytest.warns(RuntimeWarning, match="will not be seen"):
        dog.start()
    dog.close()
