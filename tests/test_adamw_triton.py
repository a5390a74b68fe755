"""What both backends of kernels/adamw.py owe: the multi-tensor update against fp64, main weights beside bf16, steps that a CUDA graph can replay."""
import copy

import pytest
import torch
from kernel_truth import DEVICE, SIZES, draw, each_backend
from torch.testing import assert_close

from kernels import multi_tensor
from kernels.adamw import AdamW, adamw_, adamw_reference_
from kernels.backend import MissingBackend

HYPER = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SHAPES = [(n,) for n in SIZES] + [(8192,), (8193,), (0, 3), (17, 31)]


def rows(grad: torch.dtype = torch.float32, shapes=SHAPES) -> list[list[torch.Tensor]]:
    """Weights, gradients, first and second moments."""
    p = [draw(*s, dtype=torch.float32, seed=i) for i, s in enumerate(shapes)]
    g = [draw(*s, dtype=grad, seed=100 + i) for i, s in enumerate(shapes)]
    m = [draw(*s, dtype=torch.float32, seed=200 + i, scale=0.1) for i, s in enumerate(shapes)]
    return [p, g, m, [draw(*s, dtype=torch.float32, seed=300 + i, scale=0.1).square() for i, s in enumerate(shapes)]]


def copies(lists, dtype=None):
    return [[t.to(dtype or t.dtype, copy=True) for t in column] for column in lists]


def weights(dtype: torch.dtype, shapes=((7,), (33, 17), (8200,))) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(draw(*s, dtype=dtype, seed=i)) for i, s in enumerate(shapes)]


def train(optimizer, params, steps, **options) -> None:
    for step in steps:
        for i, p in enumerate(params):
            p.grad = draw(*p.shape, dtype=p.dtype, seed=1000 * step + i)
        optimizer.step(**options)


def bits(params) -> list[torch.Tensor]:
    return [p.detach().clone() for p in params]


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@each_backend
@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adam_w_mode, bias_correction", [(True, True), (False, True), (True, False)])
def test_error_is_at_most_twice_that_of_pytorch(adam_w_mode, bias_correction, grad, backend):
    ours = rows(grad)
    plain, exact = copies(ours), copies(ours, torch.float64)
    plain[1] = [g.float() for g in plain[1]]
    options = {"step": 3, "adam_w_mode": adam_w_mode, "bias_correction": bias_correction, **HYPER}
    adamw_(*ours, backend=backend, **options)
    for lists in (plain, exact):
        for row in zip(*lists, strict=True):
            adamw_reference_(*row, **options)
    for name, i in (("weights", 0), ("exp_avg", 2), ("exp_avg_sq", 3)):
        for o, p, e in zip(ours[i], plain[i], exact[i], strict=True):
            if e.numel():
                error, theirs = (o.double() - e).abs().max().item(), (p.double() - e).abs().max().item()
                assert error <= max(2 * theirs, torch.finfo(torch.float32).eps * e.abs().max().item()), (name, tuple(e.shape), error, theirs)


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_main_weights_beside_half_precision(dtype, backend):
    model, main = weights(dtype), [torch.nn.Parameter(p.detach().float()) for p in weights(dtype)]
    optimizer, wide = AdamW(model, master_weights=True, backend=backend, **HYPER), AdamW(main, backend=backend, **HYPER)
    for step in range(5):
        for i, (p, q) in enumerate(zip(model, main, strict=True)):
            p.grad = draw(*p.shape, dtype=dtype, seed=1000 * step + i)
            q.grad = p.grad.float()
        optimizer.step(), wide.step()
    for p, q in zip(model, main, strict=True):
        state = optimizer.state[p]
        assert set(state) == {"exp_avg", "exp_avg_sq", "master_param"} and all(t.dtype == torch.float32 for t in state.values())
        assert torch.equal(state["master_param"], q) and torch.equal(p, q.to(dtype))  # to nearest even


