"""The goodput ledger: campaigns of lives with known faults, counted by hand and by an accountant of its own; kills, full disks, broken files."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ext.observe import allocation
from megatron_ext.observe.events import Events
from megatron_ext.observe.goodput import CLASSES, Ledger, read_goodput, steps_between_saves

ROOT = Path(__file__).resolve().parent.parent
EPOCH = 1_700_000_000.0


class Clock:
    def __init__(self):
        self.now = EPOCH

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


def nonzero(goodput) -> dict[str, float]:
    return {name: seconds for name, seconds in goodput.seconds.items() if seconds}


def lines(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "goodput.jsonl").read_text().splitlines()]


def train(ledger: Ledger, clock: Clock, steps: range, *, save: int = 10, first: str = "compile") -> None:
    """Steps of a second each after a quarter of waiting for data; the first takes 4 s; every `save` steps a checkpoint holds the loop for 2 s."""
    for number in steps:
        begins = number == steps[0]
        with ledger.phase(first if begins else "step"):
            with ledger.phase("data"):
                clock.passes(0.25)
            clock.passes(4.0 if begins else 1.0)
        ledger.step(number)
        if number % save == 0:
            with ledger.phase("checkpoint"):
                clock.passes(2.0)


# ---- by hand -----------------------------------------------------------------------------------------------------------------------


def campaign(directory: Path, clock: Clock, every: float) -> None:
    """Killed at step 27 (checkpoint at 20), dead in an evaluation at step 33 (checkpoint at 30), then to step 40; once stopped and requeued at 35."""
    def ledger(life: int, submitted: float, started: float) -> Ledger:
        made = Ledger(directory / "goodput.jsonl", clock=clock, every=every)
        made.begin(life=life, submitted=submitted, started=started, restart=life > 1)
        return made

    submitted = clock.now
    clock.passes(100)  # in the queue
    started = clock.now
    clock.passes(5)  # the program starts
    one = ledger(1, submitted, started)
    clock.passes(20)  # models are made
    train(one, clock, range(1, 28))
    clock.passes(3)  # it hangs, and is killed
    submitted = clock.now
    clock.passes(30)
    started = clock.now
    clock.passes(5)
    two = ledger(2, submitted, started)
    clock.passes(15)
    train(two, clock, range(21, 34))
    with two.phase("evaluation"):
        clock.passes(6)  # it gets through this
    with two.phase("step"):
        clock.passes(0.5)  # and dies in step 34
    clock.passes(2)
    submitted = clock.now
    clock.passes(30)
    started = clock.now
    clock.passes(5)
    three = ledger(3, submitted, started)
    clock.passes(15)
    train(three, clock, range(31, 36))
    with three.phase("checkpoint"):
        clock.passes(2)
    three.close("SIGUSR1: saved")
    clock.passes(1)  # it leaves
    submitted = clock.now
    clock.passes(60)
    started = clock.now
    clock.passes(5)
    four = ledger(4, submitted, started)
    clock.passes(15)
    train(four, clock, range(36, 41))
    four.close("all 40 steps are done")


HAND = {  # with every line of the ledger on the disk
    "queue": 100 + 30 + 30 + (1 + 60),
    "start-up": 5 + 20,
    "compile": 4 * 4,
    "data wait": 0.25 * (27 + 13 + 5 + 5),
    "step": 19 + 9 + 4 + 4,  # 2 to 20 in the first life, 22 to 30 in the second, 32 to 35 in the third, 37 to 40 in the fourth
    "checkpoint": 2 * (2 + 1 + 1 + 1),
    "evaluation": 6,
    "restart": 3 + (5 + 15) + 2 + (5 + 15) + (5 + 15),
    "lost work": 7 + (3 + 0.5),  # 21 to 27 in the first; 31 to 33 in the second, and what it had done of 34
}


def test_a_campaign_counted_by_hand(tmp_path):
    clock = Clock()
    campaign(tmp_path, clock, every=0.0)
    found = read_goodput(tmp_path)
    assert nonzero(found) == HAND
    assert found.wall == sum(HAND.values()) == clock.now - EPOCH
    assert found.goodput == HAND["step"] / (clock.now - EPOCH - HAND["queue"])
    assert found.steps == 40 and [(life.first, life.last) for life in found.lives] == [(1, 27), (21, 33), (31, 35), (36, 40)]
    assert [life.clean for life in found.lives] == [False, False, True, True] and found.lives[2].reason == "SIGUSR1: saved"
    lived = [5 + 20 + 4 + 26 + 27 / 4 + 4, 5 + 15 + 4 + 12 + 13 / 4 + 2 + 6 + 0.5, 5 + 15 + 4 + 4 + 5 / 4 + 2, 5 + 15 + 4 + 4 + 5 / 4 + 2]
    assert found.failures == 2 and found.uptime == pytest.approx(sum(lived)) and found.mttf == pytest.approx(sum(lived) / 2)


@pytest.mark.parametrize("every", [0.5, 5.0, 60.0, 1e6])
def test_what_a_kill_takes_with_it_is_no_goodput(tmp_path, every):
    """Lines that were not written yet: their time is restart then, and goodput is what it was, since a line goes before each checkpoint."""
    clock = Clock()
    campaign(tmp_path, clock, every)
    found = read_goodput(tmp_path)
    assert found.wall == clock.now - EPOCH and found.goodput == HAND["step"] / (clock.now - EPOCH - HAND["queue"])
    assert found.seconds["queue"] == HAND["queue"] and found.steps == 40
    gone = HAND["restart"] - found.seconds["restart"]
    assert -2 * (every + 6.25) <= gone <= 0


def test_no_line_a_step(tmp_path):
    clock = Clock()
    ledger = Ledger(tmp_path / "goodput.jsonl", clock=clock, every=5.0)
    ledger.begin(life=1)
    for number in range(1, 10_001):  # 20 s
        with ledger.phase("step"):
            clock.passes(0.002)
        ledger.step(number)
    assert len(lines(tmp_path)) in (4, 5)


# ---- by an accountant that paints every interval -----------------------------------------------------------------------------------


class Accountant:
    """Truth: a list of (class, length, attempt) where attempt = (step, number of the attempt) for step time."""

    def __init__(self):
        self.painted: list[tuple[str, int, tuple[int, int] | None]] = []
        self.attempts: dict[int, int] = {}
        self.kept: dict[int, int] = {}

    def paint(self, name: str, micro: int, attempt: tuple[int, int] | None = None) -> None:
        self.painted.append((name, micro, attempt))

    def totals(self) -> dict[str, float]:
        out = dict.fromkeys(CLASSES, 0)
        for name, micro, attempt in self.painted:
            if attempt is not None and self.kept.get(attempt[0]) != attempt[1]:
                name = "lost work"
            out[name] += micro
        return {name: micro / 1e6 for name, micro in out.items()}


@pytest.mark.parametrize("seed", range(40))
def test_classes_partition_the_time_of_random_lives(tmp_path, seed):
    """Random phases, kills, clean stops, rewinds and queues, in microseconds: every class is as painted, and they add up to the clock."""
    draw, clock, truth = random.Random(seed), Clock(), Accountant()
    saved, life, stopped, submitted_by = 0, 0, None, seed % 2 == 0

    def goes_by(name: str, attempt=None, most: int = 3_000_000) -> None:
        micro = draw.randrange(1, most)
        clock.now = round(clock.now * 1e6 + micro) / 1e6
        truth.paint(name, micro, attempt)

    while True:
        life += 1
        way = {}
        if submitted_by:
            way["submitted"] = clock.now
            goes_by("queue")
            way["started"] = clock.now
            goes_by("restart" if life > 1 else "start-up")
        elif stopped is not None:
            goes_by("queue" if stopped else "restart")
        ledger = Ledger(tmp_path / "goodput.jsonl", clock=clock, every=0.0)
        ledger.begin(life=life, restart=life > 1, **way)
        goes_by("restart" if life > 1 else "start-up")
        if draw.random() < 0.3:
            with ledger.phase("evaluation"):
                goes_by("evaluation")
        if draw.random() < 0.5:  # said, or seen when the steps are done again
            ledger.rewind(saved)
            truth.kept = {number: attempt for number, attempt in truth.kept.items() if number <= saved}
        step, end, stopped = saved, saved + draw.randrange(0, 12), draw.random() < 0.3 or life > 12
        while step < end or life > 12 and step < max([30, *truth.attempts]):
            number = step + 1
            attempt = (number, truth.attempts.get(number, 0) + 1)
            truth.attempts[number] = attempt[1]
            with ledger.phase("step"):
                goes_by("step", attempt)
                if draw.random() < 0.5:
                    with ledger.phase("data"):
                        goes_by("data wait")
                        if draw.random() < 0.1:
                            with ledger.phase("compile"):
                                goes_by("compile")
                    goes_by("step", attempt)
                if draw.random() < 0.1 and not stopped:
                    with ledger.phase("evaluation"):
                        goes_by("evaluation")
                    break  # killed in mid-step, after a line was written
            ledger.step(number)
            truth.kept[number] = attempt[1]
            step = number
            if draw.random() < 0.2:
                with ledger.phase("checkpoint"):
                    goes_by("checkpoint")
                saved = step
            if draw.random() < 0.05 and step > saved:  # a bad loss
                ledger.rewind(saved)
                for later in range(saved + 1, step + 1):
                    truth.kept.pop(later)
                step = saved
        if stopped:
            with ledger.phase("checkpoint"):
                goes_by("checkpoint")
            saved = step
            ledger.close("done")
            if life > 12:
                break
        else:
            if not submitted_by and draw.random() < 0.5:
                continue  # the next begins at once
            if draw.random() < 0.7:
                goes_by("restart")
    found = read_goodput(tmp_path)
    assert found.seconds == truth.totals()
    assert sum(found.seconds.values()) == pytest.approx(clock.now - EPOCH, abs=1e-5)
    assert sum(sum(span.micro.values()) for span in found.spans) == round(found.wall * 1e6)
    assert all(micro >= 0 for span in found.spans for micro in span.micro.values())
    assert found.steps == step


# ---- what goes wrong ---------------------------------------------------------------------------------------------------------------

LIFE = """
import os, sys, time
from megatron_ext.observe.goodput import Ledger
ledger, done = Ledger(sys.argv[1], every=0.2), os.open(sys.argv[1] + ".done", os.O_WRONLY | os.O_CREAT)
ledger.begin(life=int(sys.argv[2]), restart=sys.argv[2] != "1")
number = 0
while True:
    with ledger.phase("step"):
        time.sleep(0.01)
    number += 1
    now = time.time()
    ledger.step(number)
    os.pwrite(done, b"%.6f" % now, 0)
    if number == 30:
        print("on", flush=True)
