"""kernels/rms_norm.py against fp64, on CPU through Triton's interpreter and in torch; on a GPU where there is one."""
import pytest
import torch
from kernel_truth import DEVICE, SIZES, draw, each_backend, each_dtype, judge, same_bits

from kernels import jit, norm_rows, tiles
from kernels.backend import MissingBackend
from kernels.rms_norm import rms_norm, rms_norm_reference

BF16, FP32 = torch.bfloat16, torch.float32


@each_backend
@each_dtype
@pytest.mark.parametrize("width", SIZES)
def test_error_is_at_most_twice_that_of_pytorch(width, dtype, backend):
    rows = 64 if width < 1000 else 5
    x, dy = draw(rows, width, dtype=dtype, seed=width), draw(rows, width, dtype=dtype, seed=2)
    columns = [draw(width, dtype=dtype, seed=seed) for seed in (5,)]
    judge(lambda x, *columns: rms_norm(x, *columns, backend=backend), rms_norm_reference, [x, *columns], [dy], names=("y", "dx", "dweight"))


@each_backend
@each_dtype
@pytest.mark.parametrize("stream", ["same", "fp32"])
@pytest.mark.parametrize("width", [3, 129, 1021])
def test_residual_zero_centred_gamma_fp32_weight(width, stream, dtype, backend):
    wide = FP32 if stream == "fp32" else dtype
    x, dy = draw(37, width, dtype=dtype, seed=width), draw(37, width, dtype=dtype, seed=2)
    residual, dtotal = draw(37, width, dtype=wide, seed=3), draw(37, width, dtype=wide, seed=4)
    columns = [draw(width, dtype=wide, seed=seed, scale=0.1) for seed in (5,)]
    options = {"zero_centered": True, "eps": 1e-3}
    judge(lambda x, r, *columns: rms_norm(x, *columns, residual=r, backend=backend, **options),
          lambda x, r, *columns: rms_norm_reference(x, *columns, residual=r, **options), [x, residual, *columns], [dy, dtotal],
          names=("y", "new residual", "dx", "dresidual", "dweight"))


@pytest.mark.skipif(jit.MISSING is not None, reason=str(jit.MISSING))
@pytest.mark.parametrize(("width", "dtype"), [(12001, BF16), (16384, FP32), (32769, BF16)])
def test_rows_in_parts_and_looped_over(width, dtype):
    x, dy, residual = (draw(2, width, dtype=dtype, seed=seed) for seed in (1, 2, 3))
    columns = [draw(width, dtype=dtype, seed=seed) for seed in (5,)]
    judge(lambda x, r, *columns: rms_norm(x, *columns, residual=r, backend="triton"), lambda x, r, *columns: rms_norm_reference(x, *columns, residual=r),
          [x, residual, *columns], [dy, residual])


@pytest.mark.skipif(jit.MISSING is not None, reason=str(jit.MISSING))
def test_more_rows_than_programs_hold_at_once(monkeypatch):
    # 3 programs of a whole row, a row in parts, and a looped row take turns over 8 rows; the shares of dweight of all rows must come together
    few = dict(tiles.norm_backward(4096, centered=False, itemsize=4), programs=3)
    parts, loop = {"BLOCK": 64, "PARTS": 2, "FIRST": 128, "num_warps": 1, "programs": 3}, {"BLOCK": 64, "num_warps": 1, "programs": 3}
    for choice in (dict(few, BLOCK=128, ROWS=1), dict(few, BLOCK=128, ROWS=2), parts, loop):
        monkeypatch.setattr(norm_rows.tiles, "norm_backward", lambda *_, choice=choice, **__: dict(choice))
        forward = {"BLOCK": 64, "num_warps": 1} if choice is loop else {"BLOCK": 128, "ROWS": 2, "num_warps": 1}
        monkeypatch.setattr(norm_rows.tiles, "norm_forward", lambda _, forward=forward: dict(forward))
        x, dy, residual = (draw(8, 101, dtype=FP32, seed=seed) for seed in (1, 2, 3))
        width, dtype = 101, FP32
        columns = [draw(width, dtype=dtype, seed=seed) for seed in (5,)]
        judge(lambda x, r, *columns: rms_norm(x, *columns, residual=r, backend="triton"), lambda x, r, *columns: rms_norm_reference(x, *columns, residual=r),
              [x, residual, *columns], [dy, residual])


