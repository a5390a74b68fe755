"""Views of a text that several parts of this room share. Pure functions; no numpy beyond code points.

    squeeze     NFC, every run of white space is one space: what a language model and a classifier read
    fold        NFKC, case folded, letters and digits alone, one space between words: what duplicates are compared by
    solid       `fold` without its spaces. Korean spacing varies from writer to writer, and PDF text breaks lines inside words
"""
import re
import unicodedata

import numpy as np

_SPACE = re.compile(r"\s+")
_NO_WORD = re.compile(r"[\W_]+")
_BLANK_LINES = re.compile(r"\n[^\S\n]*\n\s*")
_HANGUL = re.compile(r"[\uac00-\ud7a3\u3131-\u318e\u1100-\u11ff]")
_LETTER = re.compile(r"[^\W\d_]")


def squeeze(text: str) -> str:
    return _SPACE.sub(" ", unicodedata.normalize("NFC", text)).strip()


def fold(text: str) -> str:
    return _NO_WORD.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()


def solid(text: str) -> str:
    return _NO_WORD.sub("", unicodedata.normalize("NFKC", text).casefold())


def lines(text: str) -> list[str]:
    """Lines with something on them, without the space around them."""
    return [line for line in (line.strip() for line in text.split("\n")) if line]


def paragraphs(text: str) -> list[str]:
    """What blank lines separate, without the space around it."""
    return [part for part in (part.strip() for part in _BLANK_LINES.split(text)) if part]


def code_points(text: str) -> np.ndarray:
    """The characters of `text` as uint32 [characters]."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def is_korean(text: str, language: str | None = None) -> bool:
    """Whether the Korean rules are the ones for this text: its language says so or, where that is unknown, a third of its letters are
    Hangul.

    A third, not half: official Korean text quotes names, units and statutes in Latin letters and Chinese characters.
    """
    if language:
        return language[:2].lower() == "ko"
    letters = len(_LETTER.findall(text))
    return letters > 0 and 3 * len(_HANGUL.findall(text)) >= letters
