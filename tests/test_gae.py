"""kernels/gae.py against fp64, by hand, and split over ranks."""

import pytest
import torch
from kernel_truth import DEVICE, SIZES, draw, each_backend, judge, same_bits
from spawn import spawn
from torch.testing import assert_close

from kernels.backend import MissingBackend
from kernels.gae import gae, gae_reference, masked_whiten


def padding(batch: int, seq: int, side: str) -> torch.Tensor:
    """A mask of unequal lengths, one of them 0."""
    lengths, at = torch.arange(batch)[:, None] * seq // max(batch - 1, 1), torch.arange(seq)
    masks = {"right": at < lengths, "left": at >= seq - lengths, "holes": (at * 7 + lengths) % 3 > 0}
    return masks[side].to(DEVICE)


def numbers(values: list) -> torch.Tensor:
    return torch.tensor(values, device=DEVICE)


# ---- by hand -----------------------------------------------------------------------------------------------------------------------


@each_backend
def test_by_hand(backend):
    """../shared/ANCHORS.md, section 5."""
    advantages, returns = gae(numbers([[-0.004, 0.002, 0.98]]), numbers([[0.1, 0.2, 0.3]]), backend=backend)
    assert_close(advantages, numbers([[0.8066, 0.748, 0.68]]), rtol=1e-6, atol=0)
    assert_close(returns, numbers([[0.9066, 0.948, 0.98]]), rtol=1e-6, atol=0)
    assert_close(masked_whiten(advantages), numbers([[1.19333439, 0.06056881, -1.2539032]]), rtol=1e-5, atol=0)
    assert_close(masked_whiten(advantages, unbiased=True), numbers([[0.97435406, 0.04945426, -1.02380831]]), rtol=1e-5, atol=0)
    advantages, _ = gae(numbers([[0.0, 0.0, 1.0, 0.0]]), numbers([[0.0, 1.0, 2.0, 3.0]]), gamma=0.5, lam=0.0, backend=backend)
    assert advantages.tolist() == [[0.5, 0.0, 0.5, -3.0]]
    advantages, _ = gae(numbers([[0.0, 0.0, 5.0]]), numbers([[1.0, 2.0, 3.0]]), lam=0.0, backend=backend)
    assert advantages.tolist() == [[1.0, 1.0, 2.0]]


@each_backend
def test_lambda_one_is_the_reward_to_come(backend):
    rewards, values = draw(3, 50, dtype=torch.float32, seed=1), draw(3, 50, dtype=torch.float32, seed=2)
    last = draw(3, dtype=torch.float32, seed=3)
    _, returns = gae(rewards, values, lam=1.0, bootstrap=last, backend=backend)
    assert_close(returns, rewards.flip(1).cumsum(1).flip(1) + last[:, None], rtol=1e-5, atol=2e-5)


# ---- against fp64 ------------------------------------------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("side", [None, "right", "left", "holes"])
@pytest.mark.parametrize("seq", SIZES)
def test_padded(seq, side, backend):
    rewards, values, last = draw(3, seq, dtype=torch.float32, seed=seq), draw(3, seq, dtype=torch.float32, seed=seq + 1), draw(3, dtype=torch.float32, seed=9)
    mask = None if side is None else padding(3, seq, side)
    hyper = {"gamma": 0.99, "lam": 0.95, "mask": mask}
    judge(lambda r, v, b: gae(r, v, bootstrap=b, backend=backend, **hyper), lambda r, v, b: gae_reference(r, v, bootstrap=b, **hyper),
          [rewards, values, last], None, names=("advantages", "returns"))


@each_backend
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("lengths", [(1,), (2, 3, 1), (0, 127, 0, 128, 129, 0), (1021, 5, 1024), (4097,)])
def test_packed_is_each_rollout_alone(lengths, dtype, backend):
    count = sum(lengths)
    rewards, values = draw(count, dtype=torch.float32, seed=count), draw(count, dtype=torch.float32, seed=count + 1)
    last = draw(len(lengths), dtype=torch.float32, seed=4)
    offsets = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(dtype)

    def one_by_one(r, v, b):
        parts = zip(r.split(lengths), v.split(lengths), b, strict=True)
        found = [gae_reference(r[None], v[None], 0.99, 0.9, bootstrap=b[None]) for r, v, b in parts if r.numel()]
        return torch.cat([a[0] for a, _ in found]), torch.cat([g[0] for _, g in found])

    judge(lambda r, v, b: gae(r, v, cu_seqlens=offsets, gamma=0.99, lam=0.9, bootstrap=b, backend=backend), one_by_one, [rewards, values, last], None)


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_taken_in_fp32(dtype, backend):
    rewards, values = draw(2, 129, dtype=dtype, seed=1), draw(2, 129, dtype=dtype, seed=2)
    for ours, wide in zip(gae(rewards, values, backend=backend), gae(rewards.float(), values.float(), backend=backend), strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, wide)


