"""What the tests of all ops share: sizes, dtypes, backends, and the rule that judges them.

The rule (flash-attention's): against an fp64 reference, an op's error is at most twice that of the same-dtype PyTorch expression. Where that
expression is exact by luck, one unit in the last place of the largest value is allowed instead of nothing.

On CPU the Triton kernels run in the interpreter (conftest sets TRITON_INTERPRET); with a GPU the same tests run the compiled kernels on it.
"""
import os
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from kernels import jit

DEVICE = "cuda" if torch.cuda.is_available() and not jit.interpreted() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 2, 3, 127, 128, 129, 1021, 4097)
if os.environ.get("KERNEL_GRID") == "full":  # `make campaign`: hidden sizes of models, and what lies beside powers of two
    SIZES += (255, 257, 2048, 2999, 5120, 8192)
BACKENDS = ("triton", "torch")

each_backend = pytest.mark.parametrize("backend", [
    pytest.param("triton", marks=pytest.mark.skipif(jit.MISSING is not None, reason=str(jit.MISSING))), "torch"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def draw(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    """Normal values on DEVICE, the same on every machine."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE, dtype)


def run(function: Callable, inputs: Sequence[Tensor], douts: Sequence[Tensor] | None) -> list[Tensor]:
    """Outputs of `function(*inputs)` followed by the gradients of its floating inputs, for the incoming gradients `douts` (one an output)."""
    inputs = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    outputs = function(*inputs)
    outputs = list(outputs) if isinstance(outputs, tuple | list) else [outputs]
    if douts is None:
        return [o.detach() for o in outputs]
    wanted = [x for x in inputs if x.is_floating_point()]
    grads = torch.autograd.grad(outputs, wanted, [d.to(o.dtype) for d, o in zip(douts, outputs, strict=True)])
    return [o.detach() for o in outputs] + list(grads)


def judge(ours: Callable, reference: Callable, inputs: Sequence[Tensor], douts: Sequence[Tensor] | None, *, names: Sequence[str] | None = None) -> None:
    """AssertionError where an output or gradient of `ours` is further from fp64 than the rule allows.

    Args:
        ours, reference: functions of the inputs, returning a tensor or a tuple; the reference is run in fp64 and in the inputs' own dtype.
        inputs: tensors of one dtype; integer tensors go through as they are.
        douts: gradients of the outputs, or None to compare the outputs alone.
    """
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    exact = run(reference, wide, douts)
    plain = run(reference, inputs, douts)
    found = run(ours, inputs, douts)
    assert len(found) == len(exact)
    names = names or [f"result {i}" for i in range(len(exact))]
    for name, e, p, o in zip(names, exact, plain, found, strict=True):
        assert o.shape == e.shape and o.dtype == p.dtype, f"{name}: {tuple(o.shape)} {o.dtype}, expected {tuple(e.shape)} {p.dtype}"
        if not e.numel():
            continue
        error, theirs = (o.double() - e).abs().max().item(), (p.double() - e).abs().max().item()
        allowed = max(2 * theirs, torch.finfo(o.dtype).eps * e.abs().max().item())
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e} (PyTorch's own is {theirs:.3e})"


def same_bits(function: Callable, inputs: Sequence[Tensor], douts: Sequence[Tensor] | None) -> None:
    """AssertionError unless two runs give the same bits."""
    for first, second in zip(run(function, inputs, douts), run(function, inputs, douts), strict=True):
        assert torch.equal(first, second)
