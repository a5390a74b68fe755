"""Many given texts looked for in a text at once: word lists, and what was found once and may stand elsewhere too.

A table of first characters gives the lengths that are worth a look-up, so a place costs at most as many look-ups as there are different lengths.
"""
import re
from collections.abc import Iterable, Iterator


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
        for match in self._first.finditer(text):
            at = match.start()
            for length in self._lengths.get(text[at:at + 2], ()):
                if text[at:at + length] in self._values:
                    yield at, at + length
                    break
