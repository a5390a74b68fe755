"""Tile and warp choices of every Triton kernel: plain Python, no autotuning at run time.

Each function maps a problem size to the compile-time constants of a launch and its `num_warps`. The hardware reasons are beside the numbers;
`kernels/static_check.py` compiles every entry for sm_80, sm_90 and sm_100 and refuses spills.
"""
from collections.abc import Iterator


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


ACTIVATION_WIDTHS = (256, 512, 1024, 4096)  # one for each entry that `activation` has at 256 and above


def activation(width: int) -> dict[str, int]:
    """A program walks a piece of one row: 2,048 elements with 4 warps are 16 a thread, two 16-byte loads of bf16 each, so that the programs of a
    multiprocessor keep 64 kB and more in flight; 1,024 where the last piece of 2,048 would be more than an eighth idle. Narrow rows take fewer warps,
    so that the loads stay 16 bytes wide."""
    block = min(next_power_of_2(width), 2048)
    if -width % block > block // 8:
        block = min(block, 1024)
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 4)}


def column_sums(rows: int, width: int) -> dict[str, int]:
    """An elementwise backward that also sums over rows: a warp reads 256 columns, 16 bytes a thread in bf16, and 4 warps walk GROUP rows, 8 at a time.
    The larger GROUP keeps the partial sums at 1 % of the traffic where there are programs enough for all multiprocessors; where not, programs come first.
    The groups lie on the grid's second axis, which ends at 65,535: more rows than that many groups hold make the groups larger."""
    group = max(128 if rows * width >= 2**24 else 32, next_power_of_2(-(-rows // 65_535)))
    return {"GROUP": group, "ROWS": 8, "BLOCK": 256, "num_warps": 4}


def pieces_in_cache(x, elements: int = 2**18) -> Iterator[slice]:
    """Slices of the first dimension of tensor `x` for a torch path of several fp32 passes: on CPU of 1 MiB of fp32, which stays in a core's cache
    between the passes; all of it elsewhere."""
    step = max(elements * x.shape[0] // max(x.numel(), 1), 1) if x.device.type == "cpu" else max(x.shape[0], 1)
    return (slice(begin, begin + step) for begin in range(0, x.shape[0], step))


def rope(dim: int, half: int) -> dict[str, int]:
    """A program turns ROWS heads, 2,048 channels with 4 warps: 8 pairs a thread are one 16-byte load of bf16 from each half. Rows are heads of any
    token, so that 8 key groups fill a tile as well as 96 heads do."""
    block = next_power_of_2(half)
    rest = dim - 2 * half
    return {"ROWS": max(1024 // block, 1), "HALF_BLOCK": block, "REST_BLOCK": next_power_of_2(rest) if rest else 0, "num_warps": 4}


def head(tokens: int, words: int, device: str, whole_rows: bool) -> tuple[int, int]:
    """(tokens, words) of the logits that `linear_cross_entropy` holds at a time.

    With `whole_rows` every word of that many tokens is held, computed `words` at a time. On a CPU a block of 1 to 4 MB stays in the cache between the
    product that writes it and the two that read it, and products of 1,024 columns run faster than wide ones. On a GPU the products that accumulate
    in fp32 read and write 8 bytes a sum: 1,024 words or tokens are 768 operations a byte, three times what an H100's memory asks for; 2^22 logits
    are 16 MiB, and stay in its L2.
    """
    if device == "cpu":
        return min(tokens, min(max(2**20 // max(words, 1), 512), 1024) if whole_rows else 1024), min(words, 1024)
    if whole_rows:
        return min(tokens, 1024), min(words, 4096)
    held = min(max(tokens, 1), 4096)
    return held, min(words, max(2**22 // next_power_of_2(held), 1024), 4096)


def head_rows(width: int) -> dict[str, int]:
    """A warp takes a row of a tile of logits, 512 columns at a time: its sums are shuffles, and no warp waits for another. 16 fp32 a thread."""
    return {"ROWS": 8, "BLOCK": 512 if width > 128 else 128, "num_warps": 8}


def fp8_tile() -> dict[str, int]:
    """A program casts 32 rows of 128: 128 bf16 are sixteen 16-byte loads, and 32 rows of the transpose are 32 bytes, a memory sector. With 8 warps a
    thread holds 16 elements."""
    return {"ROWS": 32, "COLS": 128, "num_warps": 8}


def fp8_block() -> dict[str, int]:
    """A program holds the 128 x 128 elements that share a scale: 32 a thread with 16 warps; 64 spill where both orientations are written."""
    return {"SIDE": 128, "num_warps": 16}


def fp8_finish() -> dict[str, int]:
    """One program reduces the maxima of all tiles: 16,384 of them for 8,192 x 8,192, in four rounds."""
    return {"SIZE": 4096, "num_warps": 8}


NORM_WIDEST = 65536  # 108 fp32 shares of dweight of this width are 28 MB, and still lie in the 40 to 50 MB of L2 of an A100 or H100


def norm_forward(width: int) -> dict[str, int]:
    """rms_norm and layer_norm: 16 elements a thread, several narrow rows or one row a program. 16,384 columns take 32 elements a thread (with
    32 warps fp32 spills); at 32,768 most dtypes spill, so wider rows are looped over."""
    if width > NORM_WIDEST:
        raise ValueError(f"the last dimension of x is {width}, over {NORM_WIDEST}, the widest row of the Triton kernel; backend='torch' has no limit")
    block = next_power_of_2(width)
    if block > 16384:
        return {"BLOCK": 8192, "num_warps": 16}
    rows = min(max(2048 // block, 1), 32)
    return {"BLOCK": block, "ROWS": rows, "num_warps": min(max(rows * block // 512, 1), 16)}


def norm_backward(width: int, *, centered: bool, itemsize: int) -> dict[str, int]:
    """The backward of rms_norm and layer_norm (`centered`: with a mean, so with dbias) on rows of `itemsize` bytes an element.

    `programs` is 108 (the SMs of an A100, the fewest of A100, H100 and B200) times the programs that fit on an SM: one wave everywhere, and
    equal bits everywhere, because nothing depends on the GPU. Bound by memory, 108 programs with 32 KB in flight each use an H100's bandwidth;
    one program more than an A100 holds would cost it a second wave. Their fp32 shares of dweight add 2 to 5 % to the traffic of 8,192 rows.

    To 8,192 columns (4,096 of fp32 with a mean) a program holds rows whole, the next ones on their way (STAGES). To 16,384 (32,768 without
    a mean) it holds only its share of dweight and dbias, 32 to 64 of 128 registers, and reads a row in parts, twice; FIRST is the piece of the
    first read, 32 KB of h and dy in flight. Wider rows are looped over with the share of dweight in memory.
    """
    if width > NORM_WIDEST:
        raise ValueError(f"the last dimension of x is {width}, over {NORM_WIDEST}, the widest row of the Triton kernel; backend='torch' has no limit")
    block, heavy = next_power_of_2(width), centered and itemsize == 4
    if block <= (4096 if heavy else 8192):
        rows = min(max(2048 // block, 1), 32)
        elements = 8 if heavy and block == 4096 else 16  # with 16, dweight and dbias beside fp32 rows spill
        resident = 3 if block <= 2048 else 2 if block <= 4096 and elements == 16 else 1
        return {"BLOCK": block, "ROWS": rows, "STAGES": 2, "num_warps": max(rows * block // 32 // elements, 1), "programs": 108 * resident}
    if block <= (16384 if centered else 32768):
        return {"BLOCK": 4096, "PARTS": block // 4096, "FIRST": 4096 if itemsize == 4 else 8192, "num_warps": 16, "programs": 108}
    return {"BLOCK": 4096, "num_warps": 16, "programs": 108}


def norm_add_up(width: int) -> dict[str, int]:
    """Adds up the programs' shares of dweight: 64 or 128 columns are 256 or 512 contiguous bytes a row, 32 rows in flight, and 64 programs or more at
    the widths where it matters."""
    return {"BLOCK": 64 if width <= 4096 else 128, "ROWS": 32, "num_warps": 4 if width <= 4096 else 8}


def wgrad(itemsize: int) -> dict[str, int]:
    """A GEMM's tiles: 128 x 128 fp32 sums with 8 warps are 64 registers a thread, and 32 rows of bf16 in flight 4 deep are 64 KB of shared memory.
    fp32 operands are multiplied without tensor cores (full precision), where a thread cannot keep that many sums besides its operands."""
    if itemsize == 2:
        return {"BM": 128, "BN": 128, "BK": 32, "GROUP": 8, "num_warps": 8, "num_stages": 4}
    return {"BM": 64, "BN": 64, "BK": 16, "GROUP": 8, "num_warps": 8, "num_stages": 3}
