"""SwiGLU: y = silu(a) b, and its backward, from [rows, 2 N]. Sizes: N from 2,048 to 16,384 at 8,192 rows on a GPU; a small model's on CPU."""
from collections.abc import Iterator

import torch
from harness import Case, compiled, main, optional

from kernels.swiglu import swiglu, swiglu_reference


def liger(module):
    return lambda x: module.LigerSiLUMulFunction.apply(*(half.contiguous() for half in x.chunk(2, dim=-1)))


def cases(device: str) -> Iterator[Case]:
    rows, widths = (8192, (2048, 4096, 8192, 16384)) if device == "cuda" else (2048, (1024, 2816, 4096))
    for dtype in (torch.bfloat16, torch.float32):
        for width in widths:
            unit = rows * width * dtype.itemsize
            yield Case(
                op="swiglu", shape=f"{rows}x{width}", dtype=dtype,
                make=lambda generator, device, width=width, dtype=dtype: (
                    torch.randn(rows, 2 * width, generator=generator, device=device).to(dtype),),
                providers={"ours": swiglu, "ours-torch": lambda x: swiglu(x, backend="torch"), "eager": swiglu_reference,
                           "compile": compiled(swiglu_reference), "liger": optional("liger_kernel.ops.swiglu", liger)},
                reference=swiglu_reference, bytes_forward=3 * unit, bytes_backward=5 * unit)


if __name__ == "__main__":
    main(cases)
