"""kernels/geglu.py against fp64, on CPU through Triton's interpreter and in torch; on a GPU where there is one."""
import pytest
import torch
from gated_truth import Gated
from kernel_truth import DEVICE, each_backend

from kernels.geglu import geglu, geglu_reference


class TestGeglu(Gated):
    name, kind = "geglu", "gelu"

    @staticmethod
    def op(x, backend="auto"):
        return geglu(x, backend=backend)

    @staticmethod
    def reference(x):
        return geglu_reference(x)


class TestGegluTanh(Gated):
    name, kind = "geglu", "gelu_tanh"

    @staticmethod
    def op(x, backend="auto"):
        return geglu(x, approximate="tanh", backend=backend)

    @staticmethod
    def reference(x):
        return geglu_reference(x, approximate="tanh")


def test_another_approximation_is_refused():
    with pytest.raises(ValueError, match="geglu: approximate is 'sigmoid'"):
        geglu(torch.randn(2, 4), approximate="sigmoid")


@each_backend
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("approximate", ("none", "tanh"))
def test_every_gate_from_minus_12_to_12(approximate, dtype, backend):
    """All of gelu's range, each point on its own scale: within an ulp of the dtype, or of fp32's 1 + erf where that cancels. bf16 and fp16 take another
    formula than fp32."""
    a = torch.linspace(-12, 12, 8001, device=DEVICE).to(dtype)
    x = torch.cat((a, torch.ones_like(a))).unsqueeze(0).requires_grad_()
    y = geglu(x, approximate=approximate, backend=backend)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    wide = x.detach().double().requires_grad_()
    exact = geglu_reference(wide, approximate)
    (dexact,) = torch.autograd.grad(exact, wide, torch.ones_like(exact))
    for found, expected in ((y, exact), (dx[:, :8001], dexact[:, :8001])):
        torch.testing.assert_close(found.double(), expected.detach(), rtol=torch.finfo(dtype).eps, atol=1.5e-6)
