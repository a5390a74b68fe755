"""kernels/grad_norm.py: norms of many tensors against fp64, whatever the cut; scaling and clipping in place; over two ranks."""
import math

import pytest
import torch
from kernel_truth import DEVICE, SIZES, draw, each_backend, each_dtype, judge
from spawn import spawn

from kernels.backend import MissingBackend
from kernels.grad_norm import clip_, grad_norm, grad_norm_reference, scale_

each_norm = pytest.mark.parametrize("norm_type", [1, 2, math.inf])


def many(dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    """Tensors of every size of the rule, one over a chunk, one empty, a scalar, a matrix."""
    shapes = [(n,) for n in SIZES] + [(8192,), (8193,), (0, 4), (17, 31)]
    return [*(draw(*shape, dtype=dtype, seed=seed + i) for i, shape in enumerate(shapes)), draw(1, dtype=dtype, seed=seed + 99).view(())]


def exact_norm(tensors: list[torch.Tensor], norm_type: float) -> float:
    return float(torch.linalg.vector_norm(torch.cat([t.double().reshape(-1) for t in tensors]), norm_type))


@each_backend
@each_norm
@each_dtype
def test_norm_is_right_to_fp32(dtype, norm_type, backend):
    tensors = many(dtype)
    found = grad_norm(tensors, norm_type=norm_type, backend=backend)
    assert found.dtype == torch.float32 and found.shape == () and not found.requires_grad
    assert float(found) == pytest.approx(exact_norm(tensors, norm_type), rel=1e-6)
    for size, tensor in zip(SIZES, tensors, strict=False):
        judge(lambda x: grad_norm(x, norm_type=norm_type, backend=backend), lambda x: grad_norm_reference([x], norm_type), [tensor], None,
              names=(f"norm of {size}",))


@each_backend
@each_norm
def test_dtypes_may_be_mixed_and_bits_repeat(norm_type, backend):
    tensors = [*many(torch.bfloat16, 1), *many(torch.float32, 2), *many(torch.float16, 3)]
    found = grad_norm(tensors, norm_type=norm_type, backend=backend)
    assert float(found) == pytest.approx(exact_norm(tensors, norm_type), rel=1e-6)
    assert torch.equal(found, grad_norm(tensors, norm_type=norm_type, backend=backend))


def test_four_million_elements_however_they_are_cut():
    """torch.norm adds them in order in fp32: 7e-5 off."""
    values = torch.linspace(0.5, 1.5, (1 << 22) + 5)
    exact = exact_norm([values], 2)
    whole, cut = grad_norm([values], backend="torch"), grad_norm(values.split(100_003), backend="torch")
    assert float(whole) == pytest.approx(exact, rel=1e-7) and float(cut) == pytest.approx(exact, rel=1e-7)


@each_backend
@each_norm
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows(broken, norm_type, backend):
    tensors = many(torch.float32)
    tensors[5][77] = broken
    assert not grad_norm(tensors, norm_type=norm_type, backend=backend).isfinite()


@each_backend
def test_scale_invariance_and_strides(backend):
    x = draw(33, 65, dtype=torch.float32, seed=1)
    norm = grad_norm([x], backend=backend)
    assert torch.equal(grad_norm([x * 4], backend=backend), norm * 4)
    assert torch.equal(grad_norm([x.t()], backend=backend), norm)
    unaligned = draw(4098, dtype=torch.float32, seed=2)[1:]
    assert float(grad_norm([unaligned], backend=backend)) == pytest.approx(exact_norm([unaligned], 2), rel=1e-6)


@each_backend
def test_nothing_in(backend):
    assert grad_norm([], backend=backend).item() == 0 and grad_norm([torch.empty(0, 3, device=DEVICE)], norm_type=math.inf, backend=backend).item() == 0
    scale_([], 2.0, backend=backend)
    scale_([torch.empty(0, device=DEVICE)], 2.0, backend=backend)


@each_backend
@each_dtype
@pytest.mark.parametrize("as_tensor", [False, True])
def test_scaling_in_place_rounds_once(as_tensor, dtype, backend):
    tensors = [*many(dtype), draw(5, 7, dtype=dtype, seed=40).t(), draw(130, dtype=dtype, seed=41)[1:]]
    factor = torch.tensor(0.3, device=DEVICE)
    wanted = [(t.float() * factor).to(dtype) for t in tensors]
    addresses = [t.data_ptr() for t in tensors]
    scale_(tensors, factor if as_tensor else factor.item(), backend=backend)
    assert [t.data_ptr() for t in tensors] == addresses
    assert all(torch.equal(t, w) for t, w in zip(tensors, wanted, strict=True))


@each_backend
def test_clipping(backend):
    tensors = many(torch.float32)
    before, norm = [t.clone() for t in tensors], grad_norm(tensors, backend=backend)
    assert float(clip_(tensors, 1e9, norm, backend=backend)) == 1 and all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    clip_(tensors, 0.5, norm, backend=backend)
    assert float(grad_norm(tensors, backend=backend)) == pytest.approx(0.5, rel=1e-5)
    theirs = [torch.nn.Parameter(b) for b in before]
    for p, b in zip(theirs, before, strict=True):
        p.grad = b.clone()
    torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    for ours, p in zip(tensors, theirs, strict=True):
        torch.testing.assert_close(ours, p.grad, rtol=1e-5, atol=0)
    for broken in (math.inf, math.nan):
        kept = tensors[3].clone()
        assert float(clip_(tensors, 0.1, torch.tensor(broken, device=DEVICE), backend=backend)) == 1 and torch.equal(tensors[3], kept)


@each_backend
def test_registered_as_torch_wants_it(backend):
    tensors = [draw(5, 3, dtype=torch.float32, seed=1), draw(9, dtype=torch.bfloat16, seed=2)]
    torch.library.opcheck(torch.ops.kernels.grad_norm.default, ([t.view(-1) for t in tensors], 2.0, backend))
    torch.library.opcheck(torch.ops.kernels.scale_.default, ([t.view(-1) for t in tensors], torch.tensor(2.0, device=DEVICE), backend))
    compiled = torch.compile(lambda a, b: grad_norm([a, b], backend=backend), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors), grad_norm(tensors, backend=backend))


