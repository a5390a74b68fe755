"""y = gelu(x + b), and its backward with the bias's gradient, from [rows, N], exact and by tanh. Sizes: N from 2,048 to 16,384 at 8,192 rows on a
GPU; a small model's on CPU."""
from collections.abc import Iterator
from functools import partial

import torch
from harness import Case, compiled, main

from kernels.bias_gelu import bias_gelu, bias_gelu_reference


def cases(device: str) -> Iterator[Case]:
    rows, widths = (8192, (2048, 4096, 8192, 16384)) if device == "cuda" else (2048, (1024, 2816, 4096))
    for dtype in (torch.bfloat16, torch.float32):
        for approximate in ("none", "tanh"):
            ours, reference = partial(bias_gelu, approximate=approximate), partial(bias_gelu_reference, approximate=approximate)
            for width in widths:
                unit = rows * width * dtype.itemsize
                yield Case(
                    op="bias_gelu" if approximate == "none" else "bias_gelu_tanh", shape=f"{rows}x{width}", dtype=dtype,
                    make=lambda generator, device, width=width, dtype=dtype: (
                        torch.randn(rows, width, generator=generator, device=device).to(dtype),
                        torch.randn(width, generator=generator, device=device).to(dtype)),
                    providers={"ours": ours, "ours-torch": partial(ours, backend="torch"), "eager": reference, "compile": compiled(reference)},
                    reference=reference, bytes_forward=2 * unit, bytes_backward=3 * unit)


if __name__ == "__main__":
    main(cases)
