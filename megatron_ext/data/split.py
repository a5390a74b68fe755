"""Which split a document belongs to: decided by a hash of the document alone.

With h the first 64 bits of sha256(document) as a fraction of 2^64, the document goes to the split whose interval of the cumulated
fractions holds h. Adding, removing or reordering documents therefore moves no other document, and equal documents never
stand on both sides.
"""
import hashlib
import math
from collections.abc import Sequence

from megatron_ext.data.prepared import SPLITS
from megatron_ext.errors import UserError


def check_split(split: Sequence[float]) -> tuple[float, ...]:
    """The fractions of train, validation and test.

    Raises:
        UserError: not three fractions of at least 0 that sum to 1.
    """
    fractions = tuple(float(fraction) for fraction in split)
    if len(fractions) != len(SPLITS) or not all(0 <= fraction <= 1 for fraction in fractions) or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
        raise UserError("data.split", list(split), f"three fractions that sum to 1: {', '.join(SPLITS)}")
    return fractions


def split_of(digest: bytes, fractions: Sequence[float]) -> str:
    """Name of the split of a document with this sha256 (32 bytes)."""
    position, cumulated = int.from_bytes(digest[:8], "big") / 2**64, 0.0
    for name, fraction in zip(SPLITS, fractions):
        cumulated += fraction
        if position < cumulated:
            return name
    return [name for name, fraction in zip(SPLITS, fractions) if fraction > 0][-1]  # rounding of the sum


def document_digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8")).digest()
