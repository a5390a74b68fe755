"""Products in 16 bits that are computed in fp32: against fp64 rounded once, for every kernel that is replaced; what is not in 16 bits stays torch's to the bit.

Kernels are replaced for good, so it happens in a process of its own, whatever the processor; the process prints what differs.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.both
ROOT = Path(__file__).resolve().parent.parent
SOURCE = r"""
import json
import torch
import torch.nn.functional as F
from megatron_ext.platform import half_products

torch.manual_seed(0)
a, b, c = torch.randn(33, 65), torch.randn(65, 17), torch.randn(33, 17)
A, B, C = torch.randn(3, 33, 65), torch.randn(3, 65, 17), torch.randn(3, 33, 17)
q, k, v = torch.randn(2, 4, 9, 16), torch.randn(2, 4, 9, 16), torch.randn(2, 4, 9, 16)
mask = torch.zeros(1, 1, 9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)


def out(f, like, *operands, **options):
    target = torch.empty(0, dtype=like.dtype)
    assert f(*operands, out=target, **options) is target
    return target


def flash(q, k, v, mask):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=mask, scale=0.3)


def gradient(q, k, v, mask):
    o, lse = flash(q, k, v, mask)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(q, q, k, v, o, lse, 0.0, False, attn_mask=mask, scale=0.3)


def of_loss(a, b):
    x = a.clone().requires_grad_()
    return torch.autograd.grad((x @ b).square().sum(), x)[0]


def dense(q, k, v, mask):  # its definition, for fp64
    s = q @ k.mT * 0.3 + mask
    return s.softmax(-1) @ v, s.logsumexp(-1)


def dense_gradient(q, k, v, mask):
    x = [y.clone().requires_grad_() for y in (q, k, v)]
    return torch.autograd.grad(dense(*x, mask)[0], x, q)


CASES = {
    "mm": (lambda a, b: a @ b, (a, b)), "mm, transposed": (lambda a, b: a.t().contiguous().t() @ b.t().contiguous().t(), (a, b)),
    "mm.out": (lambda a, b: out(torch.mm, a, a, b), (a, b)), "addmm": (lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=2), (c, a, b)),
    "addmm_": (lambda c, a, b: c.clone().addmm_(a, b, beta=0.5), (c, a, b)), "addmm.out": (lambda c, a, b: out(torch.addmm, c, c, a, b, alpha=2), (c, a, b)),
    "bmm": (lambda A, B: A @ B, (A, B)), "bmm.out": (lambda A, B: out(torch.bmm, A, A, B), (A, B)),
    "baddbmm": (lambda C, A, B: torch.baddbmm(C, A, B, alpha=2), (C, A, B)), "baddbmm_": (lambda C, A, B: C.clone().baddbmm_(A, B, beta=0), (C, A, B)),
    "baddbmm.out": (lambda C, A, B: out(torch.baddbmm, C, C, A, B, beta=2), (C, A, B)),
    "linear": (lambda A, b, c: F.linear(A, b.t(), c[0]), (A, b, c)), "gradient of a loss": (of_loss, (a, b)),
    "no rows": (lambda a, b: a[:0] @ b, (a, b)), "nothing to sum": (lambda a, b: a[:, :0] @ b[:0], (a, b)),
    "attention": (flash, (q, k, v, mask)), "attention's gradient": (gradient, (q, k, v, mask)),
}
TRUTH = {"attention": dense, "attention's gradient": dense_gradient}


def results(case, dtype):
    function, operands = CASES[case]
    found = (TRUTH.get(case, function) if dtype == torch.float64 else function)(*(x.to(dtype) for x in operands))
    return found if isinstance(found, tuple) else (found,)


before = {case: results(case, torch.float32) for case in CASES}
half_products.replace()
wrong = []
for case in CASES:
    if any(not torch.equal(x, y) for x, y in zip(before[case], results(case, torch.float32), strict=True)):
        wrong.append(f"{case}: fp32 is no longer torch's own")
    for dtype in (torch.bfloat16, torch.float16):
        operands = CASES[case][1]
        function = TRUTH.get(case, CASES[case][0])
        truth = function(*(x.to(dtype).double() for x in operands))
        for i, (x, y) in enumerate(zip(results(case, dtype), truth if isinstance(truth, tuple) else (truth,), strict=True)):
            kept = torch.float32 if case == "attention" and i == 1 else dtype
            step = 2 ** -23 * 64 if kept == torch.float32 else torch.finfo(dtype).eps
            close = step * (4 if "gradient" in case else 1)  # a gradient goes through a second product, whose operand is rounded
            if x.dtype != kept or x.shape != y.shape or x.numel() and ((x.double() - y).abs().max() > close * y.abs().max()):
                wrong.append(f"{case} {dtype} result {i}: {x.dtype} {tuple(x.shape)} {float((x.double() - y).abs().max())}")
if (torch.tensor([[2, 3]]) @ torch.tensor([[5], [7]])).item() != 31:
    wrong.append("integers")
if not half_products.install():
    wrong.append("install does not say that kernels are replaced")
print(json.dumps(wrong))
"""


def run(source: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False, timeout=300,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})


def test_sixteen_bits_are_fp32_rounded_once_and_the_rest_stays_as_it_was():
    done = run(SOURCE)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == []
    assert "Overriding" not in done.stderr


@pytest.mark.parametrize("supported", [True, False])
def test_kernels_are_replaced_where_onednn_has_none(supported):
    done = run(f"""
import torch
from megatron_ext.platform import half_products
half_products.slow_here = lambda: {not supported}
x = torch.randn(64, 64).bfloat16()
print(half_products.install(), half_products.install(), bool(torch.equal(x @ x, (x.float() @ x.float()).bfloat16())))
""")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[:2] == [str(not supported)] * 2
    assert supported or done.stdout.split()[2] == "True"
