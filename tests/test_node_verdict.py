"""The judgement of the node check, against hand-made measurements; and who meets whom. No torch."""
import itertools
import json
import random

import pytest

from megatron_ext.contact import pairing
from megatron_ext.contact.findings import Limits
from megatron_ext.contact.verdict import judge

GPU = {"index": 0, "uuid": "GPU-a", "name": "H100", "memory": 80.0, "memory_used": 0.5, "processes": [], "clock": 1980, "clock_max": 1980, "temperature": 40,
       "throttle": [], "ecc_uncorrected": 0, "rows_pending": False, "rows_failed": False, "pages_pending": False, "pcie_width": 16, "pcie_width_max": 16,
       "nvlinks": 18, "nvlinks_down": 0}


def fact(node: str, *, local: int = 0, tflops: float = 100.0, gpu: dict | None = None, disk_facts: dict | None = None, **more) -> dict:
    found = {"node": node, "local": local, "gpus": [{**GPU, "uuid": f"{node}/{i}", "index": i, **(gpu or {})} for i in range(2)], "cuda": 2,
             "versions": {"torch": "2.13"}, "gemm": {"tflops": tflops, "wrong": 0}}
    if local == 0:
        found["disk"] = {"write_mb_s": 800.0, "read_mb_s": 900.0, "damaged": 0, "free_gib": 500.0, "shared": True, **(disk_facts or {})}
    return {**found, **more}


def said(verdict) -> str:
    return verdict.text()


def met(nodes: list[str], speed, *, kinds=("inside", "across")) -> list[dict]:
    """What ranks on `nodes` would have measured, had a pair of ranks (a < b) the bandwidth `speed(a, b)`."""
    found = [{"all_reduce_gb_s": 50.0, "all_reduce_wrong": 0, "pairs": []} for _ in nodes]
    for number, (kind, pairs) in enumerate(pairing.rounds(nodes)):
        for a, b in pairs:
            if kind in kinds:
                for me, peer in ((a, b), (b, a)):
                    found[me]["pairs"].append({"kind": kind, "peer": peer, "round": number, "gb_s": speed(a, b), "wrong": 0})
    return found


# ---- the verdict ---------------------------------------------------------------------------------------------------------------


def test_good_nodes():
    nodes = ["a", "a", "b", "b", "c", "c"]
    verdict = judge([fact(node, local=i % 2) for i, node in enumerate(nodes)], met(nodes, lambda a, b: 20.0), Limits(gpus=2, gemm_floor=90, pair_floor=15))
    assert verdict.good and not verdict.exclude and not verdict.bad_nodes and said(verdict).endswith("node check: good")
    assert "6 rank(s) on 3 node(s)" in said(verdict) and "6 x H100" in said(verdict) and "GEMM 100 TFLOP/s" in said(verdict)
    assert json.loads(json.dumps(verdict.json()))["good"] is True


@pytest.mark.parametrize(("bad", "words"), [
    ({"gpu": {"ecc_uncorrected": 3}}, "GPU 0: 3 uncorrectable memory error"),
    ({"gpu": {"rows_pending": True}}, "waits for a reset"),
    ({"gpu": {"rows_failed": True}}, "could not be replaced"),
    ({"gpu": {"throttle": ["hardware thermal"], "clock": 800}}, "slowed down (hardware thermal), 800 of 1980 MHz, 40 C"),
    ({"gpu": {"pcie_width": 8}}, "PCIe with 8 of 16 lanes"),
    ({"gpu": {"nvlinks": 16, "nvlinks_down": 2}}, "2 of 18 NVLinks down"),
    ({"gpu": {"processes": [77], "memory_used": 9.5}}, "9.5 GiB in use before the run, by process(es) 77"),
    ({"gpu": {"error": "Unknown Error"}}, "does not answer"),
    ({"load": {"throttle": ["power brake"]}}, "slowed down under load (power brake)"),
    ({"tflops": 80.0}, "multiplies matrices at 80 TFLOP/s, the others at 100"),
    ({"gemm": {"tflops": 100.0, "wrong": 2}}, "multiplies wrong: 2 sums"),
    ({"gemm": {"error": "CUDA error: device-side assert"}}, "cannot multiply matrices: CUDA error"),
    ({"disk_facts": {"damaged": 1}}, "1 MiB of the run directory came back different"),
    ({"disk_facts": {"shared": False}}, "is not seen here"),
    ({"disk_facts": {"write_mb_s": 10.0}}, "writes the run directory at 10 MB/s, at least 100"),
    ({"disk": {"error": "No space left on device"}}, "cannot be written: No space left on device"),
    ({"versions": {"torch": "2.9"}}, "has torch 2.9, 2 other node(s) 2.13"),
    ({"gpus": [GPU]}, "1 GPU(s), 2 expected"),
    ({"gpus": [], "cuda": 1}, "1 GPU(s), 2 expected"),
])
def test_a_node_that_falls_short_is_named_and_left_out(bad, words):
    verdict = judge([fact("a"), fact("b", **bad), fact("c")], None, Limits(gpus=2, disk_floor=100.0))
    assert not verdict.good and verdict.bad_nodes == verdict.exclude == ["b"]
    assert words in said(verdict) and said(verdict).endswith("bad: b; leave out b")


