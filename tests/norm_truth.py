"""The tests that `rms_norm` and `layer_norm` share: a class with `op`, its `reference`, the seeds of its columns (weight, bias) and their gradients' names."""
import pytest
import torch
from kernel_truth import DEVICE, SIZES, draw, each_backend, each_dtype, judge, same_bits

from kernels import jit, norm_rows, tiles

BF16, FP32 = torch.bfloat16, torch.float32


class Norm:
    seeds, gradients, centered = (5,), ("dweight",), False

    @staticmethod
    def op(x, weight, *bias, **options):
        raise NotImplementedError

    @staticmethod
    def reference(x, weight, *bias, **options):
        raise NotImplementedError

    @each_backend
    @each_dtype
    @pytest.mark.parametrize("width", SIZES)
    def test_error_is_at_most_twice_that_of_pytorch(self, width, dtype, backend):
        rows = 64 if width < 1000 else 5
        x, dy = draw(rows, width, dtype=dtype, seed=width), draw(rows, width, dtype=dtype, seed=2)
        columns = [draw(width, dtype=dtype, seed=seed) for seed in self.seeds]
        judge(lambda x, *columns: self.op(x, *columns, backend=backend), self.reference, [x, *columns], [dy], names=("y", "dx", *self.gradients))

    @each_backend
    @each_dtype
    @pytest.mark.parametrize("stream", ["same", "fp32"])
    @pytest.mark.parametrize("width", [3, 129, 1021])
    def test_residual_zero_centred_gamma_fp32_weight(self, width, stream, dtype, backend):
        wide = FP32 if stream == "fp32" else dtype
        x, dy = draw(37, width, dtype=dtype, seed=width), draw(37, width, dtype=dtype, seed=2)
        residual, dtotal = draw(37, width, dtype=wide, seed=3), draw(37, width, dtype=wide, seed=4)
        columns = [draw(width, dtype=wide, seed=seed, scale=0.1) for seed in self.seeds]
        options = {"zero_centered": True, "eps": 1e-3}
        judge(lambda x, r, *columns: self.op(x, *columns, residual=r, backend=backend, **options),
              lambda x, r, *columns: self.reference(x, *columns, residual=r, **options), [x, residual, *columns], [dy, dtotal],
              names=("y", "new residual", "dx", "dresidual", *self.gradients))

    @pytest.mark.skipif(jit.MISSING is not None, reason=str(jit.MISSING))
    def test_more_rows_than_programs_hold_at_once(self, monkeypatch):
        # 3 programs of a whole row, a row in parts, and a looped row take turns over 8 rows; the shares of dweight of all rows must come together
        few = dict(tiles.norm_backward(4096, centered=self.centered, itemsize=4), programs=3)
        parts, loop = {"BLOCK": 64, "PARTS": 2, "FIRST": 128, "num_warps": 1, "programs": 3}, {"BLOCK": 64, "num_warps": 1, "programs": 3}
        for choice in (dict(few, BLOCK=128, ROWS=1), dict(few, BLOCK=128, ROWS=2), parts, loop):
            monkeypatch.setattr(norm_rows.tiles, "norm_backward", lambda *_, choice=choice, **__: dict(choice))
            forward = {"BLOCK": 64, "num_warps": 1} if choice is loop else {"BLOCK": 128, "ROWS": 2, "num_warps": 1}
            monkeypatch.setattr(norm_rows.tiles, "norm_forward", lambda _, forward=forward: dict(forward))
            x, dy, residual = (draw(8, 101, dtype=FP32, seed=seed) for seed in (1, 2, 3))
            width, dtype = 101, FP32
            columns = [draw(width, dtype=dtype, seed=seed) for seed in self.seeds]
            judge(lambda x, r, *columns: self.op(x, *columns, residual=r, backend="triton"), lambda x, r, *columns: self.reference(x, *columns, residual=r),
                  [x, residual, *columns], [dy, residual])

    @each_backend
    def test_only_one_of_both_results_is_used(self, backend):
        x, residual = (draw(2, 3, 20, dtype=FP32, seed=seed).requires_grad_() for seed in (1, 2))
        weight = draw(20, dtype=FP32, seed=3).requires_grad_()
        y, total = self.op(x, weight, residual=residual, backend=backend)
        expected_y, expected_total = self.reference(x, weight, residual=residual)
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
    def test_nothing_in_nothing_out(self, shape, backend):
        x, residual, weight = (torch.ones(s, device=DEVICE, requires_grad=True) for s in (shape, shape, shape[-1:]))
        y, total = self.op(x, weight, residual=residual, backend=backend)
        (y.sum() + total.sum()).backward()
        assert y.shape == total.shape == x.grad.shape == shape and not weight.grad.any()

    @each_backend
    def test_rows_may_be_strided_and_dy_may_be_anything(self, backend):
        x, residual = draw(6, 2, 16, dtype=FP32, seed=1), draw(6, 3, 16, dtype=FP32, seed=2)
        weight, dy, dtotal = draw(16, dtype=FP32, seed=3), draw(16, 6, dtype=FP32, seed=4).t(), draw(1, 16, dtype=FP32, seed=5).expand(6, 16)
        judge(lambda x, r, w: self.op(x[:, 1], w, residual=r[:, 2], backend=backend), lambda x, r, w: self.reference(x[:, 1], w, residual=r[:, 2]),
              [x, residual, weight], [dy, dtotal])
        judge(lambda x, w: self.op(x[:, 0], w, backend=backend), lambda x, w: self.reference(x[:, 0], w), [x, weight], [dy])
        x = draw(2, 3, 16, dtype=FP32, seed=6).requires_grad_()
        self.op(x, weight, backend=backend).sum().backward()  # dy is one expanded number
        (expected,) = torch.autograd.grad(self.reference(x, weight).sum(), x)
        torch.testing.assert_close(x.grad, expected)

    @each_backend
    def test_changed_in_place(self, backend):
        x, weight = draw(4, 16, dtype=FP32, seed=1).requires_grad_(), draw(16, dtype=FP32, seed=2)
        h = x * 2
        y = self.op(h.mul_(3), weight, backend=backend)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(self.reference(x * 6, weight).sum(), x))
        y = self.op(h, weight, backend=backend)
        h.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    @each_backend
    def test_same_bits_and_no_grad(self, backend):
        x, residual, dy = (draw(70, 129, dtype=BF16, seed=seed) for seed in (1, 2, 3))
        weight = draw(129, dtype=BF16, seed=4)
        same_bits(lambda x, r, w: self.op(x, w, residual=r, backend=backend), [x, residual, weight], [dy, dy])
        with torch.no_grad():
            assert not self.op(x.requires_grad_(), weight, backend=backend).requires_grad
