"""kernels/swiglu.py against fp64, on CPU through Triton's interpreter and in torch; on a GPU where there is one."""
import pytest
import torch
from kernel_truth import DEVICE, SIZES, draw, each_backend, each_dtype, judge, same_bits

from kernels.backend import MissingBackend
from kernels.swiglu import swiglu, swiglu_reference


@each_backend
@each_dtype
@pytest.mark.parametrize("width", SIZES)
def test_error_is_at_most_twice_that_of_pytorch(width, dtype, backend):
    x, dy = draw(3, 2 * width, dtype=dtype, seed=width), draw(3, width, dtype=dtype, seed=width + 1)
    judge(lambda x: swiglu(x, backend=backend), swiglu_reference, [x], [dy], names=("y", "dx"))


@each_backend
def test_large_values_stay_finite(backend):
    x = torch.tensor([[-1e4, 1e4, -88.0, 88.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]], device=DEVICE)
    judge(lambda x: swiglu(x, backend=backend), swiglu_reference, [x], [torch.ones(1, 5, device=DEVICE)])


@each_backend
@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (2, 0, 8)])
def test_nothing_in_nothing_out(shape, backend):
    x = torch.empty(shape, device=DEVICE, requires_grad=True)
    swiglu(x, backend=backend).sum().backward()
    assert x.grad.shape == shape


@each_backend
def test_rows_may_be_strided_and_dy_may_be_anything(backend):
    x, dy = draw(6, 2, 16, dtype=torch.float32, seed=1), draw(8, 6, dtype=torch.float32, seed=2).t()
    judge(lambda x: swiglu(x[:, 0], backend=backend), lambda x: swiglu_reference(x[:, 0]), [x], [dy])
    x = draw(3, 16, dtype=torch.float32, seed=3).requires_grad_()
    swiglu(x, backend=backend).sum().backward()  # dy is one expanded number
    (expected,) = torch.autograd.grad(swiglu_reference(x).sum(), x)
    torch.testing.assert_close(x.grad, expected)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="last dimension of x is strided"):
        swiglu(torch.randn(8, 4).t())
    with pytest.raises(ValueError, match="do not collapse"):
        swiglu(torch.randn(4, 6, 8).transpose(0, 1))
    with pytest.raises(ValueError, match="must be even"):
        swiglu(torch.randn(4, 7))
    with pytest.raises(TypeError, match="x is int64"):
        swiglu(torch.ones(4, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="scalar"):
        swiglu(torch.tensor(1.0))
    with pytest.raises(MissingBackend, match="unknown here; there are: "):
        swiglu(torch.randn(4, 8), backend="cudnn")


@each_backend
def test_same_bits_and_no_grad(backend):
    x, dy = draw(40, 258, dtype=torch.bfloat16, seed=5), draw(40, 129, dtype=torch.bfloat16, seed=6)
    same_bits(lambda x: swiglu(x, backend=backend), [x], [dy])
    with torch.no_grad():
        assert not swiglu(x.requires_grad_(), backend=backend).requires_grad


@each_backend
def test_registered_as_torch_wants_it(backend):
    x = draw(3, 16, dtype=torch.float32, seed=7).requires_grad_()
    torch.library.opcheck(torch.ops.kernels.swiglu.default, (x, backend))
    torch.library.opcheck(torch.ops.kernels.swiglu_backward.default, (draw(3, 8, dtype=torch.float32, seed=8), x.detach(), backend))
    compiled = torch.compile(lambda x: swiglu(x, backend=backend), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), swiglu(x, backend=backend))
