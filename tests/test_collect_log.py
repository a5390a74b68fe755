"""The log of decisions: it survives a crash at any byte and a full disk, and what no longer fits the tasks is not taken for a decision."""
import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from collecting import ORDER, config, desk, read, task, write_tasks
from small import environment

from megatron_ext.errors import UserError
from rlhf.collect import ballots
from rlhf.collect.desk import Desk, Refused
from rlhf.collect.export import export
from rlhf.collect.log import AppendLog
from rlhf.collect.progress import status
from rlhf.collect.tasks import Answer


@pytest.fixture
def ten(tmp_path):
    return write_tasks(tmp_path, [task(number) for number in range(10)]), [task(number) for number in range(10)]


def play(at: Desk, draw: random.Random, actions: int) -> None:
    for _ in range(actions):
        name = draw.choice(["kim", "lee", "박지성"])
        found = at.current(name)
        try:
            if found is None or draw.random() < 0.2:
                at.undo(name)
            elif draw.random() < 0.2:
                at.skip(name, found.id, draw.choice(ballots.SKIPS))
            else:
                at.decide(name, found.id, [[one] for one in draw.sample([answer.id for answer in found.answers], 3)])
        except Refused:
            pass


def test_a_log_that_ends_anywhere_is_a_state_that_was(ten):
    """As after a crash: every prefix in bytes opens, and gives what its whole records say; the rest is set aside, and work goes on."""
    folder, tasks = ten
    at = desk(folder, tasks, "collect.shared=0.5")
    play(at, random.Random(3), 40)
    at._log.close()
    whole = (folder / ballots.FILE).read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == 10]
    draw = random.Random(4)
    for size in sorted({0, 1, len(whole), *ends[:3], *(end - 1 for end in ends[:3]), *(draw.randrange(len(whole)) for _ in range(25))}):
        (folder / ballots.FILE).write_bytes(whole[:size])
        kept = max([0, *(end for end in ends if end <= size)])
        again = desk(folder, tasks, "collect.shared=0.5")
        expected = ballots.Ballots(json.loads(line) for line in whole[:kept].splitlines())
        assert again.ballots.choices == expected.choices and again.ballots.people == expected.people
        assert again.progress()["total"]["done"] == sum(any(choice.order for choice in people.values()) for people in expected.choices.values())
        play(again, random.Random(size), 3)
        again._log.close()
        assert (folder / ballots.FILE).read_bytes().startswith(whole[:kept])
        assert len(ballots.load(folder).choices) == len(again.ballots.choices)
    torn = (folder / f"{ballots.FILE}.torn").read_bytes()
    for left in (b"\0" * 5000, b'{"event": "decide", "annotator": "kim", "ta' + b"\0" * 100, b"\xff\xfe"):  # what a machine that loses power leaves of a block
        (folder / ballots.FILE).write_bytes(whole + left)
        again = desk(folder, tasks, "collect.shared=0.5")
        assert (folder / ballots.FILE).read_bytes() == whole and again.ballots.actions == len(ends)
        again._log.close()
    assert torn and all(part in whole for part in torn.split(b"\n"))


