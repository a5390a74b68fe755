"""The norm of all gradients, and scaling them: a model's tensors at once, against torch's own.

Providers: `eager` is a norm of each tensor and the norm of those (`torch.linalg.vector_norm`, to fp32), `foreach` is torch._foreach_norm, which
`torch.nn.utils.clip_grad_norm_` takes; Apex's multi_tensor_l2norm where it is found.
"""
from collections.abc import Iterator

import torch
from harness import Case, main, optional

from kernels.grad_norm import grad_norm, grad_norm_reference, scale_


def layer(hidden: int) -> list[tuple[int, ...]]:
    """A Llama layer's parameters."""
    wide = 11 * hidden // 4
    return [(3 * hidden, hidden), (hidden, hidden), (2 * wide, hidden), (hidden, wide), (hidden,), (hidden,)]


def apex_norm(amp):
    def run(*tensors):
        return amp.multi_tensor_l2norm(65536, torch.zeros(1, dtype=torch.int, device=tensors[0].device), [list(tensors)], False)[0][0]
    return run


def apex_scale(amp):
    def run(*tensors):
        amp.multi_tensor_scale(65536, torch.zeros(1, dtype=torch.int, device=tensors[0].device), [list(tensors), list(tensors)], 0.5)
        return tensors
    return run


def scaled(backend: str):
    def run(*tensors):
        scale_(tensors, 0.5, backend=backend)
        return tensors
    return run


def cases(device: str) -> Iterator[Case]:
    sizes = ((256, 4), (1024, 2)) if device == "cpu" else ((2048, 8), (4096, 8), (8192, 2))
    for dtype in (torch.float32, torch.bfloat16):
        for hidden, layers in sizes:
            shapes = layer(hidden) * layers
            unit = sum(torch.Size(shape).numel() for shape in shapes) * dtype.itemsize

            def make(generator, device, shapes=shapes, dtype=dtype):
                return tuple(torch.randn(*shape, generator=generator, device=device).to(dtype) for shape in shapes)

            yield Case(
                op="grad_norm", shape=f"{len(shapes)}x{unit // dtype.itemsize}", dtype=dtype, make=make, differentiable=(), bytes_forward=unit,
                providers={"ours": lambda *x: grad_norm(x), "ours-torch": lambda *x: grad_norm(x, backend="torch"),
                           "eager": lambda *x: grad_norm_reference(x),
                           "foreach": lambda *x: torch.linalg.vector_norm(torch.stack(torch._foreach_norm(x, dtype=torch.float32))), "apex": optional("amp_C", apex_norm)},
                reference=lambda *x: grad_norm_reference(x))
            yield Case(
                op="scale", shape=f"{len(shapes)}x{unit // dtype.itemsize}", dtype=dtype, make=make, differentiable=(), bytes_forward=2 * unit,
                providers={"ours": scaled("auto"), "ours-torch": scaled("torch"), "eager": lambda *x: [t.mul_(0.5) for t in x],
                           "foreach": lambda *x: torch._foreach_mul_(x, 0.5), "apex": optional("amp_C", apex_scale)})


if __name__ == "__main__":
    main(cases)
