"""How much work a regular expression can make at one place of a text: patterns from a rules file must be safe on hostile text.

Python's `re` backtracks. A search costs at most (places) x (ways to match from one place) x (length of a way). Here every repeat must have an end, and the
number of ways is bounded from the parsed pattern: a repeat of {a,b} has b - a + 1 ways times those of what it repeats, each time; an alternation has the sum
of its branches, a sequence the product of its parts. Possessive and atomic groups have one way. A pattern under the limit is linear in the text with a known factor.
"""
import re
from re import _constants as codes
from re import _parser as parser

MAX_WAYS = 1000
MAX_LENGTH = 400  # characters of one match
MAX_PATTERN = 500
_BIG = 10**9


class Unsafe(ValueError):
    """The pattern is not taken; the message says why, and holds no text but the pattern's."""


def check(pattern: str) -> re.Pattern:
    """The compiled pattern. Raises Unsafe for one that is wrong, empty, unbounded, or may take long."""
    if len(pattern) > MAX_PATTERN:
        raise Unsafe(f"has more than {MAX_PATTERN} characters; take a list of words, or several patterns")
    try:
        compiled = re.compile(pattern)
        parsed = parser.parse(pattern, compiled.flags)
    except (re.error, OverflowError, RecursionError) as error:
        raise Unsafe(f"is no regular expression ({error})") from None
    least, most = parsed.getwidth()
    if least == 0:
        raise Unsafe("also matches nothing at all; it must need at least one character")
    ways = _ways(parsed)
    if most > MAX_LENGTH:
        raise Unsafe(f"has a repeat without a near end; write {{1,20}} in place of + or *, at most {MAX_LENGTH} characters in all")
    if ways > MAX_WAYS:
        raise Unsafe("can match in too many ways, so that hostile text would take very long; use shorter repeats, none inside another")
    return compiled


def _ways(parsed) -> int:
    """Ways in which a parsed sequence can match from one place."""
    ways = 1
    for code, value in parsed:
        if code in (codes.MAX_REPEAT, codes.MIN_REPEAT):
            low, high, inner = value
            each, high = _ways(inner), int(high)
            if high > MAX_LENGTH:
                ways = _BIG
            else:
                ways *= min(sum(min(each, 2**20) ** min(count, 64) for count in range(low, high + 1)) if each > 1 else high - low + 1, _BIG)
        elif code is codes.POSSESSIVE_REPEAT:
            if int(value[1]) > MAX_LENGTH:
                ways = _BIG
            _ways(value[2])  # one way, and no reference inside
        elif code is codes.BRANCH:
            ways *= sum(_ways(branch) for branch in value[1])
        elif code is codes.SUBPATTERN:
            ways *= _ways(value[3])
        elif code is codes.ATOMIC_GROUP:
            _ways(value)
        elif code in (codes.ASSERT, codes.ASSERT_NOT):
            ways *= _ways(value[1])
        elif code is codes.GROUPREF_EXISTS or code is codes.GROUPREF:
            raise Unsafe("refers back to a group; write out what it may be")
        ways = min(ways, _BIG)
    return ways
