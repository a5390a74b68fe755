"""Text as the recognisers see it: one form for what is written in many, and the way back to the original's offsets.

Characters are replaced one for one (full-width forms, digits of other scripts, the dozen hyphens, all kinds of spaces), so that offsets stay.
Only what has no width (soft hyphens, joiners, direction marks) is left out, and what is decomposed (a syllable as jamo, a letter and its accent) is
composed; a text with any of these gets a table of offsets.
"""
import re
import unicodedata
from array import array

_HYPHENS = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\u2043\u02d7\ufe58\ufe63\u30fc\u3161\u1173\uff70\u2500\u2501\u00af\u2796\u058a"
_SPACES = "\t\r\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000\u2800"
_BREAKS = "\v\f\x1c\x1d\x1e\x85\u2028\u2029"
_DOTS = "\u00b7\u2024\u2027\u22c5\u2219\u30fb\u318d\uff65\u11a2\u2022\u0387"  # the middle dots of Korean lists
_QUOTES = "\u2018\u2019\u201b\u02bc\u2032"
_FULL_STOPS = "\u3002\uff61\ufe52"


def _table() -> dict[int, str]:
    table = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full-width ASCII
    for code in range(128, 0x20000):  # none has a decimal value beyond
        if (value := unicodedata.decimal(chr(code), None)) is not None:
            table[code] = str(int(value))
    for characters, plain in ((_HYPHENS, "-"), (_SPACES, " "), (_BREAKS, "\n"), (_DOTS, "·"), (_QUOTES, "'"), (_FULL_STOPS, ".")):
        table.update((ord(character), plain) for character in characters if character != plain)
    return table


_NOTHING = "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0"
_MARKS = "\u0300-\u034e\u0350-\u036f\u1161-\u11ff\u20d0-\u20f0\u3099\u309a"
_TABLE = _table()
# Two classes, since one with characters beyond U+FFFF is looked through range by range.
_OTHER = re.compile("[" + re.escape("".join(chr(code) for code in _TABLE if code < 0x10000)) + "]")
_ASTRAL = re.compile("[\U00010000-\U0010ffff]")
_WIDTHLESS = re.compile(f"[{_NOTHING}]")
_CLUSTER = re.compile(f"[{_NOTHING}]+|[^{_NOTHING}{_MARKS}](?:[{_NOTHING}]{{0,4}}[{_MARKS}])+")


class Normal:
    """A text in one form.

    Attributes:
        text: what the patterns are matched against.
    """

    __slots__ = ("_ends", "_starts", "text")

    def __init__(self, original: str):
        self._starts = self._ends = None
        text = original
        if not text.isascii() and (_WIDTHLESS.search(text) or not unicodedata.is_normalized("NFC", text)):
            text = self._compose(text)
        self.text = text if text.isascii() or not (_OTHER.search(text) or _ASTRAL.search(text)) else text.translate(_TABLE)

    def original(self, start: int, end: int) -> tuple[int, int]:
        """The original's characters behind start .. end (end > start) of `.text`."""
        return (start, end) if self._starts is None else (self._starts[start], self._ends[end - 1])

    def tabbed(self, original: str) -> str:
        """`.text` with the tabs of the original, which separate cells, where both have the same length."""
        if "\t" not in original or self._starts is not None:
            return self.text
        parts, at = [], 0
        for part in original.split("\t"):
            parts.append(self.text[at:at + len(part)])
            at += len(part) + 1
        return "\t".join(parts)

    def _compose(self, text: str) -> str:
        parts: list[str] = []
        starts, ends, at = array("q"), array("q"), 0
        for match in _CLUSTER.finditer(text):
            parts.append(text[at:match.start()])
            starts.extend(range(at, match.start()))
            ends.extend(range(at + 1, match.start() + 1))
            composed = unicodedata.normalize("NFC", _WIDTHLESS.sub("", match[0]))
            parts.append(composed)
            starts.extend([match.start()] * len(composed))
            ends.extend([match.end()] * len(composed))
            at = match.end()
        parts.append(text[at:])
        starts.extend(range(at, len(text)))
        ends.extend(range(at + 1, len(text) + 1))
        self._starts, self._ends = starts, ends
        return "".join(parts)
