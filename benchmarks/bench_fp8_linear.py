"""The FP8 linear layer, quantisation included, against torch's in the same dtype: y = x w^T, and both gradients.

On a GPU: 4,096 tokens to 8,192 x 8,192. On a CPU FP8 has no speed; the cases are there to see that it works.

    python benchmarks/bench_fp8_linear.py [--quick] [--output DIR]
"""
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from harness import Case, compiled, main, optional

from kernels.fp8_linear import fp8_linear, fp8_linear_reference
from kernels.fp8_scaling import Fp8Recipe


def ours(recipe: Fp8Recipe) -> Callable:
    scales = None

    def call(x, w):
        nonlocal scales
        if recipe.kind == "delayed" and scales is None:
            scales = torch.tensor([80.0, 3000.0, 1e4], device=x.device)
        return fp8_linear(x, w, recipe=recipe, scales=scales)

    return call


def transformer_engine(module) -> Callable:
    """Its functional linear layer has no public name: a module without a weight of its own is given each case's."""
    from transformer_engine.common.recipe import Float8CurrentScaling

    layers = {}

    def call(x, w):
        if w.shape not in layers:
            layer = layers[w.shape] = module.Linear(w.shape[1], w.shape[0], bias=False, params_dtype=w.dtype)
            del layer._parameters["weight"]
        layers[w.shape].weight = w
        with module.fp8_autocast(enabled=True, fp8_recipe=Float8CurrentScaling()):
            return layers[w.shape](x)

    return call


def cases(device: str) -> Iterator[Case]:
    on_gpu = (4096, 4096, 4096), (4096, 8192, 8192), (8192, 8192, 8192), (8192, 4096, 14336)
    shapes = on_gpu if device == "cuda" else ((512, 1024, 1024), (2048, 1024, 2816))
    for m, k, n in shapes:
        yield Case(
            op="fp8_linear", shape=f"{m}x{k}x{n}", dtype=torch.bfloat16,
            make=lambda generator, device, m=m, k=k, n=n: (
                torch.randn(m, k, generator=generator, device=device).bfloat16(),
                (torch.randn(n, k, generator=generator, device=device) / k**0.5).bfloat16()),
            providers={
                "ours": ours(Fp8Recipe()), "ours-delayed": ours(Fp8Recipe("delayed")), "ours-blockwise": ours(Fp8Recipe("blockwise")),
                "compile": compiled(ours(Fp8Recipe())), "eager": F.linear,
                "te": optional("transformer_engine.pytorch", transformer_engine)},
            reference=fp8_linear_reference, flops_forward=2 * m * k * n, flops_backward=4 * m * k * n, memory_bound=False)


if __name__ == "__main__":
    main(cases)
