"""FP8 quantisation (e4m3) with and without the transpose, in each scaling, against the PyTorch expression that it replaces.

    python benchmarks/bench_fp8.py [--quick] [--output DIR]
"""
from collections.abc import Callable, Iterator

import torch
from harness import Case, compiled, main
from torch import Tensor

from kernels.fp8 import quantise

LARGEST = 448.0


def eager(scaling: str, transpose: bool) -> Callable:
    """The unfused expression; like ours it turns infinity into NaN."""
    def cast(x: Tensor, scale: Tensor) -> Tensor:
        x = x.float()
        return torch.where(x.isfinite(), (x * scale).clamp(-LARGEST, LARGEST), torch.nan).to(torch.float8_e4m3fn)

    def scale_of(amax: Tensor) -> Tensor:
        return torch.where(amax > 0, LARGEST / amax, 1.0)

    def turned(data: Tensor) -> Tensor:
        return data.view(torch.uint8).t().contiguous()

    def current(x: Tensor, scale: Tensor):
        scale = scale_of(x.abs().amax().float())
        data = cast(x, scale)
        return (data.view(torch.uint8), scale.reciprocal(), *((turned(data),) if transpose else ()))

    def delayed(x: Tensor, scale: Tensor):
        data = cast(x, scale)
        return (data.view(torch.uint8), scale.reciprocal(), x.abs().amax().float(), *((turned(data),) if transpose else ()))

    def rows(x: Tensor):
        blocks = x.unflatten(1, (-1, 128))
        scale = scale_of(blocks.abs().amax(-1, keepdim=True).float())
        return cast(blocks, scale).view(x.shape).view(torch.uint8), scale.squeeze(-1).reciprocal()

    def blocks_1(x: Tensor, scale: Tensor):
        return (*rows(x), *(rows(x.t().contiguous()) if transpose else ()))

    def blocks_2(x: Tensor, scale: Tensor):
        blocks = x.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
        scale = scale_of(blocks.abs().amax((1, 3), keepdim=True).float())
        data = cast(blocks, scale).view(x.shape)
        return (data.view(torch.uint8), scale[:, 0, :, 0].reciprocal(), *((turned(data),) if transpose else ()))

    return {"current": current, "delayed": delayed, "1x128": blocks_1, "128x128": blocks_2}[scaling]


def ours(scaling: str, transpose: bool, backend: str) -> Callable:
    def call(x: Tensor, scale: Tensor):
        found = quantise(x, scaling=scaling if "x" in scaling else "tensor", scale=scale if scaling == "delayed" else None,
                         transpose=transpose, backend=backend)
        return tuple(part.view(torch.uint8) if part.dtype == torch.float8_e4m3fn else part for part in found if part is not None)

    return call


def cases(device: str) -> Iterator[Case]:
    rows, widths = (8192, (2048, 4096, 8192, 16384)) if device == "cuda" else (2048, (1024, 4096))
    for dtype in (torch.bfloat16, torch.float32):
        for width in widths:
            for scaling in ("current", "delayed", "1x128", "128x128"):
                for transpose in (False, True):
                    read = 2 if scaling == "current" else 1
                    yield Case(
                        op=f"fp8_{scaling}{'_transposed' if transpose else ''}", shape=f"{rows}x{width}", dtype=dtype,
                        make=lambda generator, device, width=width, dtype=dtype: (
                            torch.randn(rows, width, generator=generator, device=device).to(dtype), torch.full((1,), 80.0, device=device)),
                        providers={"ours": ours(scaling, transpose, "auto"), "ours-torch": ours(scaling, transpose, "torch"),
                                   "eager": eager(scaling, transpose), "compile": compiled(eager(scaling, transpose))},
                        bytes_forward=rows * width * (read * dtype.itemsize + (2 if transpose else 1)), differentiable=())


if __name__ == "__main__":
    main(cases)