def test_a_full_disk_takes_nothing_and_changes_nothing(ten, monkeypatch):
    folder, tasks = ten
    at = desk(folder, tasks)
    found, before, size = at.current("kim"), at.ballots.actions, (folder / ballots.FILE).stat().st_size
    real = os.write

    def full(file, data):
        real(file, data[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        at.decide("kim", found.id, ORDER)
    monkeypatch.undo()
    assert at.ballots.actions == before and (folder / ballots.FILE).stat().st_size == size
    at.decide("kim", found.id, ORDER)
    assert ballots.load(folder).choices[found.id]["kim"].order == (("a0",), ("a1", "a2"))


def test_a_log_is_one_process_s_and_is_private(ten):
    folder, tasks = ten
    at = desk(folder, tasks)
    with pytest.raises(UserError, match="is in use by another process"):
        AppendLog(folder / ballots.FILE, key="input")
    assert (folder / ballots.FILE).stat().st_mode & 0o777 == 0o600
    at._log.close()
    (folder / ballots.FILE).write_text("[1]\n")
    with pytest.raises(UserError, match=r"decisions.log:1: is no record"):
        desk(folder, tasks)
    (folder / ballots.FILE).write_text('{"event": "undo", "annotator": "kim", "task": "t0000", "at": 1}\n')
    with pytest.raises(UserError, match=r"decisions.log:1: is no action"):
        ballots.load(folder)


def test_a_writer_that_is_killed_loses_nothing_it_acknowledged(tmp_path):
    script = ("from rlhf.collect.log import AppendLog; from pathlib import Path\n"
              f"log = AppendLog(Path({str(tmp_path / 'x.log')!r}), key='x')\n"
              "for n in range(10**9):\n    log.append({'n': n, 'text': 'x' * 500}); print(n, flush=True)\n")
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment())
    said = [process.stdout.readline() for _ in range(50)]
    process.send_signal(signal.SIGKILL)
    said += process.stdout.read().splitlines()
    process.wait()
    with AppendLog(tmp_path / "x.log", key="x") as log:
        found = [record["n"] for _, _, record in log.records()]
    assert found == list(range(len(found))) and len(found) >= int([line for line in said if line.strip()][-1])


def test_tasks_that_changed_since_are_asked_again(tmp_path):
    """The file was made anew, by hand, with other texts or answers under the same ids: no decision is taken for what nobody saw."""
    first = {one.id: one for one in (task(number) for number in range(5))}
    folder = write_tasks(tmp_path, list(first.values()))
    at = desk(folder, first.values(), "collect.shared=1", "collect.shared_votes=2")
    for _ in range(5):
        for name in ("kim", "lee"):
            at.decide(name, at.current(name).id, [["a1"], ["a0"], ["a2"]])
    at.undo("kim")
    at.undo("lee")
    at._log.close()
    changed = {**first, "t0001": replace(first["t0001"], answers=(*first["t0001"].answers[:2], Answer("a2", "other words", "m"))),
               "t0002": task(2, answers=2), "t0004": replace(task(4, answers=2), prompt=({"role": "user", "content": "Other?"},))}
    del changed["t0000"]
    write_tasks(folder, list(changed.values()))
    exported = export(config(f"input={folder}"))
    assert exported["left_out"] == {"not_decided": 3, "task_changed": 2, "task_is_gone": 1} and [row["id"] for row in read(folder / "rankings.jsonl")] == ["t0003"]
    again = desk(folder, changed.values(), "collect.shared=0")
    assert again.misfits == {"task_changed": 2, "task_is_gone": 1} and again.progress()["total"]["done"] == 1
    assert again.state("kim")["task"]["draft"] is None  # t0004, open since the undo: the order was of answers that are not there
    seen = []
    while (found := again.current("kim")) is not None:
        seen.append(found.id)
        again.decide("kim", found.id, [[one.id] for one in found.answers])
    assert sorted(seen) == ["t0001", "t0002", "t0004"]
    for expected in (*reversed(seen), "t0003", "t0002", "t0001"):  # as far back as the log goes, through what was taken off; the task that is gone stops it
        again.undo("kim")
        assert again.current("kim").id == expected
    with pytest.raises(Refused, match="nothing to undo"):
        again.undo("kim")
    again._log.close()
    loaded = ballots.load(folder)  # it opens again, and says the same
    ballots.fit(loaded, changed)
    assert loaded.people == again.ballots.people and loaded.choices == again.ballots.choices
    assert status(folder, config().collect)["ranked"]["total"]["done"] == 1


def test_a_log_whose_orders_are_nonsense_is_not_exported(ten):
    folder, _ = ten
    (folder / ballots.FILE).write_text("".join(json.dumps({"event": "decide", "annotator": "kim", "task": f"t000{number}", "at": 1, "order": order}) + "\n" for number, order in
                                               enumerate(([["a0", "a1", "a2"]], [[1, 2, 3]], [["a0"], ["a0"], ["a1"]], [["a0"], ["a1"]], [["a2"], ["a1"], ["a0"]]))))
    assert export(config(f"input={folder}"))["left_out"] == {"all_tie": 1, "not_decided": 8, "task_changed": 3}


def test_what_a_full_disk_left_is_taken_off_when_there_is_room_again(ten, monkeypatch):
    """Not even the beginning of a record could be taken off at first."""
    folder, tasks = ten
    at = desk(folder, tasks)
    found, real = at.current("kim"), os.write

    def full(file, data):
        real(file, data[:5])
        raise OSError(28, "No space left on device")

    def broken(file, size):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        patched.setattr(os, "ftruncate", broken)
        with pytest.raises(OSError, match="No space"):
            at.decide("kim", found.id, ORDER)
    at.decide("kim", found.id, ORDER)
    assert [action["event"] for action in read(folder / ballots.FILE)] == ["open", "decide"]