@each_backend
def test_packed_equals_padded(backend):
    mask = padding(5, 300, "right")
    rewards, values = draw(5, 300, dtype=torch.float32, seed=1), draw(5, 300, dtype=torch.float32, seed=2)
    advantages, returns = gae(rewards, values, mask=mask, backend=backend)
    offsets = torch.cat((mask.new_zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)))
    packed = gae(rewards[mask], values[mask], cu_seqlens=offsets, backend=backend)
    assert_close(packed[0], advantages[mask], rtol=1e-5, atol=1e-5)
    assert_close(packed[1], returns[mask], rtol=1e-5, atol=1e-5)


@each_backend
@pytest.mark.parametrize("side", ["right", "left", "holes"])
def test_what_is_masked_reaches_nothing(side, backend):
    mask = padding(4, 70, side)
    rewards, values = draw(4, 70, dtype=torch.float32, seed=1), draw(4, 70, dtype=torch.float32, seed=2)
    clean = gae(rewards, values, mask=mask, backend=backend)
    dirty = gae(rewards.masked_fill(~mask, float("nan")), values.masked_fill(~mask, float("inf")), mask=mask.to(torch.int64), backend=backend)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b) and not a[~mask].any()


@each_backend
def test_a_broken_rollout_breaks_no_other(backend):
    offsets = numbers([0, 40, 90, 200])
    rewards, values = draw(200, dtype=torch.float32, seed=1), draw(200, dtype=torch.float32, seed=2)
    clean = gae(rewards, values, cu_seqlens=offsets, backend=backend)
    rewards[60], values[200 - 1] = float("nan"), float("inf")
    for a, b in zip(clean, gae(rewards, values, cu_seqlens=offsets, backend=backend), strict=True):
        assert torch.equal(a[:40], b[:40]) and torch.equal(a[61:90], b[61:90]) and b[40:61].isnan().all()


# ---- what every op keeps -----------------------------------------------------------------------------------------------------------


@each_backend
def test_nothing_is_differentiable(backend):
    rewards, values = draw(2, 8, dtype=torch.float32, seed=1).requires_grad_(), draw(2, 8, dtype=torch.float32, seed=2).requires_grad_()
    advantages, returns = gae(rewards, values, backend=backend)
    assert not advantages.requires_grad and not returns.requires_grad and not masked_whiten(values).requires_grad


@each_backend
@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 0)])
def test_nothing_in_nothing_out(shape, backend):
    empty = torch.empty(shape, device=DEVICE)
    assert gae(empty, empty, backend=backend)[0].shape == shape
    assert gae(empty.view(-1), empty.view(-1), cu_seqlens=numbers([0, 0, 0]), bootstrap=numbers([1.0, 1.0]), backend=backend)[1].shape == (0,)


@each_backend
def test_strided_rows_and_same_bits(backend):
    both = draw(6, 2, 150, dtype=torch.float32, seed=1)
    rewards, values = both[:, 0], both[:, 1]
    for a, b in zip(gae(rewards, values, backend=backend), gae(rewards.contiguous(), values.contiguous(), backend=backend), strict=True):
        assert torch.equal(a, b)
    same_bits(lambda r, v: gae(r, v, backend=backend), [rewards, values], None)


@each_backend
def test_registered_as_torch_wants_it(backend):
    rewards, values, mask = draw(3, 16, dtype=torch.float32, seed=7), draw(3, 16, dtype=torch.float32, seed=8), padding(3, 16, "left")
    torch.library.opcheck(torch.ops.kernels.gae.default, (rewards, values, None, mask, None, 0.9, 0.8, backend))
    torch.library.opcheck(torch.ops.kernels.gae.default, (rewards[0], values[0], numbers([0, 5, 16]), None, numbers([1.0, 2.0]), 0.9, 0.8, backend))
    compiled = torch.compile(lambda r, v: gae(r, v, mask=mask, backend=backend), fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(rewards, values), gae(rewards, values, mask=mask, backend=backend), strict=True):
        assert torch.equal(a, b)


