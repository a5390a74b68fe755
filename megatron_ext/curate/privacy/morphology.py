"""Korean morphology by Kiwi (package kiwipiepy), asked about single words: is this a name, or a word that looks like one?

Only the candidate's own word (name and particle) is analysed, and answers are remembered, so a text costs what its candidates cost. The model lies in the
package kiwipiepy_model; nothing is downloaded. Kiwi runs in one thread: what it answers depends on its input alone.
"""
import functools

from megatron_ext.errors import UserError

NAME, COMMON, MIXED, UNKNOWN = "name", "common", "mixed", "unknown"
_REMEMBERED = 1 << 16  # words, in this process's memory alone


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
        self.judge = functools.lru_cache(maxsize=_REMEMBERED)(self._judge)

    def __reduce__(self):
        return Morphology, ()

    def _judge(self, word: str, length: int) -> str:
        """What the first `length` syllables of a word are: a proper NAME, a COMMON word that the dictionary has (or a part of one), UNKNOWN (the dictionary
        has none of it, as with most names, or only single syllables), or MIXED (several words, or a word with endings)."""
        inside = [token for token in self._kiwi.tokenize(word) if token.start < length]
        first, last = inside[0], inside[-1]
        exact = last.start + last.len == length
        if len(inside) == 1:
            if exact and first.tag == "NNP":
                return NAME
            return UNKNOWN if first.oov else COMMON
        if not exact or any(token.tag[0] in "JEV" for token in inside):
            return MIXED
        if len(inside) == 2 and first.len == 1 and first.tag == "NNP" and last.len == 2 and last.tag in ("NNP", "NNG"):  # a surname and a word
            return UNKNOWN
        begins = first.len == 1 or first.tag == "NNP" and first.len == 2  # a surname, or one with the first syllable of the given name
        return UNKNOWN if begins and all(token.len == 1 or token.oov for token in inside[1:]) else MIXED
