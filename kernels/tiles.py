"""Tile and warp choices of every Triton kernel: plain Python, no autotuning at run time.

Each function maps a problem size to the compile-time constants of a launch and its `num_warps`. The hardware reasons are beside the numbers;
`kernels/static_check.py` compiles every entry for sm_80, sm_90 and sm_100 and refuses spills.
"""


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length() if n > 1 else 1


def row(width: int, widest: int, per_thread: int = 16) -> dict[str, int]:
    """One program holds a whole row of `width` in registers, `per_thread` elements a thread; ValueError over `widest`."""
    block = next_power_of_2(width)
    if block > widest:
        raise ValueError(f"width {width} is over {widest}, the widest row that one program holds without spilling")
    return {"BLOCK": block, "num_warps": min(max(block // (32 * per_thread), 1), 32)}


def elementwise(width: int) -> dict[str, int]:
    """A program walks a piece of one row: 1,024 elements with 4 warps are 8 a thread, one 16-byte load of bf16 each."""
    return {"BLOCK": min(next_power_of_2(width), 1024), "num_warps": 4 if width > 256 else 1}


def scan(length: int) -> dict[str, int]:
    """A program walks one rollout in chunks: two sizes, since lengths vary from batch to batch and every size is a compilation."""
    return {"BLOCK": 256, "num_warps": 1} if length <= 256 else {"BLOCK": 1024, "num_warps": 4}


def rope(dim: int, half: int) -> dict[str, int]:
    """A program turns ROWS heads, 2,048 channels with 4 warps: 8 pairs a thread are one 16-byte load of bf16 from each half. Rows are heads of any
    token, so that 8 key groups fill a tile as well as 96 heads do."""
    block = next_power_of_2(half)
    rest = dim - 2 * half
    return {"ROWS": max(1024 // block, 1), "HALF_BLOCK": block, "REST_BLOCK": next_power_of_2(rest) if rest else 0, "num_warps": 4}
