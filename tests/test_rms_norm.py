"""kernels/rms_norm.py against fp64, on CPU through Triton's interpreter and in torch; on a GPU where there is one."""
import pytest
import torch
from kernel_truth import DEVICE, draw, each_backend, judge
from norm_truth import BF16, FP32, Norm

from kernels import jit, tiles
from kernels.backend import MissingBackend
from kernels.rms_norm import rms_norm, rms_norm_reference


class TestRmsNorm(Norm):
    op, reference = staticmethod(rms_norm), staticmethod(rms_norm_reference)


@pytest.mark.skipif(jit.MISSING is not None, reason=str(jit.MISSING))
@pytest.mark.parametrize(("width", "dtype"), [(12001, BF16), (16384, FP32), (32769, BF16)])
def test_rows_in_parts_and_looped_over(width, dtype):
    x, dy, residual = (draw(2, width, dtype=dtype, seed=seed) for seed in (1, 2, 3))
    columns = [draw(width, dtype=dtype, seed=seed) for seed in (5,)]
    judge(lambda x, r, *columns: rms_norm(x, *columns, residual=r, backend="triton"), lambda x, r, *columns: rms_norm_reference(x, *columns, residual=r),
          [x, residual, *columns], [dy, residual])


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
