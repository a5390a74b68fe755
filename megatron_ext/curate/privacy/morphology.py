"""Korean morphology by Kiwi (package kiwipiepy), asked about single candidates: is this a name, or a word that looks like one?

Only the clause around a candidate is analysed, a few dozen syllables, so a text costs what its candidates cost. The model lies in the package kiwipiepy_model;
nothing is downloaded. Kiwi runs in one thread: what it answers depends on its input alone.
"""
import functools
import os
import re

from megatron_ext.errors import UserError

_STOPS = re.compile(r"[.!?\n:;,·/()\[\]<>|\"“”]")
_REACH = 16  # syllables to both sides
NAME, WORD, UNKNOWN = "name", "word", "unknown"
_PREDICATES = ("V", "E", "J", "X", "M", "I")  # first letters of tags that no name has: verbs, endings, particles, suffixes, adverbs, interjections


@functools.cache
def _kiwi():
    try:
        from kiwipiepy import Kiwi
    except ImportError as error:
        raise UserError("curate.privacy.morphology", "kiwi",
                        "needs the package kiwipiepy: pip install 'megatron-ext[curate]'; or set curate.privacy.morphology=none") from error
    return Kiwi(num_workers=1, load_multi_dict=False, load_typo_dict=False)


def version() -> str:
    """Of the package and its model, for a manifest."""
    from importlib.metadata import version as of

    return f"kiwipiepy {of('kiwipiepy')}, kiwipiepy_model {of('kiwipiepy_model')}"


class Morphology:
    """Raises UserError when kiwipiepy is missing; one a process."""

    def __init__(self):
        self._kiwi = _kiwi()
        self._pid = os.getpid()

    def __reduce__(self):
        return Morphology, ()

    def judge(self, text: str, start: int, end: int) -> str:
        """Whether start .. end of a normalised text is a NAME (a proper noun by itself), a WORD (anything else that is known), or UNKNOWN."""
        left, right = max(0, start - _REACH), min(len(text), end + _REACH)
        for match in _STOPS.finditer(text, left, start):
            left = match.end()
        if stop := _STOPS.search(text, end, right):
            right = stop.start()
        tokens = self._kiwi.tokenize(text[left:right])
        inside = [token for token in tokens if token.start + left < end and token.start + token.len + left > start]
        if not inside:
            return UNKNOWN
        first, last = inside[0], inside[-1]
        exact = first.start + left == start and last.start + last.len + left == end
        if len(inside) == 1:
            return NAME if exact and first.tag == "NNP" else WORD  # or part of a longer word
        if not exact or any(token.tag[0] in _PREDICATES for token in inside):
            return WORD
        return NAME if first.tag == "NNP" else UNKNOWN if all(token.len == 1 for token in inside) else WORD
