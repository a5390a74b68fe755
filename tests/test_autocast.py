"""Autocast changes no bit and no dtype of an op: what is fp32 inside stays so."""
import pytest
import torch
from kernel_truth import DEVICE, draw, each_backend, each_dtype, run

from kernels.attention import attention
from kernels.bias_gelu import bias_gelu
from kernels.layer_norm import layer_norm
from kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_sum
from kernels.rms_norm import rms_norm
from kernels.swiglu import swiglu
from kernels.wgrad_accumulate import wgrad_accumulate_


def same_under_autocast(function, inputs, douts) -> None:
    plain = run(function, inputs, douts)
    with torch.autocast(DEVICE, torch.bfloat16):
        cast = run(function, inputs, douts)  # backward too: gradient checkpointing runs it in there
    for a, b in zip(plain, cast, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@each_backend
@each_dtype
@pytest.mark.parametrize("width", [37, 520])
def test_norms(width, dtype, backend):
    x, residual, weight, dy = (draw(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(((5, width), (5, width), (width,), (5, width))))
    for norm in (rms_norm, layer_norm):
        same_under_autocast(lambda x, w, norm=norm: norm(x, w, backend=backend), [x, weight], [dy])
        same_under_autocast(lambda x, r, w, norm=norm: norm(x, w, residual=r, backend=backend), [x, residual, weight], [dy, dy])


@each_dtype
def test_norms_registered_in_torch(dtype):
    x, weight, dy = draw(5, 37, dtype=dtype, seed=1), draw(37, dtype=dtype, seed=2), draw(5, 37, dtype=dtype, seed=3)
    same_under_autocast(lambda x, w: torch.ops.kernels.rms_norm(x, None, w, 1e-5, False, "torch")[0], [x, weight], [dy])
    same_under_autocast(lambda x, w: torch.ops.kernels.layer_norm(x, None, w, None, 1e-5, False, "torch")[0], [x, weight], [dy])


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # torch's own backward concatenates, which bf16 autocast refuses in fp16
def test_activations(dtype, backend):
    x, bias, dy = draw(3, 34, dtype=dtype, seed=1), draw(34, dtype=dtype, seed=2), draw(3, 34, dtype=dtype, seed=3)
    same_under_autocast(lambda x: swiglu(x, backend=backend), [x], [dy[:, :17]])
    same_under_autocast(lambda x, b: bias_gelu(x, b, backend=backend), [x, bias], [dy])


@each_dtype
@pytest.mark.parametrize("return_lse", [False, True])
def test_attention(return_lse, dtype):
    q, k, v, dout = (draw(7, 2, 4, 8, dtype=dtype, seed=seed) for seed in range(4))
    dlse = [draw(2, 4, 7, dtype=torch.float32, seed=4)] if return_lse else []
    for causal in (False, True):
        def dense(q, k, v, causal=causal):
            return attention(q, k, v, causal=causal, return_lse=return_lse, backend="torch")

        same_under_autocast(dense, [q, k, v], [dout, *dlse])
        assert (dense(q, k, v)[0] if return_lse else dense(q, k, v)).dtype == dtype
    cu = torch.tensor([0, 3, 7], dtype=torch.int32, device=DEVICE)
    same_under_autocast(lambda q, k, v: attention(q, k, v, causal=True, cu_seqlens_q=cu, backend="torch"), [x[:, 0] for x in (q, k, v)], [dout[:, 0]])

    def dropped(q, k, v):
        torch.manual_seed(5)
        return attention(q, k, v, causal=True, cu_seqlens_q=cu, dropout=0.5, backend="torch")

    same_under_autocast(dropped, [x[:, 0] for x in (q, k, v)], None)  # backward is torch's own, products and all


def test_attention_compiled():
    q, k, v = (draw(7, 2, 4, 8, dtype=torch.float32, seed=seed) for seed in range(3))
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, causal=True, backend="torch"), fullgraph=True, backend="aot_eager")
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(compiled(q, k, v), attention(q, k, v, causal=True, backend="torch"))


@each_backend
@each_dtype
def test_linear_cross_entropy_and_wgrad(dtype, backend):
    hidden, weight, bias = draw(6, 16, dtype=dtype, seed=1), draw(40, 16, dtype=dtype, seed=2), draw(40, dtype=dtype, seed=3)
    target, ones = torch.arange(6, device=DEVICE) * 6, torch.ones(6, device=DEVICE)
    same_under_autocast(lambda h, w, b: linear_cross_entropy(h, w, target, bias=b, backend=backend), [hidden, weight, bias], [ones] * 3)
    same_under_autocast(lambda h, w, b: linear_cross_entropy_sum(h, w, target, ones, bias=b, recompute=False, backend=backend)[0],
                        [hidden, weight, bias], [ones[0]])

    def accumulate(dy, x):
        main = torch.zeros(40, 16, device=DEVICE)
        wgrad_accumulate_(main, dy, x, backend=backend)
        return main

    with torch.no_grad():
        same_under_autocast(accumulate, [draw(6, 40, dtype=dtype, seed=4), hidden], None)
