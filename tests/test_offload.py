"""Models in host memory: bytes by hand arithmetic, bits and steps against a twin that stays, uses refused. The ranks: reshard_ranks.py."""
import pytest
from reshard_ranks import STAYS, run_ranks

pytestmark = [pytest.mark.both, pytest.mark.parametrize("name", STAYS)]
MAIN_AND_MOMENTS = {"fp32": 8, "bf16": 12, "fp8": 12, "no distributed optimizer": 12, "adapters": 8}  # bytes a weight; fp32 is its own main
SCALARS = 64  # bytes: loss scale, overflow flags


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    return run_ranks()


def test_bytes_of_the_parts_are_those_of_the_arithmetic(ranks, name):
    """Parameters and gradients up to the padding of megatron-core's buffers (64 elements a tensor, 128 a bucket); the optimizer's shares,
    summed over the data ranks, to the byte."""
    _, settings = STAYS[name]
    optimizer = split = 0
    for rank in ranks:
        facts = rank[f"stay {name}"]
        weights, new, trained = facts["weights"], facts["new"], facts["trained"]
        padding = 0 if settings.get("plain") else 64 * weights["tensors"] + 128 * (weights["chunks"] + 1)
        gradient = 4 if settings.get("grad_reduce_in_fp32", True) else 2
        for part, count, itemsize in (("parameters", weights["all"], weights["itemsize"]), ("gradients", weights["trained"], gradient)):
            assert 0 <= new[part] - count * itemsize <= padding * itemsize
        assert trained["parameters"] == new["parameters"]
        assert new["buffers"] < 2048  # rotary frequencies, FP8's histories
        optimizer += trained["optimizer"]
        split += weights["trained"] / (1 if settings.get("plain") else facts["dp"])
    assert 0 <= optimizer - MAIN_AND_MOMENTS[name] * split <= SCALARS * len(ranks)


def test_nothing_stays_on_the_device(ranks, name):
    """By what the engine holds, and by all tensors that live in the process; the host has all but the gradients."""
    for rank in ranks:
        facts = rank[f"stay {name}"]
        assert set(facts["away"].values()) == {0} and facts["alive"] <= 0
        assert facts["host"] == sum(size for part, size in facts["back"].items() if part != "gradients")
        assert facts["leaves"] == 0 < facts["stays"]


def test_it_comes_back_to_the_bit_and_trains_on_as_if_it_had_stayed(ranks, name):
    for rank in ranks:
        facts = rank[f"stay {name}"]
        assert facts["same bits"] and facts["gradients are zero"] and facts["same end"]
        stayed, returned = facts["steps"]
        assert stayed == returned
        assert facts["last step"][0] == facts["last step"][1]
        assert all(facts["back"][part] == facts["trained"][part] for part in ("parameters", "optimizer"))


def test_what_is_away_says_so_when_it_is_used(ranks, name):
    for rank in ranks:
        for use, message in rank[f"stay {name}"]["refused"].items():
            assert message is not None, use
            assert message.startswith("the policy (") and "off-loaded to host memory" in message and "to_device()" in message
