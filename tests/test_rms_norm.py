"""kernels/rms_norm.py against fp64, on CPU through Triton's interpreter and in torch; on a GPU where there is one."""
import pytest
import torch
from kernel_truth import DEVICE, SIZES, draw, each_backend, each_dtype, judge, same_bits

from kernels import tiles
from kernels.backend import MissingBackend
from kernels.rms_norm import rms_norm, rms_norm_reference

BF16, FP32 = torch.bfloat16, torch.float32


@each_backend
@each_dtype
@pytest.mark.parametrize("width", SIZES)
def test_error_is_at_most_twice_that_of_pytorch(width, dtype, backend):
    rows = 64 if width < 1000 else 5
    x, weight, dy = draw(rows, width, dtype=dtype, seed=width), draw(width, dtype=dtype, seed=1), draw(rows, width, dtype=dtype, seed=2)
    judge(lambda x, w: rms_norm(x, w, backend=backend), rms_norm_reference, [x, weight], [dy], names=("y", "dx", "dweight"))


@each_backend
@each_dtype
@pytest.mark.parametrize("stream", ["same", "fp32"])
@pytest.mark.parametrize("width", [3, 129, 1021])
def test_residual_zero_centred_fp32_weight(width, stream, dtype, backend):
    wide = FP32 if stream == "fp32" else dtype
    x, weight, dy = draw(37, width, dtype=dtype, seed=width), draw(width, dtype=wide, seed=1, scale=0.1), draw(37, width, dtype=dtype, seed=2)
    residual, dtotal = draw(37, width, dtype=wide, seed=3), draw(37, width, dtype=wide, seed=4)
    judge(lambda x, w, r: rms_norm(x, w, residual=r, zero_centered=True, eps=1e-3, backend=backend),
          lambda x, w, r: rms_norm_reference(x, w, residual=r, zero_centered=True, eps=1e-3), [x, weight, residual], [dy, dtotal],
          names=("y", "new residual", "dx", "dweight", "dresidual"))
