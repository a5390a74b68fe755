"""How far results are from fp64, beside how far PyTorch's same-dtype expression is: the rule of the tests (`tests/kernel_truth.py`), as a number."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NARROW = (torch.float32, torch.bfloat16, torch.float16)


def outputs_of(result: object) -> list[Tensor]:
    """The floating tensors that a function returned, in order."""
    results = result if isinstance(result, tuple | list) else (result,)
    return [r for r in results if isinstance(r, Tensor) and r.is_floating_point()]


def leaves(inputs: Sequence[object], differentiable: Sequence[int] | None) -> list[object]:
    """The inputs, with requires_grad set on those at `differentiable` (None: all fp32, bf16, fp16 and fp64 tensors)."""
    found = []
    for i, x in enumerate(inputs):
        if isinstance(x, Tensor):
            wanted = x.dtype in (*NARROW, torch.float64) and (differentiable is None or i in differentiable)
            x = x.detach().requires_grad_(wanted)
        found.append(x)
    return found


def wanted_of(inputs: Sequence[object]) -> list[Tensor]:
    return [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]


def douts_for(outputs: Sequence[Tensor], seed: int = 7) -> list[Tensor]:
    """Normal gradients of the outputs that have one: the same for every function with outputs of these shapes."""
    if not outputs:
        return []
    generator = torch.Generator(outputs[0].device).manual_seed(seed)
    return [torch.randn(o.shape, generator=generator, device=o.device, dtype=torch.float32).to(o.dtype) for o in outputs if o.requires_grad]


@dataclass(frozen=True)
class Results:
    """What a function gave: outputs, gradients of its differentiable inputs (none where no output has one), and the gradients that entered."""

    outputs: list[Tensor]
    grads: list[Tensor | None]
    douts: list[Tensor]


@dataclass(frozen=True)
class Truth:
    """A reference in fp64 and in the inputs' own dtype."""

    exact: Results
    plain: Results


def results(function: Callable, inputs: Sequence[object], differentiable: Sequence[int] | None, douts: Sequence[Tensor] | None = None) -> Results:
    """Runs forward and, where there is one, backward."""
    inputs = leaves(inputs, differentiable)
    outputs = outputs_of(function(*inputs))
    graded, wanted = [o for o in outputs if o.requires_grad], wanted_of(inputs)
    douts = douts_for(graded) if douts is None else list(douts)
    graded = graded[: len(douts)]
    found = [o.detach() for o in outputs]
    if not graded or not wanted or any(d.shape != o.shape for d, o in zip(douts, graded)):  # another function's: nothing to compare
        return Results(found, [], douts)
    entering = [d.to(o.dtype, copy=True) for d, o in zip(douts, graded)]  # some kernels write into what enters
    return Results(found, list(torch.autograd.grad(graded, wanted, entering, allow_unused=True)), douts)


def truth(reference: Callable, inputs: Callable[[], Sequence[object]], differentiable: Sequence[int] | None) -> Truth:
    """Runs `reference` in the inputs' own dtype and in fp64, with the same gradients entering. `inputs` makes the same inputs at each call."""
    plain = results(reference, inputs(), differentiable)
    wide = [x.double() if isinstance(x, Tensor) and x.dtype in NARROW else x for x in inputs()]
    return Truth(results(reference, wide, differentiable, plain.douts), plain)


def worst(found: Sequence[Tensor | None], exact: Sequence[Tensor | None], plain: Sequence[Tensor | None]) -> tuple[float, float, float] | None:
    """(error, PyTorch's error, ratio) of the worst tensor; None where there is nothing to compare.

    Errors are max |x - exact| / max |exact|. The ratio is error / PyTorch's error, where PyTorch counts for at least half a unit in the
    last place of the largest value: at most 2 is what the tests demand.
    """
    judged = []
    for f, e, p in zip(found, exact, plain):
        if f is None or e is None or p is None or not e.numel() or f.shape != e.shape:
            continue
        size = e.abs().max().item()
        mine, theirs = (f.double() - e).abs().max().item(), (p.double() - e).abs().max().item()
        floor = max(theirs, torch.finfo(p.dtype).eps * size / 2)
        scale = size or 1.0
        judged.append((mine / scale, theirs / scale, mine / floor if floor else (0.0 if mine == 0 else float("inf"))))
    return max(judged, key=lambda row: (row[2] != row[2], row[2])) if judged else None
