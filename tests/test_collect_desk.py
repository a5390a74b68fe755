"""The desk: who gets which task, what a decision changes, undo, and a log that survives a crash at any byte."""
import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from collecting import config, read, task, write_tasks
from small import environment

from megatron_ext.errors import UserError
from rlhf.collect import ballots, links
from rlhf.collect.desk import Desk, Refused
from rlhf.collect.export import export, merged
from rlhf.collect.log import AppendLog
from rlhf.collect.progress import status, text
from rlhf.collect.tasks import Answer
from rlhf.data import records


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def desk(folder, tasks, *words: str, clock=None) -> Desk:
    return Desk({one.id: one for one in tasks}, AppendLog(folder / ballots.FILE, key="input"), config(*words).collect, clock or Clock(), clock or Clock())


@pytest.fixture
def ten(tmp_path):
    return write_tasks(tmp_path, [task(number) for number in range(10)]), [task(number) for number in range(10)]


ORDER = [["a0"], ["a1", "a2"]]


# ---- who gets what -----------------------------------------------------------------------------------------------------------------

def test_two_people_never_get_the_same_task_unless_it_is_shared(ten):
    folder, tasks = ten
    at = desk(folder, tasks, "collect.shared=0")
    seen = []
    for _ in range(5):
        for name in ("kim", "lee"):
            found = at.current(name)
            assert at.current(name) is found  # it stays on the screen
            seen.append(found.id)
        for name in ("lee", "kim"):
            at.decide(name, at.current(name).id, ORDER)
    assert sorted(seen) == [one.id for one in tasks] and at.current("kim") is None and at.progress()["total"]["done"] == 10
    assert not at.state("kim")["waiting"]


def test_shared_tasks_are_handed_to_others_first(ten):
    folder, tasks = ten
    at = desk(folder, tasks, "collect.shared=1", "collect.shared_votes=2")
    mine = [at.current("kim").id]
    at.decide("kim", mine[0], ORDER)
    assert at.current("lee").id == mine[0] and at.current("park").id not in mine  # two votes, one given, one on lee's screen
    at.decide("lee", mine[0], ORDER)
    assert at.agreement()["tasks"] == 1 and at.agreement()["pairs"] == 1.0
    for name in ("kim", "lee", "park") * 10:
        if (found := at.current(name)) is not None:
            at.decide(name, found.id, ORDER)
    assert all(len(at.ballots.choices[one.id]) == 2 for one in tasks)


def test_the_share_is_about_what_was_asked_for(tmp_path):
    tasks = [task(number) for number in range(2_000)]
    at = desk(tmp_path, tasks, "collect.shared=0.1")
    assert 160 < sum(at._wanted(one) == 2 for one in tasks) < 240


def test_domains_that_are_behind_their_target_come_first(tmp_path):
    tasks = [task(number, domain="law") for number in range(4)] + [task(number + 10, domain="tax") for number in range(4)]
    at = desk(tmp_path, tasks, "collect.targets=[law:1,tax:3]", "collect.shared=0")
    seen = []
    while (found := at.current("kim")) is not None:
        seen.append(found.domain)
        at.decide("kim", found.id, ORDER)
    assert seen == ["law", "tax", "tax", "tax", "law", "tax", "law", "law"]
    assert at.progress()["domains"] == [{"domain": "law", "done": 4, "there": 4, "target": 1}, {"domain": "tax", "done": 4, "there": 4, "target": 3}]


def test_a_task_that_nobody_answers_goes_to_others_after_the_lease(tmp_path):
    clock = Clock()
    at = desk(tmp_path, [task(0)], "collect.shared=0", "collect.lease=60", clock=clock)
    assert at.current("kim").id == "t0000" and at.current("lee") is None and at.state("lee")["waiting"]
    clock.now += 61
    assert at.current("lee").id == "t0000"
    at.decide("lee", "t0000", ORDER)
    at.decide("kim", "t0000", [["a2"], ["a1"], ["a0"]])  # who had it still may answer: nothing is thrown away
    assert set(at.ballots.choices["t0000"]) == {"kim", "lee"}


def test_a_clock_that_is_set_back_or_forward_changes_no_lease(tmp_path):
    wall, ticks = Clock(), Clock()
    folder, tasks = write_tasks(tmp_path, [task(0)]), {"t0000": task(0)}
    at = Desk(tasks, AppendLog(folder / ballots.FILE, key="input"), config("collect.shared=0", "collect.lease=60").collect, wall, ticks)
    assert at.current("kim").id == "t0000"
    wall.now += 10**8
    assert at.current("lee") is None  # it is still kim's
    wall.now -= 2 * 10**8
    ticks.now += 61
    assert at.current("lee").id == "t0000"
    at.decide("lee", "t0000", ORDER)
    at._log.close()
    taken = ballots.load(folder).choices["t0000"]["lee"]
    assert taken.seconds == 0 and at.ballots.person("kim").since > wall.now
    # A restart while the clock stands before what the log says: the lease begins anew, and ends.
    (folder / ballots.FILE).write_text(json.dumps({"event": "open", "annotator": "kim", "task": "t0000", "at": wall.now + 10**9}) + "\n")
    at = Desk(tasks, AppendLog(folder / ballots.FILE, key="input"), config("collect.shared=0", "collect.lease=60").collect, wall, ticks)
    assert at.current("lee") is None
    ticks.now += 61
    assert at.current("lee").id == "t0000"


