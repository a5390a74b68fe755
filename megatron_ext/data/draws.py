"""Random choices that are a function of their key alone: the same on every rank, in every layout, with every NumPy (see order.py)."""
import hashlib

import numpy as np


def stream(*key: object) -> np.random.Philox:
    """Raw 64-bit numbers of a counter-based generator, which NumPy promises never to change."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64))


class Draws:
    """A stream of random numbers.

    Args:
        key: whatever it depends on, such as a seed and the number of a sample.
    """

    def __init__(self, *key: object):
        self._stream = stream(*key)

    def uniform(self, count: int) -> np.ndarray:
        """float64 [count] in [0, 1)."""
        return (self._stream.random_raw(count) >> np.uint64(11)) * 2.0**-53

    def integers(self, count: int, below: int) -> np.ndarray:
        """int64 [count] in [0, below)."""
        return (self.uniform(count) * below).astype(np.int64)

    def choice(self, size: int, count: int) -> np.ndarray:
        """`count` different numbers of [0, size), int64, rising."""
        return np.sort(np.argsort(self._stream.random_raw(size), kind="stable")[:count])
