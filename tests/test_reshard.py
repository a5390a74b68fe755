"""Weights into another layout: the plan against whole arrays, the moves of four ranks (reshard_ranks.py) against checkpoints."""
import math
import random
from collections import defaultdict

import numpy as np
import pytest
from reshard_ranks import MOVES, RANKS, run_ranks

# ---- the plan --------------------------------------------------------------------------------------------------------------------


def boxes(shapes: dict[str, tuple], split: dict[str, tuple[int, int]], *, tp: int, pp: int, ranks: int) -> list[list]:
    """Of each rank the boxes of a model of `shapes` [layers, ...]: layers over pp, `split` (axis, number of parts) over tp, replicas."""
    import torch

    from megatron_ext.parallel.reshard import Box

    found = []
    for rank in range(ranks):
        t, p, own = rank % tp, rank // (ranks // pp), []
        for key, (layers, *shape) in shapes.items():
            axis, parts = split[key]  # a gated unit's parts are split one by one
            for layer in range(p * layers // pp, (p + 1) * layers // pp):
                for part in range(parts):
                    low, extent = [0] * len(shape), list(shape)
                    width = shape[axis] // parts
                    low[axis], extent[axis] = part * width + t * width // tp, (t + 1) * width // tp - t * width // tp
                    own.append(Box(key, (layers, *shape), (layer, *low), (1, *extent), 1, torch.float32 if "32" in key else torch.bfloat16))
        found.append(own)
    return found


def region(low, extent) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(low, extent))


