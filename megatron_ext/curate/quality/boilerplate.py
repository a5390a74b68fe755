"""Lines that belong to a page and not to its text: scripts, consent banners, copyright formulas, navigation. C4 took out lines that name
Javascript and policies (Raffel et al. 2020, section 2.2); the Korean formulas are of the project's own collection
(lists/boilerplate.yaml).

    clean(text) -> (text, lines taken out)
"""
import functools
import re

from megatron_ext.curate.quality.lists import read_yaml

LONGEST = 200  # characters: what is longer is a paragraph that speaks of such things, not a banner


@functools.lru_cache(maxsize=4)
def _pattern(name: str) -> re.Pattern:
    fields = read_yaml(name)
    texts = [r"\s*".join(map(re.escape, text.split())) for text in fields["contains"]]
    whole = [rf"^[^\w\n]*{one}[^\w\n]*$" for one in (r"\s*".join(map(re.escape, text.split())) for text in fields["whole"])]
    return re.compile("|".join([*texts, *whole]), re.IGNORECASE | re.MULTILINE)


@functools.lru_cache(maxsize=4)
def _first_words(name: str) -> tuple[str, ...]:
    """Words of which one is in every text that the pattern is found in."""
    fields = read_yaml(name)
    words = {text.split()[0].lower() for text in (*fields["contains"], *fields["whole"])}
    return tuple(sorted(word for word in words if not any(other != word and other in word for other in words)))


def clean(text: str, *, name: str = "boilerplate") -> tuple[str, int]:
    """The text without such lines, and how many there were. A text without any comes back as it is."""
    small = text.lower()
    if not any(word in small for word in _first_words(name)):  # a tenth of the time that the pattern takes
        return text, 0
    pattern = _pattern(name)
    if not pattern.search(text):
        return text, 0
    found = text.split("\n")
    kept = [line for line in found if len(line) > LONGEST or not pattern.search(line)]
    return (text, 0) if len(kept) == len(found) else ("\n".join(kept), len(found) - len(kept))
