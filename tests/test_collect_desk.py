"""The desk: who gets which task, what a decision changes, what is refused, undo. Its log: test_collect_log.py."""
import json

import pytest
from collecting import ORDER, Clock, config, desk, task, write_tasks

from megatron_ext.errors import UserError
from rlhf.collect import ballots, links
from rlhf.collect.desk import Desk, Refused
from rlhf.collect.log import AppendLog


@pytest.fixture
def ten(tmp_path):
    return write_tasks(tmp_path, [task(number) for number in range(10)]), [task(number) for number in range(10)]


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
