"""What people decided, as the stages read it, and how far there is to go."""
import pytest
from collecting import ORDER, config, desk, read, task, write_tasks

from megatron_ext.errors import UserError
from rlhf.collect.export import export, merged
from rlhf.collect.progress import status, text
from rlhf.data import records


@pytest.fixture
def ten(tmp_path):
    return write_tasks(tmp_path, [task(number) for number in range(10)]), [task(number) for number in range(10)]


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