def test_bad_input_is_named():
    x = torch.randn(2, 4)
    flat = x.view(-1)
    for error, words, call in (
        (TypeError, "rewards is int64", lambda: gae(x.long(), x)), (TypeError, "values is float64", lambda: gae(x, x.double())),
        (TypeError, "mask is float32", lambda: gae(x, x, mask=x)), (TypeError, "cu_seqlens is float32", lambda: gae(flat, flat, cu_seqlens=flat)),
        (TypeError, "bootstrap is int64", lambda: gae(x, x, bootstrap=torch.ones(2, dtype=torch.int64))),
        (ValueError, "values has shape", lambda: gae(x, x[:1])), (ValueError, "mask has shape", lambda: gae(x, x, mask=x[0] > 0)),
        (ValueError, "bootstrap has shape", lambda: gae(x, x, bootstrap=flat)), (ValueError, "rewards has shape", lambda: gae(flat, flat)),
        (ValueError, "rewards has shape", lambda: gae(x, x, cu_seqlens=torch.tensor([0, 8]))),
        (ValueError, "cu_seqlens has shape", lambda: gae(flat, flat, cu_seqlens=torch.tensor([[0, 8]]))),
        (ValueError, "cu_seqlens must rise from 0", lambda: gae(flat, flat, cu_seqlens=torch.tensor([0, 7]))),
        (ValueError, "cu_seqlens must rise from 0", lambda: gae(flat, flat, cu_seqlens=torch.tensor([0, 5, 3, 8]))),
        (ValueError, "values is on meta", lambda: gae(x, x.to("meta"))), (ValueError, "mask is on meta", lambda: gae(x, x, mask=(x > 0).to("meta"))),
        (ValueError, "last dimension of rewards is strided", lambda: gae(torch.randn(4, 2).t(), x)),
        (ValueError, "gamma is 1.5", lambda: gae(x, x, gamma=1.5)), (ValueError, "lam is -1", lambda: gae(x, x, lam=-1)),
        (MissingBackend, "unknown here; there are: ", lambda: gae(x, x, backend="cudnn")),
        (TypeError, "group is 'data'", lambda: masked_whiten(x, group="data")), (ValueError, "mask has shape", lambda: masked_whiten(x, x[0] > 0)),
        (TypeError, "x is int64", lambda: masked_whiten(x.long())), (ValueError, "mask is on meta", lambda: masked_whiten(x, (x > 0).to("meta"))),
    ):
        with pytest.raises(error, match=words):
            call()


# ---- whitening ---------------------------------------------------------------------------------------------------------------------


def test_whitened_values_have_mean_zero_and_variance_one():
    x, mask = draw(7, 33, dtype=torch.float32, seed=1, scale=3.0) + 5, padding(7, 33, "left")
    white = masked_whiten(x.masked_fill(~mask, float("nan")), mask)
    assert abs(white[mask].mean()) < 1e-6 and abs(white[mask].var(correction=0) - 1) < 1e-6 and not white[~mask].any()
    assert_close(masked_whiten(x, mask, shift_mean=False)[mask], white[mask] + x[mask].mean(), rtol=1e-5, atol=1e-5)
    assert_close(masked_whiten(-2 * x + 1, mask), -white, rtol=1e-5, atol=1e-5)  # the scale and the origin of rewards do not matter
    assert not masked_whiten(x, torch.zeros_like(mask)).any()
    assert masked_whiten(x[:1, :1], unbiased=True).tolist() == [[0.0]]


def test_two_passes_keep_digits_that_one_would_lose():
    x = draw(1000, dtype=torch.float32, seed=1) + 1e5
    exact = x.double()
    assert_close(masked_whiten(x), ((exact - exact.mean()) / exact.std(correction=0)).float(), rtol=1e-5, atol=1e-6)


RANK = """
import sys, torch, torch.distributed as dist
from kernels.gae import masked_whiten
dist.init_process_group("gloo")
rank = dist.get_rank()
generator = torch.Generator().manual_seed(3)
x, mask = torch.randn(8, 50, generator=generator) * 2 + 1, torch.rand(8, 50, generator=generator) > 0.4
mask[6:] = False
alone = torch.no_grad()(dist.new_group)([rank], use_local_synchronization=True)
for cut in (4, 1, 6, 8):  # equal parts, unequal, one without a live position, one without a row
    part = slice(0, cut) if rank == 0 else slice(cut, 8)
    for options in ({}, {"unbiased": True}, {"shift_mean": False}):
        whole, ours = masked_whiten(x, mask, **options), masked_whiten(x[part], mask[part], group=dist.group.WORLD, **options)
        torch.testing.assert_close(ours, whole[part], rtol=1e-6, atol=1e-7)
        assert torch.equal(masked_whiten(x, mask, group=alone, **options), whole)
print("same")
dist.destroy_process_group()
"""


def test_splitting_the_batch_over_ranks_changes_nothing():
    assert spawn(["-c", RANK], 2, timeout=120) == ["same", "same"]
