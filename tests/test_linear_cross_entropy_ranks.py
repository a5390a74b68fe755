"""A head whose vocabulary is split over two ranks (one spawn of linear_cross_entropy_ranks.py) against the whole head on one."""
from pathlib import Path

import pytest
import torch
from linear_cross_entropy_ranks import CALLS, results
from spawn import spawn

from kernels import jit

pytestmark = pytest.mark.skipif(jit.MISSING is not None or torch.cuda.is_available(), reason="interprets Triton on CPU ranks")
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    directory = tmp_path_factory.mktemp("ranks")
    spawn([str(HERE / "linear_cross_entropy_ranks.py"), str(directory)], 2, timeout=540, TRITON_INTERPRET="1")
    return [torch.load(directory / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def outputs(call) -> int:
    return 3 if call[0] == "scores" else 2


@pytest.mark.parametrize("call", CALLS, ids=lambda c: "-".join(map(str, c[:3])) + str(c[3]).removeprefix("torch"))
def test_two_ranks_are_one(ranks, call):
    whole, halves = results(*call, None), [rank[call] for rank in ranks]
    n = outputs(call)
    for one, other in zip(halves[0][:n + 1], halves[1][:n + 1], strict=True):
        assert torch.equal(one, other), "results and hidden's gradient are the same bits on both ranks"
    joined = [*halves[0][:n + 1], *(torch.cat([half[i] for half in halves]) for i in (n + 1, n + 2))]
    for name, found, expected in zip(["outputs"] * n + ["d hidden", "d weight", "d bias"], joined, whole, strict=True):
        close = {} if found.dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-8 * whole[n].abs().max().item()}
        torch.testing.assert_close(found, expected, msg=lambda text, name=name: f"{name}: {text}", **close)


def test_a_call_gathers_once_and_reduces_once(ranks):
    for call in CALLS:
        if call[0] != "sum at once":
            assert ranks[0][call, "collectives"] == ["all_gather_into_tensor", "all_reduce"]
    tiled = "sum at once", "tiled", "torch", torch.float32  # 21 tokens, 8 at a time
    assert ranks[0][tiled, "collectives"] == ["all_gather_into_tensor"] * 3 + ["all_reduce"]


def test_a_partial_gradient_is_the_callers_to_reduce(ranks):
    whole = results("scores", "plain", "torch", torch.float32, None)
    torch.testing.assert_close(ranks[0]["partial"][3] + ranks[1]["partial"][3], whole[3])
    assert not torch.equal(ranks[0]["partial"][3], ranks[1]["partial"][3])


def test_a_group_of_the_wrong_size_is_refused(ranks):
    assert "vocab_size is 90, but group has 2 ranks with 40 rows of weight each; it must be in 1 .. 80" in ranks[0]["refused"]
