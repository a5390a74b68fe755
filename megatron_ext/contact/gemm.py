"""How fast a device multiplies matrices, and whether it multiplies right.

Speed: 2 n^3 operations a product, the median over short turns of back-to-back products, after a warm-up that lets clocks settle.

Right: the matrices hold -1, 0 and 1, with at most 256 non-zero products a sum, so that every partial sum is a whole number that even bf16
holds exactly, in whatever order it is added. The sums of rows and columns of C = A B must then be exactly A (B 1) and (1 A) B, which the CPU
computes in fp64: a check of n^3 work by n^2 work (Huang and Abraham 1984). One wrong element shows in its row and its column.
"""
import time
from collections.abc import Callable

import torch

LARGEST = 256  # bf16 has 8 bits of mantissa: whole numbers up to 256 are exact
TURNS = 9


def matrices(n: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B, [n, n]. Any device makes the same."""
    row, column = torch.arange(n)[:, None], torch.arange(n)[None]
    stride = -(-n // LARGEST)
    a = ((7 * row + 3 * column + row * column) % 3 - 1) * ((row + column) % stride == 0)
    b = (5 * row + 11 * column + row * column // 7) % 3 - 1
    return a.to(dtype).to(device), b.to(dtype).to(device)


def wrong_sums(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> int:
    """Rows and columns of `c` whose sums are not those of a b; 0 = right."""
    a, b, c = (x.detach().cpu().double() for x in (a, b, c))
    return int((c.sum(1) != a @ b.sum(1)).sum() + (c.sum(0) != a.sum(0) @ b).sum())


def measure(device: torch.device, *, n: int | None = None, seconds: float | None = None, during: Callable[[], None] | None = None) -> dict:
    """`tflops` (10^12 operations a second), `wrong` (rows and columns with wrong sums), `n`, `dtype`.

    Args:
        n: size; None = 8192 on a GPU, 512 on a CPU. bf16 on a GPU, fp32 on a CPU.
        seconds: about how long; None = 3 on a GPU, 0.3 on a CPU.
        during: called once while the device is at work (on a GPU: before the products that were started are done).
    """
    gpu = device.type == "cuda"
    n, seconds = n or (8192 if gpu else 512), seconds or (3.0 if gpu else 0.3)
    dtype = torch.bfloat16 if gpu else torch.float32
    a, b = matrices(n, device, dtype)
    c = torch.empty(n, n, dtype=dtype, device=device)

    def turn(repeats: int, watched: Callable[[], None] | None = None) -> float:
        _synchronize(device)
        began = time.perf_counter()
        for _ in range(repeats):
            torch.mm(a, b, out=c)
        if watched is not None:
            watched()
        _synchronize(device)
        return (time.perf_counter() - began) / repeats

    with torch.no_grad():
        turn(1)
        wrong = wrong_sums(a, b, c)
        repeats = max(1, int(seconds / (TURNS + 1) / max(turn(2), 1e-6)))
        turn(repeats, during)
        times = sorted(turn(repeats) for _ in range(TURNS))
        wrong += wrong_sums(a, b, c)
    return {"tflops": 2 * n**3 / times[TURNS // 2] / 1e12, "wrong": wrong, "n": n, "dtype": str(dtype).removeprefix("torch.")}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
