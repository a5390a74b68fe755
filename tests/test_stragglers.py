"""megatron_ext/health/stragglers.py by hand-computed windows, and what it takes from torch's collectives (one process, gloo)."""
import time
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_ext.health.stragglers import Pace, Straggler, Stragglers, find, same_work


def paces(*computes: float, step: float = 1.0) -> list[Pace]:
    return [Pace(f"node{rank}", compute, step) for rank, compute in enumerate(computes)]


def test_a_slow_rank_is_named_with_its_host_and_factor():
    (found,) = find(paces(0.5, 0.4, 0.9, 0.6), [(0, 1, 2, 3)], factor=1.5)
    assert found == Straggler(2, "node2", 0.9 / 0.5, 0.9, 0.5)  # the others: 0.4, 0.5, 0.6
    assert str(found) == "rank 2 (node2) computes 1.80 times as long as its peers: 900 ms a step outside collectives, they 500 ms"


def test_the_limit_is_the_limit():
    assert find(paces(0.5, 0.5, 0.75), [(0, 1, 2)], factor=1.5) == []
    assert [each.rank for each in find(paces(0.5, 0.5, 0.76), [(0, 1, 2)], factor=1.5)] == [2]


def test_of_two_ranks_the_other_one_is_the_measure():
    assert [(each.rank, each.factor) for each in find(paces(0.25, 0.5), [(0, 1)], factor=1.5)] == [(1, 2.0)]


def test_two_slow_ones_of_five_the_slowest_first():
    found = find(paces(0.2, 0.5, 0.2, 0.6, 0.2), [range(5)], factor=1.5)
    assert [(each.rank, each.peers) for each in found] == [(3, 0.2), (1, 0.2)]


def test_stages_are_not_compared_with_each_other():
    """The last stage (ranks 2 and 3) has the vocabulary and takes twice as long; rank 1 is slow among its own."""
    times = paces(0.2, 0.35, 0.6, 0.6)
    assert [each.rank for each in find(times, [(0, 1), (2, 3)], factor=1.5)] == [1]
    assert find(times, [(0,), (1,), (2,), (3,)], factor=1.5) == []


def test_what_costs_the_job_nothing_is_not_told():
    """Thrice as slow, by 40 ms of a step of one second."""
    assert find(paces(0.02, 0.06), [(0, 1)], factor=1.5) == []
    assert find(paces(0.0, 0.06), [(0, 1)], factor=1.5) == []  # nothing to compare with
    assert [each.rank for each in find(paces(0.02, 0.075), [(0, 1)], factor=1.5)] == [1]


def test_peers_of_a_layout():
    assert same_work(np.arange(8).reshape(2, 2, 1, 2)) == [(0, 1, 2, 3), (4, 5, 6, 7)]


def test_a_window_takes_medians_and_asks_the_others_once():
    """Rank 1 of 2: steps of 1 s of which it waits 0.4 s; one was slow by chance. The other computes 0.3 s."""
    collectives, asked = SimpleNamespace(waited=5.0), []

    def gather(pace):
        asked.append(pace)
        return [Pace("node0", 0.3, 1.0), pace]

    watch = Stragglers(collectives, [(0, 1)], factor=1.5, window=5, gather=gather)
    told = []
    for step in range(10):
        watch.begin()
        collectives.waited += 0.4
        told.append(watch.end(9.0 if step == 2 else 1.0))
        collectives.waited += 2.0  # a validation between the steps
    assert [bool(found) for found in told] == [False] * 4 + [True] + [False] * 4 + [True]
    assert len(asked) == 2 and asked[0].compute == pytest.approx(0.6) and asked[0].step == 1.0
    assert told[4][0].rank == 1 and told[4][0].factor == pytest.approx(2.0)


@pytest.mark.parametrize("window", [1, 3, 10, 25])
def test_on_a_gpu_some_steps_of_each_window_are_timed(window):
    samples, paced = [], []
    collectives = SimpleNamespace(waited=0.0, sample=lambda: samples.append(step), sampled=lambda: 0.25)
    watch = Stragglers(collectives, [(0,)], factor=1.5, window=window, cuda=True, gather=lambda pace: paced.append(pace) or [pace])
    for step in range(3 * window):
        watch.begin()
        watch.end(1.0)
    assert [pace.compute for pace in paced] == [0.75] * 3 and len(samples) == 3 * max(1, window // 10)


def test_off():
    watch = Stragglers(None, [], factor=None, window=1)
    watch.begin()
    assert watch.end(1.0) == []


def test_collectives_are_counted_and_timed():
    """A gloo group of one rank. What waits is a Work whose wait takes 50 ms."""
    dist = pytest.importorskip("torch.distributed")
    import torch
    from torch._C._distributed_c10d import Work

    from megatron_ext.health.collectives import Collectives

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    original, bare = Work.__dict__["wait"], Work.wait
    inside = []

    def slow(work, *args, **kwargs):
        time.sleep(0.05)
        inside.append(watch.waiting())
        return bare(work, *args, **kwargs)

    Work.wait = slow
    watch = Collectives({"tp": (0,)})
    watch.install()
    try:
        moves, numbers, began = watch.moves, torch.ones(3), time.perf_counter()
        dist.all_reduce(numbers)
        dist.barrier()
        handle = dist.broadcast(numbers, 0, async_op=True)
        assert watch.waiting() is None and 0.1 <= watch.waited <= time.perf_counter() - began
        time.sleep(0.1)  # no wait of its
        handle.wait()
        assert 0.15 <= watch.waited <= time.perf_counter() - began - 0.1
        named = [(each.collective, each.label, each.number, each.ranks) for each in inside]
        assert named == [("all_reduce", "world", 1, (0,)), ("barrier", "world", 2, (0,)), ("broadcast", "world", 3, (0,))]
        assert watch.waiting() is None and watch.moves == moves + 6
        with pytest.raises(RuntimeError, match="invalid root rank"):
            dist.broadcast(numbers, 5)
        assert watch.waiting() is None
        # On a GPU: events around the call and the wait, which say for how long the stream stood still.
        clock = iter(range(100))
        watch._event = lambda: SimpleNamespace(at=next(clock), elapsed_time=lambda end: 1000.0)
        watch.sample()
        dist.all_reduce(numbers)
        assert watch.sampled() == 2.0 and next(clock) == 4
    finally:
        watch.uninstall()
        assert Work.wait is slow
        Work.wait = original
        dist.all_reduce(torch.ones(1))  # as before
        dist.destroy_process_group()


def test_names_of_a_layouts_groups():
    from megatron_ext.health.collectives import Collectives, group_names

    names = group_names(np.arange(8).reshape(2, 2, 1, 2), 5)  # pp 2, dp 2, tp 2
    assert {name: names[name] for name in ("tp", "dp", "pp", "cp", "dp_tp", "pp_dp_cp_tp")} == {
        "tp": (4, 5), "dp": (5, 7), "pp": (1, 5), "cp": (5,), "dp_tp": (4, 5, 6, 7), "pp_dp_cp_tp": tuple(range(8)),
    }
    watch = Collectives(names)
    assert (watch.name((4, 5)), watch.name((5, 7)), watch.name((4, 5, 6, 7)), watch.name((0, 5))) == ("tp", "dp", "dp_tp", "without a name")
    assert len(names) == sum(1 for count in range(1, 5) for _ in combinations(range(4), count))