"""


def test_sigkill_and_a_torn_line(tmp_path):
    path = tmp_path / "goodput.jsonl"
    began = time.time()
    for life in ("1", "2"):
        process = subprocess.Popen([sys.executable, "-c", LIFE, str(path), life], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert process.stdout.readline() == b"on\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        killed = time.time()
        with open(path, "ab") as file:
            file.write(b'{"kind": "time", "life": 1, "from": 17')
    found = read_goodput(tmp_path)
    assert [life.clean for life in found.lives] == [False, None]
    done = float((tmp_path / "goodput.jsonl.done").read_text())  # the last step that it completed; the kill may come any time later
    assert done - 0.201 < found.lives[1].ended < killed, "no more than 0.2 s, and a step, are lost"
    assert found.wall < killed - began and found.seconds["lost work"] > 0.05 and found.seconds["step"] > 0.05


def test_a_disk_that_is_full_for_a_while_loses_nothing(tmp_path, monkeypatch):
    clock = Clock()
    ledger = Ledger(tmp_path / "goodput.jsonl", clock=clock, every=0.0)
    ledger.begin(life=1)
    train(ledger, clock, range(1, 6))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        train(ledger, clock, range(6, 12))
    monkeypatch.undo()
    assert read_goodput(tmp_path).steps == 5
    ledger.step(12)
    found = read_goodput(tmp_path)
    assert found.steps == 12 and found.wall == clock.now - EPOCH


def test_clocks_that_are_set_back_and_nodes_that_are_behind(tmp_path):
    clock = Clock()
    ledger = Ledger(tmp_path / "goodput.jsonl", clock=clock, every=0.0)
    ledger.begin(life=1)
    clock.passes(10)
    ledger.step(1)
    clock.passes(-5)
    ledger.step(2)
    clock.passes(8)
    ledger.step(3)
    clock.passes(-100)  # another node
    ledger = Ledger(tmp_path / "goodput.jsonl", clock=clock, every=0.0)
    ledger.begin(life=2, submitted=clock.now - 50, started=clock.now - 20, restart=True)
    clock.passes(4)
    ledger.step(4)
    ledger.close("done")
    found = read_goodput(tmp_path)
    assert nonzero(found) == {"start-up": 10, "step": 3, "restart": 4} and found.wall == 17 and found.steps == 4


def test_a_rewind_and_a_checkpoint_in_mid_line(tmp_path):
    clock = Clock()
    ledger = Ledger(tmp_path / "goodput.jsonl", clock=clock, every=1e6)
    ledger.begin(life=1)
    train(ledger, clock, range(1, 9), save=100, first="step")  # one line: 4 + 7 s of steps, 2 s of waiting
    ledger.rewind(6)
    clock.passes(3)
    ledger.step(7)
    ledger.close("done")
    found = read_goodput(tmp_path)
    assert found.steps == 7 and found.seconds["lost work"] == pytest.approx(11 * 2 / 8) and found.seconds["step"] == pytest.approx(11 * 6 / 8 + 3)


def test_a_life_that_says_it_failed(tmp_path):
    clock = Clock()
    ledger = Ledger(tmp_path / "goodput.jsonl", clock=clock)
    ledger.begin(life=1, started=clock.now - 2)
    train(ledger, clock, range(1, 3))
    clock.passes(7)
    ledger.close("RuntimeError: NCCL", clean=False)
    ledger.close("twice")
    ledger.step(3)
    found = read_goodput(tmp_path)
    assert found.failures == 1 and found.lives[0].reason == "RuntimeError: NCCL" and found.seconds["lost work"] == 7 and found.seconds["step"] == 1


def test_without_a_file_or_a_begin_nothing_is_counted(tmp_path):
    silent = Ledger(None)
    silent.begin(life=1)
    for ledger in (silent, Ledger(tmp_path / "goodput.jsonl")):
        with ledger.phase("step"):
            pass
        ledger.step(1)
        ledger.rewind(0)
        ledger.close("done")
        with pytest.raises(ValueError, match="stepp"), ledger.phase("stepp"):
            pass
    found = read_goodput(tmp_path)
    assert not found.lives and found.goodput is None and found.mttf is None and found.interval is None and found.wall == 0


def test_lines_that_are_none_of_ours(tmp_path):
    clock = Clock()
    campaign(tmp_path, clock, every=0.0)
    path, truth = tmp_path / "goodput.jsonl", read_goodput(tmp_path).seconds
    good = path.read_text().splitlines()
    bad = ['{"kind": "time", "life": 4}', '{"kind": "time", "life": 4, "from": "x", "to": 1, "seconds": {}}', "[]", "null", "{", "\x00\x00",
           '{"kind": "time", "life": 4, "from": 1.0, "to": 2.0, "seconds": {"sleep": 1.0}}', '{"kind": "begin"}', '{"kind": "begin", "time": "NaN", "life": 1}',
           '{"kind": "time", "life": 4, "from": 1.0, "to": 2.0, "seconds": {"step": -1.0}}', '{"kind": "rewind", "life": 4, "step": null}', '{"kind": 7}',
           '{"kind": "time", "life": 4, "from": 1.0, "to": 2.0, "seconds": {"step": 1.0}, "first": 9, "last": 8}',
           '{"kind": "time", "life": 1, "from": 1.0, "to": 2.0, "seconds": {"step": 1.0}, "first": 1, "last": 1}']  # the last: a life that had been given up
    path.write_text("\n".join([*bad, *good[:-1], *bad, good[-1], *bad]) + "\n")
    assert read_goodput(tmp_path).seconds == truth


# ---- the interval ------------------------------------------------------------------------------------------------------------------


def test_the_interval_is_youngs(tmp_path):
    """Two failures in 7,200 s of lives and saves of 20.5 s: sqrt(2 x 3600 x 20.5) = 384.19 s, 192 steps of 2 s."""
    clock = Clock()
    for life, seconds in ((1, 3000.0), (2, 3000.0), (3, 1200.0)):
        ledger = Ledger(tmp_path / "goodput.jsonl", clock=clock)
        ledger.begin(life=life, restart=life > 1)
        for number in range(1, int(seconds / 2) + 1):
            with ledger.phase("step"):
                clock.passes(2.0)
            ledger.step(1500 * (life - 1) + number)
        with ledger.phase("checkpoint"):
            pass
    events = Events(tmp_path / "events.jsonl")
    for seconds in (1000.0, 19.0, 20.0, 21.0):
        events.write("save", step=1, seconds=seconds, stalled=0.1)
    events.write("save_failed", step=2, reason="full")
    events.close()
    ledger.close("done")
    found = read_goodput(tmp_path)
    assert found.mttf == 3600 and found.write_seconds == 20.5 and found.step_seconds == 2.0
    assert found.interval == pytest.approx(384.1875) and steps_between_saves(found, 2.0) == 192
    assert steps_between_saves(found, 1e6) == 1 and steps_between_saves(found, None) == 0 == steps_between_saves(found, 0.0)


def test_the_interval_before_a_failure_grows_with_the_time_that_went_well(tmp_path):
    clock, shown = Clock(), []
    ledger = Ledger(tmp_path / "goodput.jsonl", clock=clock, every=0.0)
    ledger.begin(life=1)
    events = Events(tmp_path / "events.jsonl")
    assert steps_between_saves(read_goodput(tmp_path), 1.0) == 0, "no save was timed"
    events.write("save", step=1, seconds=8.0)
    for seconds in (1.0, 99.0, 9900.0):
        clock.passes(seconds)
        ledger.step(len(shown) + 1)
        shown.append(steps_between_saves(read_goodput(tmp_path), 1.0))
    assert shown == [8, 40, 400], "the write time at least; sqrt(2 x 100 x 8); sqrt(2 x 10000 x 8)"
    events.close()


# ---- when the job was handed in ----------------------------------------------------------------------------------------------------

SCONTROL = """#!/bin/sh
echo "JobId=41 JobName=x SubmitTime=2026-01-01T00:00:00 EligibleTime=2026-01-01T00:00:00 StartTime=2026-01-01T00:00:01"
echo "JobId=42 JobName=StartTime=7 SubmitTime=2026-11-24T18:00:00 EligibleTime=2026-11-24T18:00:00 StartTime=${START} EndTime=Unknown"
"""


@pytest.mark.parametrize("start", ["2026-11-24T18:05:30", "Unknown"])
def test_slurm_says_when(tmp_path, monkeypatch, start):
    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("START", start)
    monkeypatch.setenv("TZ", "Asia/Seoul")
    time.tzset()
    try:
        found = allocation.allocation_times({"SLURM_JOB_ID": "42", "SLURM_JOB_START_TIME": "1764000000"})
    finally:
        monkeypatch.undo()
        time.tzset()
    at_six = 1_795_510_800.0  # 2026-11-24 09:00 UTC, 18:00 in Seoul
    assert found == (at_six, 1764000000.0 if start == "Unknown" else at_six + 330)


def test_without_slurm_the_process_says_when(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    submitted, started = allocation.allocation_times({})
    assert submitted is None and 0 < time.time() - started < 24 * 3600
    before = time.time()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        for began in (allocation.process_start(child.pid), allocation.allocation_times({"MEGATRON_EXT_PARENT": str(child.pid)})[1]):
            assert before - 0.1 < began < time.time() + 0.1  # not so long ago: a machine may stand still meanwhile
    finally:
        child.communicate(b"\n")
    assert allocation.process_start(child.pid) is None
    assert allocation.allocation_times({"SLURM_JOB_ID": "7"}) == (None, None), "no scontrol here"
    assert allocation.allocation_times({"SLURM_JOB_ID": "7; reboot", "SLURM_JOB_START_TIME": "x"}) == (None, None)
    assert allocation.allocation_times({"MEGATRON_EXT_STARTED": "1700000000.5", "SLURM_JOB_ID": "7"}) == (None, 1700000000.5)
