"""Reward functions of the text alone: no model, no subprocess. Each says its range.

    length       exp(-d / scale), d = how far the response is from the lengths that are asked for            (0, 1]
    format       1 if it has the form, else 0                                                               {0, 1}
    exact_match  1 if it is the reference but for case, spaces, punctuation                                 {0, 1}
    overlap      F1 of the words that it shares with the reference, in any order or in theirs (ROUGE-L)     [0, 1]
    repetition   - the share of its n-grams that have been there before                                     (-1, 0]
"""
import ast
import json
import math
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence

from rlhf.rewards.registry import Unanswerable, reward

# A Han, Hiragana or Katakana letter is a word; elsewhere what stands between spaces and punctuation is (Korean too).
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+")
_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+#.-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


def words(text: str) -> list[str]:
    """Without case and punctuation, in Unicode's composed form (NFC)."""
    return _WORD.findall(unicodedata.normalize("NFC", text).casefold())


def code_of(response: str) -> str:
    """The last fenced block of Python (or of no language), up to the end where its fence is not closed; else the whole response."""
    blocks = [block for language, block in _FENCE.findall(response) if language.lower() in ("", "python", "py", "python3")]
    return blocks[-1] if blocks else response


# ---- length ------------------------------------------------------------------------------------------------------------------------

def _verify_length(settings: dict, timeout: float) -> None:
    target, least, most, scale = (settings[name] for name in ("target", "at_least", "at_most", "scale"))
    if target is not None and (least is not None or most is not None):
        raise ValueError("has a target, or at_least and at_most, not both")
    for name in ("target", "at_least", "at_most"):
        if settings[name] is not None and settings[name] < 1:
            raise ValueError(f"{name} must be at least 1")
    if least is not None and most is not None and least > most:
        raise ValueError(f"at_least={least} is more than at_most={most}")
    if scale is not None and not scale > 0:
        raise ValueError("scale must be greater than 0")
    if settings["unit"] not in ("words", "characters"):
        raise ValueError("unit must be words or characters")


@reward("length", verify=_verify_length)
def length(prompt: str, response: str, *, reference: str | None, record: Mapping, target: int | None = None, at_least: int | None = None,
           at_most: int | None = None, scale: float | None = None, unit: str = "words") -> float:
    """1 at `target`, or from `at_least` to `at_most`; outside exp(-distance / scale). Nothing asked for is a target of 40.

    Args:
        scale: of how far is far; None = half of the limit that is missed.
        unit: words (between spaces) | characters.
    """
    if target is None and at_least is None and at_most is None:
        target = 40
    low, high = (target, target) if target is not None else (at_least or 0, math.inf if at_most is None else at_most)
    count = len(response.split()) if unit == "words" else len(response)
    limit = min(max(count, low), high)
    return math.exp(-abs(count - limit) / (scale or limit / 2)) if count != limit else 1.0


# ---- format ------------------------------------------------------------------------------------------------------------------------

def is_sentence(text: str) -> bool:
    """Ends as a sentence does, with quotes or brackets after it or not."""
    end = text.rstrip().rstrip("\"'\u201d\u2019\u300d\u300f)]")
    return end.endswith(tuple(".!?\u2026\u3002\uff01\uff1f")) and re.search(r"\w", end) is not None


