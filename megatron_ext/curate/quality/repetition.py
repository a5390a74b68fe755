"""Repetition inside a document, after Gopher (table A1 of Rae et al. 2021), with Korean limits of FineWeb2 (configs/kor_Hang.yml, see
heuristics.py).

    repeated(text, korean=True) -> None, or the reason to drop it

Lines and paragraphs that stood before in the document; the most frequent 2-, 3- and 4-gram of words; the characters of words inside 5- to
10-grams that occurred before, each character once. Gopher's shares are of all characters; ours of the characters of words, so that tables
padded with spaces are not thought more varied than they are.

Words are numbered, and n-grams are found by sorting numbers: a document of W words costs O(W log W), whatever is in it.
"""
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ext.curate.quality.text import lines, paragraphs


@dataclass(frozen=True)
class Limits:
    """Shares above which a document is repetitive.

    Attributes:
        lines, paragraphs: of lines and paragraphs that were there before.
        line_characters, paragraph_characters: their share of the characters.
        top: n and the share of characters in the most frequent n-gram of words.
        repeated: n and the share of characters in n-grams of words that were there before.
    """

    lines: float
    top: tuple[tuple[int, float], ...]
    repeated: tuple[tuple[int, float], ...]
    paragraphs: float = 0.30
    line_characters: float = 0.20
    paragraph_characters: float = 0.20


GOPHER = Limits(
    lines=0.30, top=((2, 0.20), (3, 0.18), (4, 0.16)), repeated=((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10)),
)
# FineWeb2 leaves out what has no entry of its own: limits on paragraphs and on characters of lines stay Gopher's.
KOREAN = Limits(
    lines=0.374, top=((2, 0.282), (3, 0.228), (4, 0.185)),
    repeated=((5, 0.201), (6, 0.184), (7, 0.168), (8, 0.154), (9, 0.140), (10, 0.127)),
)


def repeated(text: str, *, korean: bool, limits: Limits | None = None) -> str | None:
    """The first limit that the document is above, as a reason; None if it is below all."""
    limits = limits or (KOREAN if korean else GOPHER)
    for name, parts, share, characters in (
        ("paragraphs", paragraphs(text), limits.paragraphs, limits.paragraph_characters),
        ("lines", lines(text), limits.lines, limits.line_characters),
    ):
        count, size = _before(parts)
        if parts and count > share * len(parts):
            return f"repeated_{name}"
        if parts and size > characters * sum(map(len, parts)):
            return f"repeated_{name}_characters"
    words = text.split()
    numbers: dict[str, int] = {}
    ids = np.fromiter((numbers.setdefault(word, len(numbers)) for word in words), dtype=np.int64, count=len(words))
    sizes = np.fromiter(map(len, words), dtype=np.int64, count=len(words))
    total, grams, top, covered = int(sizes.sum()), ids, dict(limits.top), dict(limits.repeated)
    for n in range(2, max((*top, *covered), default=1) + 1):
        if len(words) < n + 1:
            break
        # places among the distinct (n - 1)-grams, times the words: n-grams as numbers without overflow
        distinct, first, grams = np.unique(grams[:-1] * len(numbers) + ids[n - 1 :], return_index=True, return_inverse=True)
        if len(distinct) == len(grams):  # none occurs twice, so no longer one does
            break
        if n in top and _top(grams, sizes, n) > top[n] * total:
            return f"top_{n}_gram"
        if n in covered and _covered(first, len(grams), sizes, n) > covered[n] * total:
            return f"repeated_{n}_grams"
    return None


def _before(parts: Sequence[str]) -> tuple[int, int]:
    """How many parts were there before, and their characters."""
    counts = Counter(parts)
    return len(parts) - len(counts), sum((count - 1) * len(part) for part, count in counts.items())


def _top(grams: np.ndarray, sizes: np.ndarray, n: int) -> int:
    """Characters in all occurrences of the n-gram that occurs most; 0 if none occurs twice. Gopher and datatrove count them so,
    overlapping ones each."""
    counts = np.bincount(grams)
    if counts.max() < 2:
        return 0
    first = int(np.flatnonzero(grams == counts.argmax())[0])
    return int(counts.max() * sizes[first : first + n].sum())


def _covered(first: np.ndarray, grams: int, sizes: np.ndarray, n: int) -> int:
    """Characters of words inside n-grams that occurred before, each once. first: where each of the `grams` n-grams stands first."""
    again = np.ones(grams, dtype=np.int64)
    again[first] = 0
    steps = np.zeros(len(sizes) + 1, dtype=np.int64)
    steps[:grams] += again
    steps[n : n + grams] -= again
    return int(sizes[np.cumsum(steps)[:-1] > 0].sum())
