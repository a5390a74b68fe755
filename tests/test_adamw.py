"""kernels/adamw.py against the formulas in exact arithmetic's stand-in (fp64 by hand), torch's own AdamW, and megatron-core's needs."""
import copy
import math
from itertools import pairwise

import pytest
import torch

from kernels.adamw import AdamW, adamw_, adamw_reference_

SHAPES = [(7,), (33, 17), (1,), (4, 5, 6), (1031,)]
HYPER = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def parameters(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def set_gradients(params, step, scale=1.0):
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.dtype)


def train(optimizer, params, steps):
    for step in steps:
        set_gradients(params, step)
        optimizer.step()


def by_hand(p, gradients, *, lr, betas, eps, weight_decay, decoupled=True, bias_correction=True):
    """The module docstring's formulas for one number, in Python floats."""
    m = v = 0.0
    for t, g in enumerate(gradients, start=1):
        if decoupled:
            p -= lr * weight_decay * p
        else:
            g += weight_decay * p
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        c1, c2 = (1 - betas[0] ** t, 1 - betas[1] ** t) if bias_correction else (1.0, 1.0)
        p -= lr * (m / c1) / (math.sqrt(v / c2) + eps)
    return p, m, v


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("bias_correction", [True, False])
def test_hand_maths(decoupled, bias_correction):
    p = torch.nn.Parameter(torch.tensor([0.5, -2.0, 1e-3], dtype=torch.float64))
    start, gradients = p.tolist(), [[0.1, -3.0, 1e-9], [-0.2, 0.0, 2e-9], [0.05, 1.0, -1e-9]]
    optimizer = AdamW([p], **HYPER, adam_w_mode=decoupled, bias_correction=bias_correction)
    for g in gradients:
        p.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step()
    for i in range(3):
        want = by_hand(start[i], [g[i] for g in gradients], **HYPER, decoupled=decoupled, bias_correction=bias_correction)
        got = p[i].item(), optimizer.state[p]["exp_avg"][i].item(), optimizer.state[p]["exp_avg_sq"][i].item()
        assert got == pytest.approx(want, rel=1e-12)


def test_first_step_moves_by_the_learning_rate():
    p = torch.nn.Parameter(torch.tensor([1.0, 1.0, 1.0]))
    p.grad = torch.tensor([5.0, -1e-3, 0.0])
    AdamW([p], lr=0.25, eps=0.0 + 1e-12).step()
    assert p.tolist() == pytest.approx([0.75, 1.25, 1.0])


def test_fp32_error_is_no_larger_than_twice_torchs():
    """100 steps in fp32 against the same in fp64: at most twice the error of torch.optim.AdamW's per-tensor path."""
    ours, theirs, exact = parameters(), parameters(), parameters(torch.float64)
    runs = [(AdamW(ours, **HYPER), ours), (torch.optim.AdamW(theirs, **HYPER, foreach=False, fused=False), theirs),
            (AdamW(exact, **HYPER), exact)]
    for optimizer, params in runs:
        train(optimizer, params, range(100))

    def error(params):
        return max((p.double() - e).abs().max().item() for p, e in zip(params, exact, strict=True))
    assert 0 < error(ours) <= 2 * error(theirs)


def test_fp64_equals_torchs_adamw():
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    train(AdamW(ours, **HYPER), ours, range(50))
    train(torch.optim.AdamW(theirs, **HYPER), theirs, range(50))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_strided_tensors_take_the_same_path_in_numbers():
    base, gradient = torch.randn(16, 24), torch.randn(16, 24)
    plain, strided = torch.nn.Parameter(base.clone()), torch.nn.Parameter(base.t().contiguous().t())
    assert not strided.is_contiguous()
    for _ in range(5):
        for p in (plain, strided):
            p.grad = gradient.clone()  # contiguous: another order of elements than the strided parameter's
    first, second = AdamW([plain], **HYPER), AdamW([strided], **HYPER)
    for _ in range(5):
        first.step(), second.step()
    torch.testing.assert_close(plain, strided, rtol=1e-5, atol=1e-7)


def test_a_shard_is_updated_like_the_whole():
    """The distributed optimizer updates slices: the result must not depend on how a tensor is cut."""
    whole = torch.nn.Parameter(torch.randn(1031))
    cuts = [0, 1, 100, 517, 1031]
    parts = [torch.nn.Parameter(whole.detach()[a:b].clone()) for a, b in pairwise(cuts)]
    a, b = AdamW([whole], **HYPER), AdamW(parts, **HYPER)
    for step in range(20):
        set_gradients([whole], step)
        for part, (i, j) in zip(parts, pairwise(cuts), strict=True):
            part.grad = whole.grad[i:j].clone()
        a.step(), b.step()
    torch.testing.assert_close(torch.cat([p.detach() for p in parts]), whole.detach(), rtol=0, atol=5e-7)


def test_missing_gradients_and_empty_groups():
    params = parameters()
    frozen = params[1].detach().clone()
    optimizer = AdamW([{"params": params}, {"params": []}], **HYPER)
    assert optimizer.state_dict()["state"] == {}
    set_gradients(params, 0)
    params[1].grad = None
    optimizer.step()
    assert torch.equal(params[1], frozen) and params[1] not in optimizer.state
    assert [group["step"] for group in optimizer.param_groups] == [1, 1]
    assert type(optimizer.param_groups[0]["step"]) is int
    assert set(optimizer.state[params[0]]) == {"exp_avg", "exp_avg_sq"}