def is_json(text: str) -> bool:
    """One value of RFC 8259: NaN and Infinity are none."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return False
    return True


def is_python(text: str) -> bool:
    """Python that parses; it is not run."""
    code = code_of(text)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return bool(ast.parse(code).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


FORMATS: dict[str, Callable[[str], bool]] = {"sentence": is_sentence, "json": is_json, "python": is_python}


def _verify_format(settings: dict, timeout: float) -> None:
    if settings["kind"] not in FORMATS:
        raise ValueError(f"kind must be one of {', '.join(FORMATS)}; a form of your own is pattern=REGULAR_EXPRESSION")
    _compile("pattern", settings["pattern"])


def _compile(name: str, pattern: str | None) -> None:
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise ValueError(f"{name} is no regular expression: {error}") from error


@reward("format", verify=_verify_format)
def format_(prompt: str, response: str, *, reference: str | None, record: Mapping, kind: str = "sentence", pattern: str | None = None) -> float:
    """
    Args:
        kind: sentence | json | python (that parses, fenced or bare).
        pattern: instead: a regular expression that is found in the response (`^` and `$` are its ends).
    """
    return float(re.search(pattern, response) is not None if pattern is not None else FORMATS[kind](response))


# ---- against the reference ---------------------------------------------------------------------------------------------------------

def _needed(reference: str | None) -> str:
    if reference is None:
        raise Unanswerable("the record has no reference")
    return reference


def normalised(text: str, *, case: bool = False, punctuation: bool = False) -> str:
    """NFC, runs of white space as one space; without case and punctuation but where they count. The sign and the point of a number are none."""
    text = unicodedata.normalize("NFC", text)
    if not case:
        text = unicodedata.normalize("NFC", text.casefold())
    if not punctuation:
        text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
        text = "".join(letter if _counts(text, place) else " " for place, letter in enumerate(text))
    return " ".join(text.split())


def _counts(text: str, place: int) -> bool:
    if not unicodedata.category(text[place]).startswith("P"):
        return True
    before, after = text[place - 1 : place], text[place + 1 : place + 2]
    return after.isdigit() and (text[place] == "." or (text[place] == "-" and not before.isalnum()))


def _verify_match(settings: dict, timeout: float) -> None:
    _compile("extract", settings["extract"])


@reward("exact_match", verify=_verify_match)
def exact_match(prompt: str, response: str, *, reference: str | None, record: Mapping, case: bool = False, punctuation: bool = False,
                extract: str | None = None) -> float:
    """
    Args:
        case, punctuation: whether they have to match too.
        extract: a regular expression; the last place where it is found in the response, its first group if it has one, is the answer (of the
            reference too, where it is found there). Found nowhere: 0.
    """
    wanted = _needed(reference)
    if extract is not None:
        found, theirs = (list(re.finditer(extract, text)) for text in (response, wanted))
        if not found:
            return 0.0
        response, wanted = _group(found[-1]), _group(theirs[-1]) if theirs else wanted
    if not normalised(wanted, punctuation=punctuation):
        punctuation = True  # the answer is nothing else
    return float(normalised(response, case=case, punctuation=punctuation) == normalised(wanted, case=case, punctuation=punctuation))


def _group(match: re.Match) -> str:
    return match[1] or "" if match.re.groups else match[0]


def _verify_overlap(settings: dict, timeout: float) -> None:
    if settings["measure"] not in ("f1", "rouge_l"):
        raise ValueError("measure must be f1 or rouge_l")


@reward("overlap", verify=_verify_overlap)
def overlap(prompt: str, response: str, *, reference: str | None, record: Mapping, measure: str = "f1") -> float:
    """2 common / (words of the one + words of the other).

    Args:
        measure: f1 (words as a bag: SQuAD, Rajpurkar et al. 2016) | rouge_l (longest common subsequence: Lin 2004, beta = 1).
    """
    ours, theirs = words(response), words(_needed(reference))
    if not ours or not theirs:
        return float(ours == theirs)
    common = (Counter(ours) & Counter(theirs)).total() if measure == "f1" else common_subsequence(ours, theirs)
    return 2 * common / (len(ours) + len(theirs))


def common_subsequence(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Length of the longest one, in |a| operations on numbers of |b| bits (Hyyrö 2004): a 0 bit marks where a row of the table grows."""
    places: dict[Hashable, int] = {}
    for number, one in enumerate(b):
        places[one] = places.get(one, 0) | 1 << number
    whole = (1 << len(b)) - 1
    row = whole
    for one in a:
        matches = row & places.get(one, 0)
        row = (row + matches | row - matches) & whole
    return len(b) - row.bit_count()


# ---- repetition --------------------------------------------------------------------------------------------------------------------

def _verify_repetition(settings: dict, timeout: float) -> None:
    if settings["n"] < 1:
        raise ValueError("n must be at least 1")


@reward("repetition", verify=_verify_repetition)
def repetition(prompt: str, response: str, *, reference: str | None, record: Mapping, n: int = 3) -> float:
    """-(n-grams - different n-grams) / n-grams, of words; 0 for a response shorter than n."""
    ours = words(response)
    grams = [tuple(ours[place : place + n]) for place in range(len(ours) - n + 1)]
    return len(set(grams)) / len(grams) - 1 if grams else 0.0