@pytest.mark.parametrize("harmless", [
    {"gpu": {"throttle": ["power cap"]}}, {"gpu": {"memory_used": 0.9, "processes": [1]}}, {"gpu": {"memory_used": 9.0}}, {"tflops": 86.0},
    {"gpus": [{"index": i} for i in range(2)]},
])
def test_what_is_no_fault(harmless):
    assert judge([fact("a"), fact("b", **harmless), fact("c")], None, Limits(gpus=2)).good


def test_where_all_fall_short_none_is_left_out():
    verdict = judge([fact(node, tflops=50.0) for node in "abc"], None, Limits(gemm_floor=90.0))
    assert verdict.bad_nodes == ["a", "b", "c"] and verdict.exclude == []


def test_what_is_wrong_and_nobodys_fault_excludes_nobody():
    shared = [fact("a", device_uuid="GPU-x"), fact("a", local=1, device_uuid="GPU-x"), fact("b")]
    for facts, limits, words in (
        (shared, Limits(), "ranks 0, 1 share one GPU"), ([fact("a"), fact("b", disk_facts={"free_gib": 1.5})], Limits(free_gib=100), "1.5 GiB free"),
    ):
        verdict = judge(facts, None, limits)
        assert not verdict.good and verdict.exclude == [] and words in said(verdict)


def test_slow_gpu_on_a_single_node_is_compared_with_its_neighbours():
    facts = [fact("a", local=i, tflops=speed) for i, speed in enumerate((100.0, 101.0, 70.0, 99.0))]
    verdict = judge(facts, None, Limits())
    assert [p.what for p in verdict.problems] == ["rank 2 multiplies matrices at 70 TFLOP/s, the others at 100"]


def test_missing_ranks():
    facts = [fact("a"), None, fact("b"), None]
    named = judge(facts, None, Limits(), expected={"a": 1, "b": 2, "c": 1})
    assert named.exclude == ["b", "c"] and "1 of its 2 rank(s) did not report" in said(named)
    unknown = judge(facts, None, Limits())
    assert not unknown.good and unknown.exclude == [] and "rank(s) 1, 3 did not report" in said(unknown)


@pytest.mark.parametrize("count", [3, 4, 5, 8, 24])
@pytest.mark.parametrize("per_node", [1, 2])
def test_a_bad_nic_is_found_wherever_it_is(count, per_node):
    """Every node in turn, among healthy ones whose links scatter by a tenth."""
    names = [f"n{i}" for i in range(count) for _ in range(per_node)]
    scatter = random.Random(3)
    for bad in range(count):
        network_facts = met(names, lambda a, b, bad=f"n{bad}": scatter.uniform(19.0, 21.0) * (0.4 if bad in (names[a], names[b]) else 1.0))
        verdict = judge([fact(name, local=i % per_node) for i, name in enumerate(names)], network_facts, Limits())
        assert verdict.exclude == [f"n{bad}"], (bad, said(verdict))


def test_two_bad_nics():
    names = [f"n{i}" for i in range(6)]
    verdict = judge([fact(n) for n in names], met(names, lambda a, b: 5.0 if {"n1", "n4"} & {names[a], names[b]} else 20.0), Limits())
    assert sorted(verdict.exclude) == ["n1", "n4"]


def test_a_single_slow_link_is_a_note_and_under_the_floor_bad_of_nobody():
    names = list("abcd")
    facts, slow = [fact(n) for n in names], met(names, lambda a, b: 5.0 if (a, b) == (1, 2) else 20.0)
    verdict = judge(facts, slow, Limits())
    assert verdict.good and "b and c exchange 5 GB/s" in verdict.notes[0]
    verdict = judge(facts, slow, Limits(pair_floor=10.0))
    assert not verdict.good and verdict.exclude == [] and "no single node is at fault" in said(verdict)