@each_backend
def test_small_steps_are_not_lost(backend):
    p = torch.nn.Parameter(torch.full((200,), 256.0, dtype=torch.bfloat16, device=DEVICE))
    optimizer = AdamW([p], lr=0.01, master_weights=True, backend=backend)
    for _ in range(120):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert (p < 256).all()  # 1.2 in all; each step is a hundredth of what bf16 can show at 256


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_keeps_every_bit(dtype, backend):
    options = {"master_weights": True, "backend": backend}
    params = weights(dtype)
    optimizer = AdamW(params, **options, **HYPER)
    train(optimizer, params, range(3))
    saved, state = bits(params), copy.deepcopy(optimizer.state_dict())
    train(optimizer, params, range(3, 6))
    again = [torch.nn.Parameter(w) for w in saved]
    second = AdamW(again, lr=9.0, **options)
    second.load_state_dict(state)
    train(second, again, range(3, 6))
    assert equal(params, again)
    for p, q in zip(params, again, strict=True):
        assert equal(optimizer.state[p].values(), second.state[q].values())


@each_backend
def test_capturable_steps_by_tensors(backend):
    plain, graph = weights(torch.float32), weights(torch.float32)
    rate = torch.tensor(3e-3, device=DEVICE)
    first = AdamW(plain, backend=backend, **HYPER)
    second = AdamW([{"params": graph}, {"params": []}], backend=backend, capturable=True, **{**HYPER, "lr": rate})
    train(first, plain, range(2)), train(second, graph, range(2))
    count = second.param_groups[0]["step"]
    assert count.dtype == torch.int32 and [int(g["step"]) for g in second.param_groups] == [2, 2]
    first.param_groups[0]["lr"] = 1e-2
    rate.fill_(1e-2)
    train(first, plain, range(2, 4)), train(second, graph, range(2, 4))
    assert second.param_groups[0]["step"] is count and int(count) == 4  # counted in place: what a replay counts on
    for p, q in zip(plain, graph, strict=True):
        assert_close(p, q, rtol=1e-6, atol=1e-7)


@each_backend
def test_capturable_and_plain_load_each_other(backend):
    params = weights(torch.float32)
    optimizer = AdamW(params, capturable=True, backend=backend, **HYPER)
    train(optimizer, params, range(2))
    other = [torch.nn.Parameter(w) for w in bits(params)]
    plain = AdamW(other, backend=backend, **HYPER)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(plain, other, range(2, 3))
    assert plain.param_groups[0]["step"] == 3 and type(plain.param_groups[0]["step"]) is int
    third = AdamW([torch.nn.Parameter(w) for w in bits(other)], capturable=True, backend=backend, **HYPER)
    third.load_state_dict(copy.deepcopy(plain.state_dict()))
    train(third, third.param_groups[0]["params"], range(3, 4)), train(plain, other, range(3, 4))
    assert int(third.param_groups[0]["step"]) == 4
    for p, q in zip(other, third.param_groups[0]["params"], strict=True):
        assert_close(p, q, rtol=1e-6, atol=1e-7)


@each_backend
@pytest.mark.parametrize("bias_correction", [True, False])
def test_an_overflow_is_skipped_and_the_scale_taken_out(bias_correction, backend):
    options = {"capturable": True, "backend": backend, "bias_correction": bias_correction, **HYPER}
    params, scaled = weights(torch.float32), weights(torch.float32)
    plain, optimizer = AdamW(params, **options), AdamW(scaled, **options)
    scale, fine, overflow = (torch.tensor(x, device=DEVICE) for x in (1024.0, 0.0, 1.0))
    for step in range(3):
        for i, (p, q) in enumerate(zip(params, scaled, strict=True)):
            p.grad = draw(*p.shape, dtype=torch.float32, seed=1000 * step + i)
            q.grad = p.grad * 1024
        plain.step(), optimizer.step(grad_scale=scale, found_inf=fine)
        gradient, before = scaled[0].grad, bits(scaled)
        assert torch.equal(gradient, params[0].grad * 1024)  # the gradient itself stays as it is
        scaled[0].grad = torch.full_like(gradient, float("nan"))
        optimizer.step(grad_scale=scale, found_inf=overflow)
        assert equal(before, bits(scaled)) and int(optimizer.param_groups[0]["step"]) == step + 1
    for p, q in zip(params, scaled, strict=True):
        assert_close(p, q, rtol=1e-6, atol=1e-7)