def test_bad_input_is_named():
    x = torch.randn(4, 6)
    for error, words, call in (
        (TypeError, r"tensors\[1\] is int64", lambda: grad_norm([x, x.long()])), (ValueError, "norm_type is 3", lambda: grad_norm([x], norm_type=3)),
        (ValueError, r"tensors\[0\] .* has holes", lambda: grad_norm([x[:, ::2]])),
        (ValueError, r"tensors\[0\] .* has holes or overlaps", lambda: scale_([x[0].expand(3, 6)], 2.0)),
        (ValueError, r"tensors\[1\] is on meta", lambda: grad_norm([x, x.to("meta")])), (TypeError, "group is 3", lambda: grad_norm([x], group=3)),
        (TypeError, "factor is float64", lambda: scale_([x], torch.tensor(1.0).double())), (ValueError, "factor has shape", lambda: scale_([x], x)),
        (ValueError, "factor is on meta", lambda: scale_([x], torch.tensor(1.0, device="meta"))),
        (ValueError, "max_norm is 0", lambda: clip_([x], 0, torch.tensor(1.0))),
        (MissingBackend, "unknown here; there are: ", lambda: grad_norm([x], backend="apex")),
    ):
        with pytest.raises(error, match=words):
            call()


RANK = """
import math, torch, torch.distributed as dist
from kernels.grad_norm import grad_norm
dist.init_process_group("gloo")
rank = dist.get_rank()
values = torch.randn(5000, generator=torch.Generator().manual_seed(1))
for cut in (2500, 0, 4999):
    part = [values[:cut]] if rank == 0 else list(values[cut:].split(700))
    for p in (1, 2, math.inf):
        found, exact = grad_norm(part, norm_type=p, group=dist.group.WORLD), torch.linalg.vector_norm(values.double(), p)
        assert abs(float(found) / float(exact) - 1) < 1e-6, (cut, p, found, exact)
        assert abs(float(grad_norm(part if rank else [], norm_type=p, group=dist.group.WORLD))) > 0
        broken = [torch.tensor([math.nan])] if rank else [torch.ones(3)]
        assert not grad_norm(broken, norm_type=p, group=dist.group.WORLD).isfinite()
print("same")
dist.destroy_process_group()
"""


def test_the_ranks_agree_on_the_norm():
    assert spawn(["-c", RANK], 2, timeout=120) == ["same", "same"]
