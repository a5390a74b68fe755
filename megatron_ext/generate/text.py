"""Tokens back to text while it grows: characters that lie across tokens, and stop strings that do.

A byte-level token may end in the middle of a character. Decoded alone, such a tail is the replacement character U+FFFD; text that is
handed out ends before it. Some decoders look at what stands to the left (a leading space), so completions are decoded behind the end of
their prompt.
"""
from collections.abc import Sequence

from megatron_ext.data.tokenizer import Tokenizer

BROKEN = "\ufffd"
CONTEXT = 8  # tokens of the prompt decoded along; a character has at most 4 bytes


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The text that `tokens` add to `prompt`, without a last character that is not complete yet."""
    context = list(prompt[-CONTEXT:])
    before = tokenizer.decode(context).rstrip(BROKEN)
    whole = tokenizer.decode([*context, *tokens])
    added = whole[len(before):] if whole.startswith(before) else tokenizer.decode(tokens)
    return added[:-1] if added.endswith(BROKEN) else added


class StopStrings:
    """Finds the earliest end of a completion's text.

    Args:
        strings: none of them empty.
    """

    def __init__(self, tokenizer: Tokenizer, strings: Sequence[str]):
        self._tokenizer, self._strings = tokenizer, tuple(strings)
        # Each token holds at least one byte: a match that ends in the newest token begins in a window of this many.
        self._window = max((len(string.encode("utf-8")) for string in strings), default=0) + 4

    def found(self, prompt: Sequence[int], tokens: Sequence[int]) -> bool:
        """Whether the text of `tokens` holds a stop string that ends in the last of them. Called after each: decodes a window only."""
        if not self._strings:
            return False
        window = self._window
        left = (*prompt[-CONTEXT:], *tokens[-window - CONTEXT : -window])
        return self._first_cut(continuation(self._tokenizer, left, tokens[-window:])) is not None

    def cut(self, text: str) -> str:
        """`text` up to its first stop string."""
        place = self._first_cut(text)
        return text if place is None else text[:place]

    def _first_cut(self, text: str) -> int | None:
        places = [place for string in self._strings if (place := text.find(string)) >= 0]
        return min(places, default=None)