@each_backend
def test_only_one_of_both_results_is_used(backend):
    x, residual = (draw(2, 3, 20, dtype=FP32, seed=seed).requires_grad_() for seed in (1, 2))
    weight = draw(20, dtype=FP32, seed=3).requires_grad_()
    y, total = rms_norm(x, weight, residual=residual, backend=backend)
    expected_y, expected_total = rms_norm_reference(x, weight, residual=residual)
    for ours, theirs in ((y, expected_y), (total, expected_total)):
        found = torch.autograd.grad(ours.square().sum(), (x, residual, weight), retain_graph=True, allow_unused=True)
        expected = torch.autograd.grad(theirs.square().sum(), (x, residual, weight), retain_graph=True, allow_unused=True)
        torch.testing.assert_close(found, expected)
    # one tensor serves as both gradients: neither may be changed through the other
    (y.sum() + total.sum()).backward()
    residual.grad.zero_()
    assert x.grad.abs().sum() > 0


@each_backend
@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (2, 0, 8)])
def test_nothing_in_nothing_out(shape, backend):
    x, residual, weight = (torch.ones(s, device=DEVICE, requires_grad=True) for s in (shape, shape, shape[-1:]))
    y, total = rms_norm(x, weight, residual=residual, backend=backend)
    (y.sum() + total.sum()).backward()
    assert y.shape == total.shape == x.grad.shape == shape and not weight.grad.any()


@each_backend
def test_rows_may_be_strided_and_dy_may_be_anything(backend):
    x, residual = draw(6, 2, 16, dtype=FP32, seed=1), draw(6, 3, 16, dtype=FP32, seed=2)
    weight, dy, dtotal = draw(16, dtype=FP32, seed=3), draw(16, 6, dtype=FP32, seed=4).t(), draw(1, 16, dtype=FP32, seed=5).expand(6, 16)
    judge(lambda x, r, w: rms_norm(x[:, 1], w, residual=r[:, 2], backend=backend), lambda x, r, w: rms_norm_reference(x[:, 1], w, residual=r[:, 2]),
          [x, residual, weight], [dy, dtotal])
    judge(lambda x, w: rms_norm(x[:, 0], w, backend=backend), lambda x, w: rms_norm_reference(x[:, 0], w), [x, weight], [dy])
    x = draw(2, 3, 16, dtype=FP32, seed=6).requires_grad_()
    rms_norm(x, weight, backend=backend).sum().backward()  # dy is one expanded number
    (expected,) = torch.autograd.grad(rms_norm_reference(x, weight).sum(), x)
    torch.testing.assert_close(x.grad, expected)


@each_backend
def test_changed_in_place(backend):
    x, weight = draw(4, 16, dtype=FP32, seed=1).requires_grad_(), draw(16, dtype=FP32, seed=2)
    h = x * 2
    y = rms_norm(h.mul_(3), weight, backend=backend)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(rms_norm_reference(x * 6, weight).sum(), x))
    y = rms_norm(h, weight, backend=backend)
    h.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@each_backend
def test_properties(backend):
    x, weight, dy = draw(4, 64, dtype=FP32, seed=1).requires_grad_(), draw(64, dtype=FP32, seed=2), draw(4, 64, dtype=FP32, seed=3)
    y = rms_norm(x, weight, eps=0.0, backend=backend)
    assert torch.equal(rms_norm(x * 1024, weight, eps=0.0, backend=backend), y)  # scale of the input: a power of two changes no mantissa
    (dx,) = torch.autograd.grad(y, x, dy)
    bound = 1e-5 * dx.abs().max() * x.abs().max()
    assert ((dx * x).mean(1).abs() < bound).all()  # y does not change along x, nor does the loss
    torch.testing.assert_close(rms_norm(x, weight - 1, zero_centered=True, backend=backend), rms_norm(x, weight, backend=backend))


