"""The weight gradient of a linear layer added to the main gradient: one call against a product and a sum, bf16 into fp32 and bf16, fp32 into fp32."""
from collections.abc import Iterator

import torch
from harness import Case, compiled, main, optional

from kernels.wgrad_accumulate import wgrad_accumulate_, wgrad_accumulate_reference


def ours(backend: str):
    def run(main_grad, dy, x):
        wgrad_accumulate_(main_grad, dy, x, backend=backend)
        return main_grad
    return run


def eager(main_grad, dy, x):
    return main_grad.add_(dy.t() @ x)


def apex(module):
    def run(main_grad, dy, x):
        (module.wgrad_gemm_accum_fp32 if main_grad.dtype == torch.float32 else module.wgrad_gemm_accum_fp16)(x, dy, main_grad)
        return main_grad
    return run


def cases(device: str) -> Iterator[Case]:
    sizes = ((2048, 1024, 1024), (2048, 2816, 1024)) if device == "cpu" else ((8192, 4096, 4096), (8192, 14336, 4096), (4096, 8192, 8192))
    for dtype, into in ((torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)):
        for tokens, out, width in sizes:
            def make(generator, device, tokens=tokens, out=out, width=width, dtype=dtype, into=into):
                shapes = (((out, width), into), ((tokens, out), dtype), ((tokens, width), dtype))
                return tuple(torch.randn(*shape, generator=generator, device=device).to(d) for shape, d in shapes)

            name = "bf16" if into == torch.bfloat16 else "fp32"
            yield Case(
                op="wgrad_accumulate", shape=f"{tokens}x{out}x{width}-into-{name}", dtype=dtype, make=make, differentiable=(), memory_bound=False,
                providers={"ours": ours("auto"), "ours-torch": ours("torch"), **({"ours-triton": ours("triton")} if device == "cuda" else {}),
                           "eager": eager, "compile": compiled(eager), "apex": optional("fused_weight_gradient_mlp_cuda", apex)},
                reference=wgrad_accumulate_reference, flops_forward=2 * tokens * out * width,
                bytes_forward=tokens * (out + width) * dtype.itemsize + 2 * out * width * into.itemsize)


if __name__ == "__main__":
    main(cases)