@each_backend
def test_strided_unaligned_fp64_and_same_bits(backend):
    shapes = [(6, 4), (5,), (9,)]
    ours = rows(shapes=shapes)
    ours = [[a.t().contiguous().t(), torch.cat((b, b))[1:6], c.double()] for a, b, c in ours]
    again, plain = [[t.clone() for t in column] for column in ours], copies(ours, torch.float64)
    for lists in (ours, again):
        adamw_(*lists, step=1, backend=backend, **HYPER)
    for row in zip(*plain, strict=True):
        adamw_reference_(*row, step=1, **HYPER)
    for i in (0, 2, 3):
        assert equal(ours[i], again[i])
        for a, b in zip(ours[i], plain[i], strict=True):
            assert_close(a.double(), b, rtol=1e-6, atol=1e-7)


def test_torch_without_its_fused_kernel(monkeypatch):
    ours, theirs = rows(), rows()
    adamw_(*ours, step=2, backend="torch", **HYPER)
    monkeypatch.delattr(torch, "_fused_adamw_")
    adamw_(*theirs, step=2, backend="torch", **HYPER)
    for a, b in zip(ours[0], theirs[0], strict=True):
        assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_tables_are_made_once():
    lists = rows()
    adamw_(*lists, step=1, backend="triton", **HYPER)
    before = multi_tensor._tables.cache_info()
    adamw_(*lists, step=2, backend="triton", **HYPER)
    after = multi_tensor._tables.cache_info()
    assert after.misses == before.misses and after.hits > before.hits


@each_backend
def test_registered_as_torch_wants_it(backend):
    p, g, m, v = rows(shapes=[(5, 3), (9,)])
    low = [t.bfloat16() for t in p]
    one = torch.tensor(1, dtype=torch.int32, device=DEVICE)
    for tensors in ((low, 0, one, 0.0, torch.tensor(0.1, device=DEVICE)), ([], 1, None, 0.1, None)):
        torch.library.opcheck(torch.ops.kernels.adamw_.default, (p, g, m, v, *tensors, 0.9, 0.95, 1e-8, 0.1, True, True, None, None, backend))
    ours, compiled = copies((p, g, m, v)), copies((p, g, m, v))
    adamw_(*ours, step=1, backend=backend, **HYPER)
    torch.compile(lambda *x: adamw_(*x, step=1, backend=backend, **HYPER), fullgraph=True, backend="aot_eager")(*compiled)
    assert all(equal(a, b) for a, b in zip(ours, compiled, strict=True))


def test_bad_input_is_named():
    p, g, m, v = rows(shapes=[(4,), (5,)])
    half = [t.bfloat16() for t in p]
    for error, words, lists, options in (
        (ValueError, "grads has 1 tensors, params 2", (p, g[:1], m, v), {}), (ValueError, r"exp_avgs\[0\] has shape", (p, g, m[::-1], v), {}),
        (ValueError, r"grads\[1\] .* on meta", (p, [g[0], g[1].to("meta")], m, v), {}),
        (TypeError, r"params\[0\] is torch.bfloat16", (half, g, m, v), {}), (TypeError, r"exp_avg_sqs\[0\] is", (p, g, m, half), {}),
        (TypeError, r"grads\[0\] is torch.int64", (p, [t.long() for t in g], m, v), {}),
        (ValueError, "model_params has 1", (p, g, m, v), {"model_params": half[:1]}), (ValueError, "lr must be a scalar", (p, g, m, v), {"lr": p[0]}),
        (ValueError, "found_inf must be a scalar on cpu", (p, g, m, v), {"found_inf": torch.zeros((), device="meta")}),
        (MissingBackend, "unknown here; there are: ", (p, g, m, v), {"backend": "apex"}),
    ):
        with pytest.raises(error, match=words):
            adamw_(*[[t.cpu() if t.device.type != "meta" else t for t in column] for column in lists], step=1, **{**HYPER, **options})
