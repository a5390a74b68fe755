"""Memory that a CPU rank frees and takes again stays its own. No torch.

glibc gives the top of the heap back to the kernel once 64 MiB of it are free, and large blocks at once. The activations of a step are freed and taken
again every micro-batch, and the kernel zeroes each page of them anew: an iteration of PPO on a small model took 200,000 page faults, and takes a
tenth of them now. The highest amount of memory in use is the same; what a rank holds after it is up to KEEP more.
"""
import ctypes
from collections.abc import Mapping

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEEP = 1 << 30  # bytes that are free at the top of the heap and stay
LARGEST = 32 << 20  # bytes of a block that comes from the heap; glibc allows no more


def keep(environment: Mapping[str, str]) -> bool:
    """True where glibc has taken both settings. Whoever has set its own (MALLOC_TRIM_THRESHOLD_, GLIBC_TUNABLES, ...) keeps them."""
    if any(name.startswith("MALLOC_") and name.endswith("_THRESHOLD_") or name == "GLIBC_TUNABLES" and "malloc" in text for name, text in environment.items()):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    return mallopt(M_MMAP_THRESHOLD, LARGEST) == 1 == mallopt(M_TRIM_THRESHOLD, KEEP)

