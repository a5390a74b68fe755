"""A text as a sparse vector: character n-grams, hashed.

Every 1 to 4 characters in a row of the text in small letters with single spaces, a space before and after it, are one of 2^bits features;
a feature that occurs c times has the value 1 + ln c, and the vector has length 1. Character n-grams need no Korean morphology: a stem and
its particles share all n-grams of the stem, and spacing errors cost two or three. Nothing is fitted, so that training is one pass and the
model file is its weights alone.

Source: Weinberger et al., "Feature hashing for large scale multitask learning" (ICML 2009); n-grams with logarithmic counts and a linear
model: Wang and Manning, "Baselines and bigrams" (ACL 2012).
"""
import numpy as np

from megatron_ext.curate.quality.hashing import windows_of
from megatron_ext.curate.quality.text import code_points, squeeze

SIZES = (1, 2, 3, 4)


def features(text: str, *, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (int64, ascending, each once) and values (float32) of a text; a text without any characters has none."""
    text = squeeze(text).lower()
    if not text:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
    hashed = windows_of(code_points(f" {text} "), SIZES)
    # the size of an n-gram is in its hash: windows of different sizes are different polynomials
    every = np.concatenate([one >> np.uint64(64 - bits) for one in hashed.values()]).astype(np.int64)
    indices, counts = np.unique(every, return_counts=True)
    values = 1 + np.log(counts)
    return indices, (values / np.linalg.norm(values)).astype(np.float32)