LAYOUTS = [(tp, pp) for tp in (1, 2, 3, 4, 6) for pp in (1, 2, 3, 6) if 12 % (tp * pp) == 0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_plan_carries_every_element_once_and_none_that_is_there(layout):
    """Moved as the messages say, every rank ends with the whole arrays' numbers; splits that do not divide (5 rows over 3) too."""
    from megatron_ext.parallel.reshard import messages, plan

    shapes, split = {"fc1.32": (6, 20, 3), "fc2.16": (6, 4, 5), "norm.16": (6, 7)}, {"fc1.32": (0, 2), "fc2.16": (1, 1), "norm.16": (0, 1)}
    whole = {key: np.random.default_rng(0).permutation(math.prod(shape)).reshape(shape) for key, shape in shapes.items()}
    for other in random.Random(str(layout)).sample(LAYOUTS, 4):
        source, target = (boxes(shapes, split, tp=tp, pp=pp, ranks=12) for tp, pp in (layout, other))
        arrays = [[np.full(box.extent, -1) for box in own] for own in target]
        pairs = defaultdict(list)
        for copy in plan(source, target, ["host"] * 12):
            pairs[copy.sender, copy.receiver].append(copy)
        for (sender, receiver), copies in pairs.items():
            for message in messages(copies, 64):
                assert sum(copy.size for copy in message) <= 64
                place = 0
                for copy in message:
                    assert place % copy.dtype.itemsize == 0
                    place += copy.size
                    have, want = source[sender][copy.source], target[receiver][copy.target]
                    assert sender == receiver or not any(box.key == want.key and within(copy, box) for box in source[receiver])
                    there = arrays[receiver][copy.target][region(np.subtract(copy.low, want.low), copy.extent)]
                    assert (there == -1).all()
                    there[...] = whole[have.key][region(have.low, have.extent)][region(np.subtract(copy.low, have.low), copy.extent)]
        for own, filled in zip(target, arrays):
            for box, array in zip(own, filled):
                assert (array == whole[box.key][region(box.low, box.extent)]).all()


def within(copy, box) -> bool:
    return all(a <= b and b + m <= a + n for a, n, b, m in zip(box.low, box.extent, copy.low, copy.extent))


def replica(count: int, rows: int = 8) -> list:
    import torch

    from megatron_ext.parallel.reshard import Box

    return [Box(f"w{number}", (rows,), (0,), (rows,), 0, torch.float32) for number in range(count)]


def test_a_neighbour_sends_before_a_stranger_and_replicas_share_the_work():
    from megatron_ext.parallel.reshard import plan

    hosts = ["a", "a", "b", "b", "b", "b"]
    source, target = [replica(4), [], replica(4), replica(4), [], []], [[], replica(4), [], [], replica(4), replica(4)]
    copies = plan(source, target, hosts)
    assert all(hosts[one.sender] == hosts[one.receiver] for one in copies)
    sent = [sum(one.size for one in copies if one.sender == rank) for rank in range(6)]
    assert sent == [4 * 32, 0, 4 * 32, 4 * 32, 0, 0]
    assert plan(source, target, hosts) == copies


def test_a_box_is_cut_into_all_of_its_elements_in_order():
    from megatron_ext.parallel.reshard import cut

    for low, extent, most in (((3, 0, 2), (2, 5, 7), 3), ((0, 1), (4, 4), 9), ((5,), (1,), 1), ((), (), 1)):
        array, seen = np.arange(math.prod(np.add(low, extent))).reshape(tuple(np.add(low, extent))), []
        for start, size in cut(low, extent, most):
            assert math.prod(size) <= most
            seen += array[region(start, size)].ravel().tolist()
        assert seen == array[region(low, extent)].ravel().tolist()


def test_what_is_not_one_model_is_refused():
    import torch

    from megatron_ext.parallel.reshard import Box, plan

    def one(key="w", shape=(8,), low=(0,), extent=(8,), dtype=torch.float32):
        return [[Box(key, shape, low, extent, 0, dtype)]]

    for source, target, words in (
        (one("v"), one(), "target has no v"), (one(), [[*one()[0], *one("v")[0]]], "source has no v"), (one(shape=(9,)), one(), r"\(9,\)"),
        (one(dtype=torch.bfloat16), one(), "bfloat16"), (one(extent=(5,)), one(), "of the 8 elements .* holds 5"),
    ):
        with pytest.raises(ValueError, match=words):
            plan(source, target, ["host"])


# ---- four ranks ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    return run_ranks()


@pytest.mark.both
@pytest.mark.parametrize("name", MOVES)
def test_a_move_is_a_checkpoint_saved_and_loaded(ranks, name):
    """A second move, after a step and after both models were off-loaded, gives every rank to the bit, padding included, what the target's
    layout loads from the source's checkpoint. What travels is what was not there, in messages of the size asked for."""
    source, _, settings, chunk = MOVES[name]
    facts = [rank[f"move {name}"] for rank in ranks]
    for fact in facts:
        moved, sizes = fact["moved"], [size for _, size in fact["messages"]]
        assert fact["equal"]
        assert moved["received"] == fact["needed"] and moved["sent"] == sum(sizes)
        assert max(sizes, default=0) <= (chunk or 64 << 20)
        peers = {peer for peer, _ in fact["messages"]}
        # Two messages in a row hold more than one may, else they would be one.
        assert len(sizes) == len(peers) if chunk is None else len(sizes) <= 2 * moved["sent"] / chunk + len(peers)
        learner, player, fresh = fact["losses"]
        assert player == fresh
        assert math.isclose(learner, player, rel_tol=1e-6 if "dtype" not in settings else 1e-2)
    assert sum(fact["moved"]["received"] for fact in facts) == sum(fact["moved"]["sent"] for fact in facts)
    nothing = source == "dp4"  # who has all of it needs none of it
    assert all((fact["moved"]["received"] == 0) == nothing for fact in facts)


@pytest.mark.both
def test_within_a_layout_nothing_travels(ranks):
    """And a target that trains takes its main weights from what came."""
    for rank in ranks:
        facts = rank["odd moves"]
        assert facts["equal"] and facts["moved"]["sent"] == facts["moved"]["received"] == 0 < facts["moved"]["local"]


def test_other_models_and_ranks_are_refused_on_every_rank(ranks):
    assert len(ranks) == RANKS
    for rank in ranks:
        refused = rank["odd moves"]["refused"]
        assert "output_layer.weight" in refused["tied"] and "float32" in refused["fp32"] and "linear_fc" in refused["wide"]
        assert "(0,)" in refused["elsewhere"] and "at least 16 bytes, got 8" in refused["chunk"]
