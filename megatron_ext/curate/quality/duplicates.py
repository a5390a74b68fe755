"""What makes two texts duplicates. Exact: the same letters and digits. Near: MinHash over shingles of the folded text.

With S(d) the set of a document's shingles and J = |S(a) & S(b)| / |S(a) | S(b)|, a random order of all shingles has the same smallest one
in both with probability J (Broder, "On the resemblance and containment of documents", 1997). `buckets` times `hashes` such orders are kept
as `buckets` tuples; the documents are taken for duplicates where any tuple agrees, which happens with probability

    P(J) = 1 - (1 - J^hashes)^buckets

With 14 tuples of 8, as datatrove has them by default, P(.5) = .05, P(.7) = .56, P(.8) = .92, P(.9) = 1.00.

datatrove's shingles are five words after an English word splitter. Ours are eight characters of the text without its spaces: Korean
attaches particles to words and varies in spacing, so that one change of an ending spoils five word shingles, and a line break inside a
word two of them. `benchmarks/study_curate_quality.py near` compares both on edited pairs.
"""
import hashlib
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from megatron_ext.curate.quality.config import DuplicatesConfig
from megatron_ext.curate.quality.hashing import mix, windows
from megatron_ext.curate.quality.text import code_points, fold, paragraphs, solid

_ROWS = 256  # shingles that are hashed at once: 256 times 112 hashes are 230 kB, which stay in the cache


def exact_key(text: str) -> int:
    """64 bits of the text's letters and digits: spacing, punctuation, case and compatibility forms do not count. A text without any has
    the key of its own characters."""
    return _key(solid(text) or text)


def paragraph_keys(text: str, *, least: int) -> list[int | None]:
    """Of each paragraph (text.paragraphs) the key; None where it has fewer than `least` letters and digits and always stays."""
    found = map(solid, paragraphs(text))
    return [_key(one) if len(one) >= least else None for one in found]


def without(text: str, gone: set[int]) -> str:
    """The text without its paragraphs number `gone`; the others keep the space between them and the one after them."""
    kept, start = [], 0
    for number, part in enumerate(paragraphs(text)):
        at = text.index(part, start)
        if number not in gone:
            kept.append(text[start if kept else at : at + len(part)])
        start = at + len(part)
    return "".join(kept).lstrip()


def _key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def collision(similarity: float, *, buckets: int, hashes: int) -> float:
    """P(J): how often two documents of this similarity are taken for duplicates."""
    return 1 - (1 - similarity**hashes) ** buckets


@dataclass(frozen=True)
class MinHash:
    """Signatures with one configuration."""

    config: DuplicatesConfig = field(default_factory=DuplicatesConfig)

    def shingles(self, text: str) -> np.ndarray:
        """uint64 [shingles], sorted, each once. A text shorter than one shingle has a single one, itself; one without letters and digits
        has none."""
        size = self.config.shingle_size
        if self.config.shingle == "characters":
            symbols = code_points(solid(text))
        else:
            symbols = np.fromiter(map(_key, fold(text).split()), dtype=np.uint64)
        return np.unique(windows(symbols, min(size, len(symbols)))) if len(symbols) else np.zeros(0, dtype=np.uint64)

    def signature(self, shingles: np.ndarray) -> np.ndarray:
        """uint32 [buckets, hashes]: of each hash function the smallest value over the shingles (at least one)."""
        found = np.full(self._seeds.size, np.iinfo(np.uint64).max)
        for start in range(0, len(shingles), _ROWS):
            # multiply-shift (Dietzfelbinger et al. 1997) on numbers that are mixed already; the high half of the product is the hash
            every = shingles[start : start + _ROWS, None] ^ self._seeds
            every *= self._factors
            np.minimum(found, every.min(axis=0), out=found)
        found = (found >> np.uint64(32)).astype(np.uint32)
        return found.reshape(self.config.buckets, self.config.hashes)

    @cached_property
    def _seeds(self) -> np.ndarray:
        return mix(np.arange(self.config.buckets * self.config.hashes, dtype=np.uint64) * np.uint64(2) + np.uint64(self.config.seed << 32))

    @cached_property
    def _factors(self) -> np.ndarray:
        odd = np.arange(self.config.buckets * self.config.hashes, dtype=np.uint64) * np.uint64(2) + np.uint64((self.config.seed << 32) + 1)
        return mix(odd) | np.uint64(1)


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Of two sorted sets of shingles."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / max(len(a) + len(b) - both, 1)


def duplicates(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two signatures share a bucket."""
    return bool((a == b).all(axis=1).any())
