"""Many given texts looked for in a text at once: word lists, and what was found once and may stand elsewhere too.

A table of first characters gives the lengths that are worth a look-up, so a place costs at most as many look-ups as there are different lengths.
"""
import re
from collections.abc import Iterable, Iterator

from megatron_ext.curate.privacy import kinds

FEW = 48  # values up to which each is searched for on its own
_SEVEN = 7  # digits from which on a number is looked for without what stands between them


def variants(value: str, kind: str) -> Iterator[str]:
    """A normalised value, and how else it is written where nothing announces it: digits alone, a number of Korea without its country, a name without blanks."""
    yield value
    if kind == kinds.PERSON:
        if " " in value and not value.isascii():
            yield "".join(value.split())
        return
    if kind not in kinds.STRUCTURED or any(character.isalpha() for character in value):
        return
    digits = "".join(character for character in value if "0" <= character <= "9")
    if len(digits) >= _SEVEN:
        yield digits
        if kind == kinds.PHONE and digits.startswith("82"):
            yield "0" + digits[2:].removeprefix("0")


class Values:
    """Args: values: of two characters and more; shorter ones are left out."""

    def __init__(self, values: Iterable[str]):
        self._values = {value for value in values if len(value) >= 2}
        lengths: dict[str, set[int]] = {}
        for value in self._values:
            lengths.setdefault(value[:2], set()).add(len(value))
        self._lengths = {head: sorted(found, reverse=True) for head, found in lengths.items()}
        firsts = "".join(sorted({value[0] for value in self._values}))
        self._first = re.compile(f"[{re.escape(firsts)}]") if firsts else None

    def __bool__(self) -> bool:
        return bool(self._values)

    def find(self, text: str) -> Iterator[tuple[int, int]]:
        """(start, end), the longest at each place; overlapping ones too. Case counts."""
        if self._first is None:
            return
        if len(self._values) <= FEW:
            yield from self._few(text)
            return
        for match in self._first.finditer(text):
            at = match.start()
            for length in self._lengths.get(text[at:at + 2], ()):
                if text[at:at + length] in self._values and at + length <= len(text):  # a slice at the end is shorter
                    yield at, at + length
                    break

    def _few(self, text: str) -> Iterator[tuple[int, int]]:
        """The same, a search for each value: faster until there are many."""
        longest: dict[int, int] = {}
        for value in self._values:
            at = text.find(value)
            while at >= 0:
                longest[at] = max(longest.get(at, 0), len(value))
                at = text.find(value, at + 1)
        yield from ((at, at + longest[at]) for at in sorted(longest))
