"""A text as a sparse vector: character n-grams of its words, hashed.

Every 2 to 4 characters in a row of a word, in small letters, with a space before and after the word, are one of 2^bits features; a feature
that occurs c times has the value 1 + ln c, times `scale` (its inverse document frequency, from training), and the vector has length 1.
Character n-grams need no Korean morphology: a stem and its particles share all n-grams of the stem, and spacing errors cost two or three.

Source: Weinberger et al., "Feature hashing for large scale multitask learning" (ICML 2009); n-grams with logarithmic counts and a linear
model: Wang and Manning, "Baselines and bigrams" (ACL 2012). Sizes and weights were compared by cross-validation
(docs/curate_quality.md).
"""
import numpy as np

from megatron_ext.curate.quality.hashing import windows_of
from megatron_ext.curate.quality.text import code_points, fold

SIZES = (2, 3, 4)
_SPACE = 0x20


def features(text: str, *, bits: int, scale: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Indices (int64, ascending, each once) and values (float32) of a text; a text without letters and digits has none.

    Args:
        scale: float [2^bits], of each feature; None: 1.
    """
    folded = fold(text)
    if not folded:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
    letters = code_points(f" {folded} ")
    spaces = np.concatenate(([0], np.cumsum(letters == _SPACE)))  # before each place
    every = []
    # the size of an n-gram is in its hash: windows of different sizes are different polynomials
    for size, hashed in windows_of(letters, SIZES).items():
        starts = np.arange(len(hashed))
        every.append(hashed[spaces[starts + size - 1] == spaces[starts + 1]])  # none that goes over from one word to the next
    indices, counts = np.unique((np.concatenate(every) >> np.uint64(64 - bits)).astype(np.int64), return_counts=True)
    values = 1 + np.log(counts)
    if scale is not None:
        values *= scale[indices]
    return indices, (values / max(np.linalg.norm(values), 1e-12)).astype(np.float32)