def test_empty_shard():
    p, q = torch.nn.Parameter(torch.empty(0)), torch.nn.Parameter(torch.ones(3))
    p.grad, q.grad = torch.empty(0), torch.ones(3)
    AdamW([p, q], lr=0.5).step()
    assert q.tolist() == pytest.approx([0.5] * 3)


def test_groups_have_their_own_values():
    a, b = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW([{"params": [a], "lr": 0.5}, {"params": [b], "weight_decay": 0.5}], lr=0.1)
    a.grad, b.grad = torch.zeros(3), torch.zeros(3)
    optimizer.step()
    assert a.tolist() == [1.0] * 3 and b.tolist() == pytest.approx([0.95] * 3)


@pytest.mark.parametrize("initialised", [True, False])
def test_resume_is_bit_identical(initialised):
    straight = parameters()
    optimizer = AdamW(straight, **HYPER)
    train(optimizer, straight, range(10))
    saved_weights, saved = [p.detach().clone() for p in straight], copy.deepcopy(optimizer.state_dict())
    train(optimizer, straight, range(10, 20))
    resumed = [torch.nn.Parameter(w) for w in saved_weights]
    second = AdamW(resumed, lr=9.0)
    if initialised:  # as megatron-core's init_state_fn does before it loads
        for p in resumed:
            second.state[p]["exp_avg"], second.state[p]["exp_avg_sq"] = torch.zeros_like(p.data), torch.zeros_like(p.data)
    second.load_state_dict(saved)
    train(second, resumed, range(10, 20))
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    first_state, second_state = optimizer.state_dict(), second.state_dict()
    assert first_state["param_groups"] == second_state["param_groups"] and second_state["param_groups"][0]["step"] == 20
    for key, state in first_state["state"].items():
        assert all(torch.equal(state[name], second_state["state"][key][name]) for name in ("exp_avg", "exp_avg_sq"))


def test_initialised_state_steps_like_lazy_state():
    lazy, early = parameters(), parameters()
    a, b = AdamW(lazy, **HYPER), AdamW(early, **HYPER)
    for p in early:
        b.initialize_state(p)
    train(a, lazy, range(3))
    train(b, early, range(3))
    assert all(torch.equal(p, q) for p, q in zip(lazy, early, strict=True))


def test_zero_grad_and_closure():
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = AdamW([p], lr=0.5, set_grad_none=False)
    loss = optimizer.step(lambda: (p.sum().backward(), p.sum())[1])
    assert loss.item() == 2.0 and p.tolist() == pytest.approx([0.5, 0.5])
    optimizer.zero_grad()
    assert p.grad.tolist() == [0.0, 0.0]
    optimizer.zero_grad(set_to_none=True)
    assert p.grad is None
    p.grad = torch.ones(2)
    AdamW([p]).zero_grad()
    assert p.grad is None


def test_the_arguments_that_megatron_core_passes():
    """0.16.1 passes these by keyword; 0.19.2 adds `capturable`."""
    params = parameters()
    optimizer = AdamW(params=[{"params": params, "wd_mult": 1.0}], **HYPER, adam_w_mode=True, capturable=False)
    train(optimizer, params, range(1))
    assert optimizer.param_groups[0]["wd_mult"] == 1.0


def test_what_it_refuses():
    with pytest.raises(ValueError, match="amsgrad"):
        AdamW(parameters(), amsgrad=True)
    with pytest.raises(ValueError, match="found_inf needs capturable"):
        AdamW(parameters()).step(found_inf=torch.zeros(()))
    with pytest.raises(ValueError, match="lr is a tensor; that needs capturable"):
        AdamW(parameters(), lr=torch.tensor(0.1))
    with pytest.raises(ValueError, match="betas"):
        AdamW(parameters(), betas=(0.9, 1.0))
    tensors, numbers = [[torch.ones(3)] for _ in range(4)], {"step": 1, "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
    for error, match, wrong in ((ValueError, "step is 0", {"step": 0}), (ValueError, "betas are", {"betas": (1.0, 0.9)}),
                                (TypeError, "grad_scale is float16", {"grad_scale": torch.ones((), dtype=torch.float16)})):
        with pytest.raises(error, match=match):
            adamw_(*tensors, **{**numbers, **wrong})
    half = parameters(torch.bfloat16)
    optimizer = AdamW(half)  # megatron-core constructs it with bf16 weights and replaces them
    set_gradients(half, 0)
    with pytest.raises(TypeError, match="fp32 main weights"):
        optimizer.step()


def test_half_precision_gradients_are_taken_in_fp32():
    a, b = parameters(), parameters()
    for p, q, g in zip(a, b, parameters(torch.bfloat16, seed=5), strict=True):
        p.grad = g.detach().float()
        q.grad_dtype = None  # torch refuses a gradient of another dtype than the parameter's unless told
        q.grad = g.detach().clone()
    AdamW(a, **HYPER).step()
    AdamW(b, **HYPER).step()
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_reference_in_fp64_is_the_hand_maths():
    p, g = torch.tensor([0.3], dtype=torch.float64), torch.tensor([-0.7], dtype=torch.float64)
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for step in (1, 2):
        adamw_reference_(p, g, m, v, step=step, **HYPER)
    assert (p.item(), m.item(), v.item()) == pytest.approx(by_hand(0.3, [-0.7, -0.7], **HYPER), rel=1e-14)
