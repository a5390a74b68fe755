"""RMSNorm of [rows, N], alone and with the residual add before it. Sizes: N from 2,048 to 16,384 at 8,192 rows on a GPU; a small model's on CPU."""
from collections.abc import Iterator

import torch
from harness import Case, compiled, main, optional

from kernels.rms_norm import rms_norm, rms_norm_reference

EPS = 1e-5


def added(function):
    return lambda x, weight, residual: function(x, weight, residual=residual)


def ours_torch(x, weight, residual=None):
    return rms_norm(x, weight, residual=residual, backend="torch")


def torch_function(x, weight, residual=None):
    h = x if residual is None else x + residual
    y = torch.nn.functional.rms_norm(h, h.shape[-1:], weight, EPS)
    return y if residual is None else (y, h)


def liger(module):  # in_place would overwrite dy, and backward is timed on one graph many times
    return lambda x, weight: module.LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "gemma", False)


def liger_added(module):
    return lambda x, weight, residual: module.LigerFusedAddRMSNormFunction.apply(x, residual, weight, EPS, 0.0, "gemma", False)


def quack(module):
    return lambda x, weight: module.rmsnorm(x, weight, eps=EPS)


def quack_added(module):
    return lambda x, weight, residual: module.rmsnorm(x, weight, residual=residual, eps=EPS, prenorm=True)


def transformer_engine(width, dtype):
    def build(module):
        norm = module.RMSNorm(width, eps=EPS, params_dtype=dtype, device="cuda")
        return lambda x, weight: torch.func.functional_call(norm, {"weight": weight}, (x,))

    return build


def cases(device: str) -> Iterator[Case]:
    rows, widths = (8192, (2048, 4096, 8192, 16384)) if device == "cuda" else (2048, (1024, 2048, 4096))
    for dtype in (torch.bfloat16, torch.float32):
        for width in widths:
            def make(generator, device, width=width, dtype=dtype, count=1):
                drawn = [torch.randn(rows, width, generator=generator, device=device).to(dtype) for _ in range(count)]
                weight = torch.randn(width, generator=generator, device=device).to(dtype)
                return (drawn[0], weight, *drawn[1:])

            unit = rows * width * dtype.itemsize
            yield Case(
                op="rms_norm", shape=f"{rows}x{width}", dtype=dtype, make=make,
                providers={"ours": rms_norm, "ours-torch": ours_torch, "eager": torch_function, "compile": compiled(rms_norm_reference),
                           "liger": optional("liger_kernel.ops.rms_norm", liger), "quack": optional("quack.rmsnorm", quack),
                           "te": optional("transformer_engine.pytorch", transformer_engine(width, dtype))},
                reference=rms_norm_reference, bytes_forward=2 * unit, bytes_backward=3 * unit)
            yield Case(
                op="rms_norm_residual", shape=f"{rows}x{width}", dtype=dtype,
                make=lambda generator, device, make=make: make(generator, device, count=2),
                providers={"ours": added(rms_norm), "ours-torch": ours_torch, "eager": torch_function, "compile": compiled(added(rms_norm_reference)),
                           "liger": optional("liger_kernel.ops.fused_add_rms_norm", liger_added), "quack": optional("quack.rmsnorm", quack_added)},
                reference=added(rms_norm_reference), bytes_forward=4 * unit, bytes_backward=4 * unit)


if __name__ == "__main__":
    main(cases)
