"""The tests that `swiglu` and `geglu` share: a class with `op` and `reference`, functions of x (`op` also of `backend`), and `registered`, the name
and kind of the op in torch.ops.kernels."""
import pytest
import torch
from kernel_truth import DEVICE, SIZES, draw, each_backend, each_dtype, judge, same_bits

from kernels.backend import MissingBackend


class Gated:
    name, kind = "", ""

    @staticmethod
    def op(x, backend="auto"):
        raise NotImplementedError

    @staticmethod
    def reference(x):
        raise NotImplementedError

    def registered(self, x, backend):
        return getattr(torch.ops.kernels, self.name)(x, self.kind, backend)

    @each_backend
    @each_dtype
    @pytest.mark.parametrize("width", SIZES)
    def test_error_is_at_most_twice_that_of_pytorch(self, width, dtype, backend):
        x, dy = draw(3, 2 * width, dtype=dtype, seed=width), draw(3, width, dtype=dtype, seed=width + 1)
        judge(lambda x: self.op(x, backend=backend), self.reference, [x], [dy], names=("y", "dx"))
        if backend == "torch":  # outside torch.compile the public function takes PyTorch's own path on CPU
            judge(lambda x: self.registered(x, backend), self.reference, [x], [dy], names=("y", "dx"))

    @each_backend
    @pytest.mark.parametrize("rows", (1, 2, 3, 127))  # a program each, 1 ms and more in the interpreter
    def test_any_number_of_rows(self, rows, backend):
        x, dy = draw(rows, 6, dtype=torch.bfloat16, seed=rows), draw(rows, 3, dtype=torch.bfloat16, seed=rows + 1)
        judge(lambda x: self.op(x, backend=backend), self.reference, [x], [dy], names=("y", "dx"))

    @each_backend
    @each_dtype
    def test_extreme_values_stay_right(self, dtype, backend):
        a = torch.tensor([-6e4, 6e4, -88.0, 88.0, -12.0, 12.0, -4.0, 4.0, -0.0, 0.0, 6e-5, -6e-5], device=DEVICE, dtype=dtype)
        x = torch.stack((a, torch.ones_like(a)), dim=0).view(1, -1)
        judge(lambda x: self.op(x, backend=backend), self.reference, [x], [torch.ones(1, 12, device=DEVICE)], names=("y", "dx"))
        if backend == "triton" and dtype != torch.float16:  # where squares overflow fp32; PyTorch's gelu and its derivatives are not numbers there
            x = torch.tensor([[3e38, -3e38, 1.0, 1.0]], device=DEVICE, dtype=dtype).requires_grad_()
            y = self.op(x, backend=backend)
            (dx,) = torch.autograd.grad(y.float().sum(), x)
            assert torch.equal(y, torch.tensor([[3e38, 0.0]], device=DEVICE, dtype=dtype))
            assert torch.equal(dx[:, :2].float(), torch.tensor([[1.0, 0.0]], device=DEVICE))

    @each_backend
    @pytest.mark.parametrize("shape", [(0, 8), (4, 0), (2, 0, 8)])
    def test_nothing_in_nothing_out(self, shape, backend):
        x = torch.empty(shape, device=DEVICE, requires_grad=True)
        self.op(x, backend=backend).sum().backward()
        assert x.grad.shape == shape

    @each_backend
    def test_rows_may_be_strided_and_dy_may_be_anything(self, backend):
        x, dy = draw(6, 2, 16, dtype=torch.float32, seed=1), draw(8, 6, dtype=torch.float32, seed=2).t()
        judge(lambda x: self.op(x[:, 0], backend=backend), lambda x: self.reference(x[:, 0]), [x], [dy])
        x = draw(6, 40, dtype=torch.float32, seed=3)  # a slice that starts off any 16-byte boundary
        judge(lambda x: self.op(x[:, 3:19], backend=backend), lambda x: self.reference(x[:, 3:19]), [x], [dy])
        x = draw(3, 16, dtype=torch.float32, seed=3).requires_grad_()
        self.op(x, backend=backend).sum().backward()  # dy is one expanded number
        (expected,) = torch.autograd.grad(self.reference(x).sum(), x)
        torch.testing.assert_close(x.grad, expected)

    @each_backend
    def test_leading_dimensions(self, backend):
        x, dy = draw(2, 3, 5, 8, dtype=torch.float32, seed=4), draw(2, 3, 5, 4, dtype=torch.float32, seed=5)
        judge(lambda x: self.op(x, backend=backend), self.reference, [x], [dy])
        judge(lambda x: self.op(x, backend=backend), self.reference, [x[0, 0, 0]], [dy[0, 0, 0]])

    @each_backend
    def test_results_may_be_changed_in_place_and_x_not(self, backend):
        leaf = draw(4, 16, dtype=torch.float32, seed=6).requires_grad_()
        y = self.op(leaf, backend=backend)
        y.mul_(3)
        y.sum().backward()
        (expected,) = torch.autograd.grad(3 * self.reference(leaf).sum(), leaf)
        torch.testing.assert_close(leaf.grad, expected)
        x = leaf * 1
        y = self.op(x, backend=backend)
        x.zero_()  # the backward needs x: PyTorch must notice
        with pytest.raises(RuntimeError, match="modified (by an )?inplace"):
            y.sum().backward()

    def test_bad_input_is_named(self):
        for match, error, call in (
            ("last dimension of x is strided", ValueError, lambda: self.op(torch.randn(8, 4).t())),
            ("do not collapse", ValueError, lambda: self.op(torch.randn(4, 6, 8).transpose(0, 1))),
            ("must be even", ValueError, lambda: self.op(torch.randn(4, 7))),
            ("x is int64", TypeError, lambda: self.op(torch.ones(4, 8, dtype=torch.int64))),
            ("x is float64", TypeError, lambda: self.op(torch.ones(4, 8, dtype=torch.float64))),
            ("scalar", ValueError, lambda: self.op(torch.tensor(1.0))),
            ("unknown here; there are: ", MissingBackend, lambda: self.op(torch.randn(4, 8), backend="cudnn")),
        ):
            with pytest.raises(error, match=f"(?s){self.name}.*{match}|{match}.*"):
                call()

    @each_backend
    def test_same_bits_and_no_grad(self, backend):
        x, dy = draw(40, 258, dtype=torch.bfloat16, seed=5), draw(40, 129, dtype=torch.bfloat16, seed=6)
        same_bits(lambda x: self.op(x, backend=backend), [x], [dy])
        with torch.no_grad():
            assert not self.op(x.requires_grad_(), backend=backend).requires_grad

    @each_backend
    def test_zero_gate_and_linear_in_up(self, backend):
        x = draw(5, 32, dtype=torch.float32, seed=7)
        y = self.op(x, backend=backend)
        assert torch.equal(self.op(torch.cat((x[:, :16], 2 * x[:, 16:]), -1), backend=backend), 2 * y)
        assert not self.op(torch.cat((0 * x[:, :16], x[:, 16:]), -1), backend=backend).any()

    @each_backend
    def test_registered_as_torch_wants_it(self, backend):
        x = draw(3, 16, dtype=torch.float32, seed=7).requires_grad_()
        op, backward = getattr(torch.ops.kernels, self.name).default, getattr(torch.ops.kernels, f"{self.name}_backward").default
        torch.library.opcheck(op, (x, self.kind, backend))
        torch.library.opcheck(backward, (draw(3, 8, dtype=torch.float32, seed=8), x.detach(), self.kind, backend))
        compiled = torch.compile(lambda x: self.op(x, backend=backend), fullgraph=True, backend="aot_eager")
        y, expected = compiled(x), self.op(x, backend=backend)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(torch.autograd.grad(y.pow(2).sum(), x), torch.autograd.grad(expected.pow(2).sum(), x))
