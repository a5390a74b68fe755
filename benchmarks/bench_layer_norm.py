"""LayerNorm of [rows, N], alone and with the residual add before it. Sizes: N from 2,048 to 16,384 at 8,192 rows on a GPU; a small model's on CPU."""
from collections.abc import Iterator

import torch
from harness import Case, compiled, main, optional

from kernels.layer_norm import layer_norm, layer_norm_reference

EPS = 1e-5


def added(function):
    return lambda x, weight, bias, residual: function(x, weight, bias, residual=residual)


def ours_torch(x, weight, bias, residual=None):
    return layer_norm(x, weight, bias, residual=residual, backend="torch")


def torch_function(x, weight, bias, residual=None):
    h = x if residual is None else x + residual
    y = torch.nn.functional.layer_norm(h, h.shape[-1:], weight, bias, EPS)
    return y if residual is None else (y, h)


def liger(module):
    return lambda x, weight, bias: module.LigerLayerNormFunction.apply(x, weight, bias, EPS)


def transformer_engine(width, dtype):
    def build(module):
        norm = module.LayerNorm(width, eps=EPS, params_dtype=dtype, device="cuda")
        return lambda x, weight, bias: torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,))

    return build


def cases(device: str) -> Iterator[Case]:
    rows, widths = (8192, (2048, 4096, 8192, 16384)) if device == "cuda" else (2048, (1024, 2048, 4096))
    for dtype in (torch.bfloat16, torch.float32):
        for width in widths:
            def make(generator, device, width=width, dtype=dtype, count=1):
                drawn = [torch.randn(rows, width, generator=generator, device=device).to(dtype) for _ in range(count)]
                weight, bias = (torch.randn(width, generator=generator, device=device).to(dtype) for _ in range(2))
                return (drawn[0], weight, bias, *drawn[1:])

            unit = rows * width * dtype.itemsize
            yield Case(
                op="layer_norm", shape=f"{rows}x{width}", dtype=dtype, make=make,
                providers={"ours": layer_norm, "ours-torch": ours_torch, "eager": torch_function, "compile": compiled(layer_norm_reference),
                           "liger": optional("liger_kernel.ops.layer_norm", liger),
                           "te": optional("transformer_engine.pytorch", transformer_engine(width, dtype))},
                reference=layer_norm_reference, bytes_forward=2 * unit, bytes_backward=3 * unit)
            yield Case(
                op="layer_norm_residual", shape=f"{rows}x{width}", dtype=dtype,
                make=lambda generator, device, make=make: make(generator, device, count=2),
                providers={"ours": added(layer_norm), "ours-torch": ours_torch, "eager": torch_function,
                           "compile": compiled(added(layer_norm_reference))},
                reference=added(layer_norm_reference), bytes_forward=4 * unit, bytes_backward=4 * unit)


if __name__ == "__main__":
    main(cases)