def test_everyone_sees_answers_in_another_order_and_always_in_the_same(tmp_path):
    tasks = [task(number, answers=6) for number in range(30)]
    at = desk(tmp_path, tasks)
    kim, lee = ([at.shown(name, one) for one in tasks] for name in ("kim", "lee"))
    assert kim != lee and kim == [at.shown("kim", one) for one in tasks] and all(sorted(order) == [f"a{number}" for number in range(6)] for order in kim)
    first = [order[0] for order in kim + lee]
    assert all(first.count(f"a{number}") < 25 for number in range(6))  # no answer has the first place to itself


# ---- what is refused ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("order", [None, [], "a0", [["a0"], ["a1"]], [["a0"], ["a1"], ["a2"], ["a2"]], [["a0", "a1", "a9"]], [["a0"], [], ["a1", "a2"]], [[1, 2, 3]], ["a0", "a1", "a2"]])
def test_orders_that_are_none(ten, order):
    folder, tasks = ten
    at = desk(folder, tasks)
    with pytest.raises(Refused) as caught:
        at.decide("kim", at.current("kim").id, order)
    assert caught.value.code == 422 and not at.ballots.choices


def test_calls_that_come_twice_or_too_late(ten):
    folder, tasks = ten
    at = desk(folder, tasks, "collect.shared=0")
    first = at.current("kim").id
    at.decide("kim", first, ORDER)
    before = at.ballots.actions
    at.decide("kim", first, ORDER)  # its answer was lost on the way, and it is sent once more
    assert at.ballots.actions == before
    with pytest.raises(Refused) as caught:
        at.decide("kim", first, [["a2"], ["a1"], ["a0"]])  # another window
    assert caught.value.code == 409
    for wrong, code in (("t9999", 404), (None, 404), (["t0001"], 404)):
        with pytest.raises(Refused) as caught:
            at.decide("kim", wrong, ORDER)
        assert caught.value.code == code
    with pytest.raises(Refused):
        at.skip("kim", at.current("kim").id, "boring")
    with pytest.raises(Refused, match="nothing to undo"):
        at.undo("lee")


# ---- undo --------------------------------------------------------------------------------------------------------------------------

def test_undo_goes_back_as_far_as_one_likes(ten):
    folder, tasks = ten
    at = desk(folder, tasks, "collect.shared=0")
    done = []
    for number in range(4):
        done.append(at.current("kim").id)
        if number == 2:
            at.skip("kim", done[-1], "all_bad")
        else:
            at.decide("kim", done[-1], ORDER)
    ahead = at.current("kim").id
    assert at.progress()["total"]["done"] == 3
    for number in (3, 2, 1, 0):
        at.undo("kim")
        state = at.state("kim")
        assert state["task"]["id"] == done[number] and state["task"]["draft"] == (None if number == 2 else ORDER)
    assert not at.ballots.choices and at.progress()["total"]["done"] == 0
    assert at.current("lee").id == "t0005"  # what kim goes back over stays kim's
    at.decide("kim", done[0], [["a2"], ["a1"], ["a0"]])
    assert at.ballots.choices[done[0]]["kim"].order == (("a2",), ("a1",), ("a0",))
    for expected in (*done[1:], ahead, "t0006"):  # and forward again, each with the order that was undone
        state = at.state("kim")
        assert state["task"]["id"] == expected and state["task"]["draft"] == (ORDER if expected in (done[1], done[3]) else None)
        at.decide("kim", expected, ORDER)


# ---- the log -----------------------------------------------------------------------------------------------------------------------

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
    for size in sorted({0, 1, len(whole), *ends[:3], *(end - 1 for end in ends[:3]), *(draw.randrange(len(whole)) for _ in range(60))}):
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


# ---- who may come in ---------------------------------------------------------------------------------------------------------------

def test_tokens_are_kept_as_hashes_and_can_be_renewed(tmp_path):
    allowed, made = links.ready(tmp_path, ["kim", "이"])
    assert set(made) == {"kim", "이"} and links.who(made["kim"], allowed) == "kim" and links.who("", allowed) is None
    content = (tmp_path / links.FILE).read_text()
    assert not any(token in content for token in made.values()) and (tmp_path / links.FILE).stat().st_mode & 0o777 == 0o600
    again, none = links.ready(tmp_path, ["kim", "이"])
    assert again == allowed and none == {}
    renewed, new = links.ready(tmp_path, ["kim", "이"], ["kim"])
    assert links.who(made["kim"], renewed) is None and links.who(new["kim"], renewed) == "kim" and links.who(made["이"], renewed) == "이"
    fewer, _ = links.ready(tmp_path, ["이"])
    assert links.who(new["kim"], fewer) is None  # who is not named does not come in
    (tmp_path / links.FILE).write_text("kim: 1\n")
    with pytest.raises(UserError, match="is damaged"):
        links.ready(tmp_path, ["kim"])


