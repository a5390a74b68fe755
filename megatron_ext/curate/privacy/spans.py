"""Places in a text. They never hold the text itself, so that no message, trace or pickle of one can show it."""
from collections.abc import Iterable
from typing import NamedTuple

_NEAR = 0.1  # of scores: two readings of which neither is clearly better


class Span(NamedTuple):
    """`kind` was recognised in characters start .. end (end excluded); `score` in (0, 1] says how surely."""

    start: int
    end: int
    kind: str
    score: float


def _worth(span: Span) -> tuple:
    return span.score, span.end - span.start, -span.start, span.kind


def resolve(found: Iterable[Span]) -> list[Span]:
    """Spans that do not overlap, in the order of the text. O(n log n).

    The surer of two that overlap stays. Where neither is clearly surer, both their places are removed, under the kind of the better one: what sticks out
    of a phone number that may be the middle of an account is still part of an account.
    """
    kept: list[Span] = []
    for span in sorted(found):
        if not kept or span.start >= kept[-1].end:
            kept.append(span)
            continue
        last = kept[-1]
        better = max(last, span, key=_worth)
        if abs(last.score - span.score) <= _NEAR:
            better = Span(last.start, max(last.end, span.end), better.kind, better.score)
        kept[-1] = better
    return kept
