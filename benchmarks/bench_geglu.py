"""GeGLU: y = gelu(a) b, and its backward, from [rows, 2 N], exact and by tanh. Sizes: N from 2,048 to 16,384 at 8,192 rows on a GPU; a small
model's on CPU. Liger has the tanh approximation alone."""
from collections.abc import Iterator
from functools import partial

import torch
from harness import Case, compiled, main, optional

from kernels.geglu import geglu, geglu_reference


def liger(module):
    return lambda x: module.LigerGELUMulFunction.apply(*(half.contiguous() for half in x.chunk(2, dim=-1)))


def cases(device: str) -> Iterator[Case]:
    rows, widths = (8192, (2048, 4096, 8192, 16384)) if device == "cuda" else (2048, (1024, 2816, 4096))
    for dtype in (torch.bfloat16, torch.float32):
        for approximate in ("none", "tanh"):
            ours, reference = partial(geglu, approximate=approximate), partial(geglu_reference, approximate=approximate)
            only_tanh = {"liger": optional("liger_kernel.ops.geglu", liger)} if approximate == "tanh" else {}
            for width in widths:
                unit = rows * width * dtype.itemsize
                yield Case(
                    op="geglu" if approximate == "none" else "geglu_tanh", shape=f"{rows}x{width}", dtype=dtype,
                    make=lambda generator, device, width=width, dtype=dtype: (
                        torch.randn(rows, 2 * width, generator=generator, device=device).to(dtype),),
                    providers={"ours": ours, "ours-torch": partial(ours, backend="torch"), "eager": reference, "compile": compiled(reference),
                               **only_tanh},
                    reference=reference, bytes_forward=3 * unit, bytes_backward=5 * unit)


if __name__ == "__main__":
    main(cases)