# ---- export ------------------------------------------------------------------------------------------------------------------------

def test_merged_orders():
    assert merged([(("a",), ("b",), ("c",))]) == (("a",), ("b",), ("c",))
    assert merged([(("a",), ("b",), ("c",)), (("b",), ("a",), ("c",))]) == (("a", "b"), ("c",))
    assert merged([(("a",), ("b", "c")), (("c",), ("b",), ("a",))]) == (("c",), ("a",), ("b",))  # sums of ranks 3.5, 4, 4.5
    assert merged([(("a",), ("b",)), (("b",), ("a",))]) == (("a", "b"),)


def test_export_is_what_the_reward_stage_reads(ten):
    folder, tasks = ten
    at = desk(folder, tasks, "collect.shared=0")
    for number, order in enumerate(([["a1"], ["a0", "a2"]], [["a0", "a1", "a2"]], None, [["a0"], ["a1"], ["a2"]])):
        found = at.current("kim")
        assert found.id == f"t{number:04d}"
        at.decide("kim", found.id, order) if order else at.skip("kim", found.id, "unclear")
    at._log.close()
    found = export(config(f"input={folder}"))
    assert found["left_out"] == {"all_tie": 1, "not_decided": 6, "skipped": 1}
    rows = read(folder / "rankings.jsonl")
    assert rows[0] == {"id": "t0000", "prompt": "Question 0?", "responses": [{"id": f"a{place}", "text": f"good {place}"} for place in range(3)], "ranking": [["a1"], ["a0", "a2"]],
                       "votes": 1, "domain": "education", "language": "en", "source": {"id": "doc0", "file": "x.jsonl", "line": 0}}
    assert found["origins"]["model1"] == {"answers": 3, "best": 2, "mean_rank": round((1 + 2 + 2) / 3, 3)}
    kept, bad = records.read(folder / "rankings.jsonl", config().chat, records.Ranking)
    assert bad.count == 0 and [one.ranks for one in kept] == [(1, 0, 1), (0, 1, 2)]
    export(config(f"input={folder}", f"output={folder / 'pairs'}", "collect.format=preference"))
    kept, bad = records.read(folder / "pairs" / "preferences.jsonl", config().chat, records.Ranking)
    assert bad.count == 0 and [one.responses for one in kept] == [("good 1", "good 0"), ("good 1", "good 2"), ("good 0", "good 1"), ("good 0", "good 2"), ("good 1", "good 2")]
    export(config(f"input={folder}", f"output={folder / 'best'}", "collect.format=sft"))
    assert [row["response"] for row in read(folder / "best" / "best.jsonl")][:1] == ["good 1"]
    assert "kim" not in "".join(path.read_text() for path in (folder / "rankings.jsonl", folder / "export.yaml"))


def test_several_votes_become_one_record_or_stay_several(ten):
    folder, tasks = ten
    at = desk(folder, tasks, "collect.shared=1", "collect.shared_votes=3")
    for name, order in (("kim", [["a0"], ["a1"], ["a2"]]), ("lee", [["a0"], ["a2"], ["a1"]]), ("park", [["a1"], ["a0"], ["a2"]])):
        at.current(name)
        at.decide(name, "t0000", order)
    at._log.close()
    export(config(f"input={folder}"))
    only, = read(folder / "rankings.jsonl")
    assert only["ranking"] == [["a0"], ["a1"], ["a2"]] and only["votes"] == 3  # mean ranks 4/3, 2, 8/3
    export(config(f"input={folder}", "collect.merge=each"))
    assert [row["ranking"][0] for row in read(folder / "rankings.jsonl")] == [["a0"], ["a0"], ["a1"]]


def test_status_counts_while_a_server_holds_the_log(ten):
    folder, tasks = ten
    at = desk(folder, tasks, "collect.shared=1", "collect.shared_votes=2")
    for name in ("kim", "lee"):
        found = at.current(name)
        at.decide(name, found.id, ORDER)
    at.skip("kim", at.current("kim").id, "harmful")
    found = status(folder, config("collect.domain_target=4", "collect.target=8").collect)
    assert found["ranked"] == {"total": {"done": 1, "there": 10, "target": 8}, "domains": [{"domain": "education", "done": 1, "there": 10, "target": 4}]}
    assert found["annotators"] == {"kim": 2, "lee": 1} and found["skipped"] == {"harmful": 1} and found["agreement"]["pairs"] == 1.0
    shown = text(found)
    assert "education" in shown and "25.0%" in shown and "12.5%" in shown and "alpha" in shown and "kim: 100% of 2 pairs" in shown
    with pytest.raises(UserError, match="holds no decision"):
        export(config(f"input={write_tasks(folder / 'new', tasks)}"))