def test_two_nodes_under_the_floor():
    verdict = judge([fact("a"), fact("b")], met(["a", "b"], lambda a, b: 5.0), Limits(pair_floor=10.0))
    assert not verdict.good and verdict.exclude == [] and "cannot be told" in said(verdict)


def test_a_slow_pair_inside_a_node_is_that_nodes():
    names = list("aaaabbbb")
    verdict = judge([fact(n, local=i % 4) for i, n in enumerate(names)], met(names, lambda a, b: 50.0 if (a, b) == (5, 6) else 300.0 if a // 4 == b // 4 else 20.0), Limits())
    assert verdict.exclude == ["b"] and "ranks 5 and 6 exchange 50 GB/s inside the node, others 300" in said(verdict)


def test_wrong_numbers_between_ranks():
    names = list("abc")
    wrong = met(names, lambda a, b: 20.0)
    wrong[1]["pairs"][0]["wrong"] = 7
    assert judge([fact(n) for n in names], wrong, Limits()).exclude == ["b"]
    wrong = met(names, lambda a, b: 20.0)
    wrong[2]["all_reduce_wrong"] = 5
    assert judge([fact(n) for n in names], wrong, Limits()).exclude == ["c"]
    for each in wrong:
        each["all_reduce_wrong"] = 5
    verdict = judge([fact(n) for n in names], wrong, Limits())
    assert verdict.bad_nodes == ["a", "b", "c"] and verdict.exclude == []


def test_hangs():
    names, facts = list("abcd"), [fact(n) for n in "abcd"]
    # Rank 2 stopped: who waits for it, and who waits for those, is not at fault.
    silent = [{"pairs": [], "stuck": {"what": "x", "peer": 2, "round": 0}}, {"pairs": [], "stuck": {"what": "x", "peer": 0, "round": 1}}, None, {"pairs": []}]
    verdict = judge(facts, silent, Limits())
    assert verdict.exclude == ["c"] and "rank 2 reported and then fell silent" in said(verdict)
    # The fabric between b and d is dead, both answer.
    both = [{"pairs": [], "stuck": {"what": "x", "peer": 1, "round": 2}}, {"pairs": [], "stuck": {"what": "x", "peer": 3, "round": 1}}, {"pairs": []},
            {"pairs": [], "stuck": {"what": "x", "peer": 1, "round": 1}}]
    assert sorted(judge(facts, both, Limits()).exclude) == ["b", "d"]
    # Nobody gets through.
    all_of_them = [{"pairs": [], "stuck": {"what": "all-reduce over all ranks", "peer": None, "round": None}} for _ in names]
    verdict = judge(facts, all_of_them, Limits())
    assert verdict.exclude == [] and "network: all-reduce over all ranks hung" in said(verdict) and len(verdict.problems) == 1


# ---- who meets whom ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("players", range(1, 17))
def test_a_tournament_is_everybody_against_everybody_once(players):
    rounds = pairing.tournament(players)
    assert sorted(pair for pairs in rounds for pair in pairs) == list(itertools.combinations(range(players), 2))
    assert all(len(set(itertools.chain(*pairs))) == 2 * len(pairs) for pairs in rounds)
    assert len(rounds) == (0 if players == 1 else players - 1 if players % 2 == 0 else players)


@pytest.mark.parametrize("players", [17, 100, 1000])
def test_many_players_meet_a_few_partners_each(players):
    rounds = pairing.tournament(players)
    assert len(rounds) <= 20 and all(len(set(itertools.chain(*pairs))) == 2 * len(pairs) for pairs in rounds)
    partners = [0] * players
    for a, b in itertools.chain(*rounds):
        partners[a] += 1
        partners[b] += 1
    assert min(partners) >= 2


def test_rounds_are_inside_nodes_and_then_across_in_lockstep():
    rounds = pairing.rounds(["a", "b", "a", "b", "a"])
    assert [pairs for kind, pairs in rounds if kind == "across"] == [[(0, 1), (2, 3)]]
    assert sorted(pair for kind, pairs in rounds if kind == "inside" for pair in pairs) == [(0, 2), (0, 4), (1, 3), (2, 4)]
    assert pairing.rounds(["a"]) == []
