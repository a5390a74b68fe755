"""AdamW: one update of all of a model's tensors, against a loop over tensors, torch's fused and foreach updates, Apex and Transformer Engine.

Shapes: a Llama's layers, `TENSORSxPARAMETERS`, and the same numbers as one flat tensor, which is what a rank of the distributed optimizer holds.
fp32: weights, gradients, moments; 28 bytes a parameter. bf16: fp32 main weights and moments beside bf16 weights and gradients; 28 bytes too.
`eager` is the loop over tensors, `fused` and `foreach` are torch.optim.AdamW's.
"""
from collections.abc import Callable, Iterator

import torch
from harness import Case, compiled, main, optional
from torch.optim.adamw import adamw

from kernels.adamw import adamw_, adamw_reference_

HYPER = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
STEP = 10


def model_shapes(hidden: int, layers: int) -> list[tuple[int, ...]]:
    wide = 11 * hidden // 4
    layer = [(3 * hidden, hidden), (hidden, hidden), (2 * wide, hidden), (hidden, wide), (hidden,), (hidden,)]
    return [(8 * hidden, hidden), (hidden,), *layer * layers]


def lists(tensors: tuple[torch.Tensor, ...], mixed: bool) -> list[list[torch.Tensor]]:
    """(weights, gradients, moments, squares[, bf16 weights]) of the inputs, which come in a row."""
    columns = 5 if mixed else 4
    count = len(tensors) // columns
    return [list(tensors[i * count:(i + 1) * count]) for i in range(columns)]


def ours(backend: str, mixed: bool) -> Callable:
    def run(*tensors):
        p, g, m, v, *low = lists(tensors, mixed)
        adamw_(p, g, m, v, step=STEP, model_params=low[0] if low else (), backend=backend, **HYPER)
        return p
    return run


def eager(mixed: bool) -> Callable:
    def run(*tensors):
        p, g, m, v, *low = lists(tensors, mixed)
        for row in zip(p, g, m, v, strict=True):
            adamw_reference_(row[0], row[1].to(row[0].dtype), *row[2:], step=STEP, **HYPER)
        for a, b in zip(low[0] if low else (), p, strict=False):
            a.copy_(b)
        return p
    return run


def torchs(mixed: bool, **which: bool) -> Callable:
    def run(*tensors):
        p, g, m, v, *low = lists(tensors, mixed)
        steps = [torch.full((), STEP - 1.0, device=p[0].device) for _ in p]  # they are counted on in place
        adamw(
            p, [x.float() for x in g] if mixed else g, m, v, [], steps, amsgrad=False, beta1=0.9, beta2=0.95, lr=HYPER["lr"],
            weight_decay=0.1, eps=1e-8, maximize=False, **which)
        if low:
            torch._foreach_copy_(low[0], p)
        return p
    return run


def library(mixed: bool) -> Callable:
    """Apex's and Transformer Engine's multi_tensor_adam, one interface. Neither takes main weights beside bf16 gradients in this form."""
    def build(module):
        def run(*tensors):
            p, g, m, v, *_ = lists(tensors, mixed)
            buffer = torch.zeros(1, dtype=torch.int, device=p[0].device)
            module.multi_tensor_adam(65536, buffer, [g, p, m, v], HYPER["lr"], 0.9, 0.95, 1e-8, STEP, 1, True, 0.1)
            return p
        return run
    return build


def cases(device: str) -> Iterator[Case]:
    sizes = ((256, 4), (1024, 1)) if device == "cpu" else ((2048, 8), (4096, 8), (8192, 2))
    for mixed in (False, True):
        for hidden, layers in sizes:
            model = model_shapes(hidden, layers)
            numbers = sum(torch.Size(shape).numel() for shape in model)
            for shapes in (model, [(numbers,)]):
                def make(generator, device, shapes=shapes, mixed=mixed):
                    def drawn(*size):
                        return torch.randn(*size, generator=generator, device=device)

                    p, g = [drawn(*s) for s in shapes], [drawn(*s) for s in shapes]
                    m, v = [0.1 * drawn(*s) for s in shapes], [0.1 * drawn(*s).square() for s in shapes]
                    return (*p, *g, *m, *v) if not mixed else (*p, *(x.bfloat16() for x in g), *m, *v, *(x.bfloat16() for x in p))

                yield Case(
                    op="adamw", shape=f"{len(shapes)}x{numbers}", dtype=torch.bfloat16 if mixed else torch.float32, make=make,
                    providers={
                        "ours": ours("auto", mixed), "ours-torch": ours("torch", mixed), "eager": eager(mixed), "compile": compiled(eager(mixed)),
                        "fused": torchs(mixed, fused=True), "foreach": torchs(mixed, foreach=True),
                        **({} if mixed else {"apex": optional("amp_C", library(mixed)), "te": optional("transformer_engine_torch", library(mixed))}),
                    },
                    reference=eager(mixed), bytes_forward=28 * numbers, differentiable=())


if __name__ == "__main__":
    main(cases)