@each_backend
def test_same_bits_and_no_grad(backend):
    x, residual, dy = (draw(70, 129, dtype=BF16, seed=seed) for seed in (1, 2, 3))
    weight = draw(129, dtype=BF16, seed=4)
    same_bits(lambda x, r, w: rms_norm(x, w, residual=r, backend=backend), [x, residual, weight], [dy, dy])
    with torch.no_grad():
        assert not rms_norm(x.requires_grad_(), weight, backend=backend).requires_grad


@each_backend
@pytest.mark.parametrize("stream", [None, BF16, FP32])
def test_registered_as_torch_wants_it(stream, backend):
    x, weight = draw(3, 16, dtype=BF16, seed=7).requires_grad_(), draw(16, dtype=FP32, seed=8).requires_grad_()
    residual = None if stream is None else draw(3, 16, dtype=stream, seed=9).requires_grad_()
    rstd = draw(3, dtype=FP32, seed=11).abs()
    torch.library.opcheck(torch.ops.kernels.rms_norm.default, (x, residual, weight, 1e-5, True, backend))
    h, dtotal = (x.detach(), None) if residual is None else (residual.detach(), residual.detach())
    torch.library.opcheck(torch.ops.kernels.rms_norm_backward.default, (x.detach(), dtotal, h, weight.detach(), rstd, True, backend))

    def function(x, residual, weight):
        return rms_norm(x, weight, residual=residual, zero_centered=True, backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    inputs = [t for t in (x, residual, weight) if t is not None]
    for ours, theirs in zip(*([o if isinstance(o, tuple) else (o,) for o in (f(x, residual, weight) for f in (compiled, function))]), strict=True):
        torch.testing.assert_close(ours, theirs)
    losses = [sum((o.float() * (i + 1)).sum() for i, o in enumerate(f(x, residual, weight) if residual is not None else (f(x, residual, weight),)))
              for f in (compiled, function)]
    torch.testing.assert_close(*(torch.autograd.grad(loss, inputs) for loss in losses))


def test_bad_input_is_named():
    x, weight = torch.randn(4, 8), torch.ones(8)
    with pytest.raises(TypeError, match="x is int64"):
        rms_norm(x.long(), weight)
    with pytest.raises(TypeError, match="weight is bfloat16; it must be float32"):
        rms_norm(x, weight.bfloat16())
    with pytest.raises(TypeError, match="residual is float16; it must be bfloat16, float32"):
        rms_norm(x.bfloat16(), weight, residual=x.half())
    with pytest.raises(ValueError, match=r"weight has shape \(7,\), expected \(8,\)"):
        rms_norm(x, torch.ones(7))
    with pytest.raises(ValueError, match="residual has shape"):
        rms_norm(x, weight, residual=x[:2])
    with pytest.raises(ValueError, match="weight is on meta"):
        rms_norm(x, weight.to("meta"))
    with pytest.raises(ValueError, match="residual is on meta"):
        rms_norm(x, weight, residual=x.to("meta"))
    with pytest.raises(ValueError, match="last dimension of x is strided"):
        rms_norm(torch.randn(8, 4).t(), weight)
    with pytest.raises(ValueError, match="leading dimensions of residual .* do not collapse"):
        rms_norm(torch.randn(6, 4, 8), weight, residual=torch.randn(4, 6, 8).transpose(0, 1))
    with pytest.raises(ValueError, match="last dimension of weight is strided"):
        rms_norm(x, torch.ones(8, 2)[:, 0])
    with pytest.raises(ValueError, match="scalar"):
        rms_norm(torch.tensor(1.0), weight)
    with pytest.raises(MissingBackend, match="unknown here; there are: "):
        rms_norm(x, weight, backend="cudnn")


def test_too_wide_for_the_kernel():
    pytest.importorskip("triton")
    x, weight = torch.ones(1, tiles.NORM_WIDEST + 1, device=DEVICE), torch.ones(tiles.NORM_WIDEST + 1, device=DEVICE)
    with pytest.raises(ValueError, match="last dimension of x is 65537, over 65536"):
        rms_norm(x, weight, backend="triton")
    torch.testing.assert_close(rms_norm(x, weight, backend="torch"), rms_norm_reference(x, weight))
