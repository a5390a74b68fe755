"""Hashes of many n-grams at once: 64-bit numbers from arrays of symbols, the same on every machine and in every process.

An n-gram x1 .. xn of symbols is hashed as the polynomial m(x1) B^(n-1) + ... + m(xn) modulo 2^64 with B odd, where m spreads a symbol over
64 bits, and the sum is spread once more. It needs one array addition a symbol of the n-gram instead of one call a window. Two different
n-grams collide with probability about 2^-64 unless someone chose the text to collide: a document can only get itself removed that way.
"""
from collections.abc import Iterable

import numpy as np

BASE = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def mix(numbers: np.ndarray) -> np.ndarray:
    """uint64 to uint64, one to one, each bit of the result depending on all bits: the last step of SplitMix64 (Steele, Lea and Flood,
    OOPSLA 2014)."""
    found = numbers.astype(np.uint64, copy=True)
    found ^= found >> _SHIFTS[0]
    found *= _FACTORS[0]
    found ^= found >> _SHIFTS[1]
    found *= _FACTORS[1]
    found ^= found >> _SHIFTS[2]
    return found


def windows(symbols: np.ndarray, size: int) -> np.ndarray:
    """The hash of each window of `size` symbols.

    Args:
        symbols: integers [symbols].

    Returns:
        uint64 [max(symbols - size + 1, 0)].
    """
    return windows_of(symbols, (size,))[size]


def windows_of(symbols: np.ndarray, sizes: Iterable[int]) -> dict[int, np.ndarray]:
    """`windows` for several sizes in the time of the largest."""
    wanted = sorted(set(sizes))
    spread, found = mix(symbols.astype(np.uint64) + np.uint64(1)), {}  # mix(0) is 0, which would make leading zeros vanish
    running = np.zeros(len(spread), dtype=np.uint64)
    for place in range(wanted[-1] if wanted else 0):
        count = len(spread) - place
        if count <= 0:
            break
        running = running[:count]
        running *= BASE
        running += spread[place:]
        if place + 1 in wanted:
            found[place + 1] = mix(running)
    return {size: found.get(size, np.zeros(0, dtype=np.uint64)) for size in wanted}
