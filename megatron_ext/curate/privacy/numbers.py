"""Numbers of Korea and of everywhere: a scan finds runs of seven digits and more, and each pattern is tried on those alone.

A pattern allows noise (spaces, wrapped lines) between any two characters; its judge then looks at how the number was really written (hyphens, lengths,
neighbours), at check digits and at the words before it, and gives a score. 0 = it is not one.

Time: a run is tried by each pattern at each of its digits, every repeat is bounded, so a text costs at most a constant for each of its characters.
"""
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_ext.curate.privacy import checks, kinds
from megatron_ext.curate.privacy.context import Around, S, digits, nearest
from megatron_ext.curate.privacy.spans import Span

RUN = re.compile(r"\d(?:[ \n()\-.·/_~:*]{0,6}\d){6,}")
BEFORE, BEYOND = 3, 12  # characters before and behind a run that patterns may look at: "(+"
_DIGIT = re.compile(r"\d+")
_NOT_DIGIT = re.compile(r"\D+")


@dataclass(frozen=True)
class Written:
    """How a candidate is written.

    Attributes:
        digits: alone. hard: separators other than blanks. groups: lengths of the runs of digits between separators of any kind.
        blanks: separators that are blanks alone. alone: no digit follows or precedes behind a mere blank.
    """

    digits: str
    hard: int
    groups: tuple[int, ...]
    blanks: int
    alone: bool

    @classmethod
    def of(cls, text: str, start: int, end: int) -> "Written":
        raw = text[start:end]
        parts = _NOT_DIGIT.split(raw)
        separators = _NOT_DIGIT.findall(raw)
        blank = sum(separator.isspace() for separator in separators)
        before, after = text[max(0, start - 4):start].rstrip(" \n"), text[end:end + 4].lstrip(" \n")
        return cls("".join(parts), len(separators) - blank, tuple(len(part) for part in parts if part), blank,
                   not before[-1:].isdigit() and not after[:1].isdigit())


Judge = Callable[[Written, Around], "float | tuple[float, str]"]


@dataclass(frozen=True)
class Pattern:
    kind: str
    regex: re.Pattern
    judge: Judge
    least: int  # digits of a run that may hold one


def rrn(written: Written, around: Around) -> float | tuple[float, str]:
    number = written.digits
    announced = nearest(around, (kinds.RRN, kinds.FRN, kinds.CORPORATE))
    if announced == kinds.CORPORATE:
        return 0.98, kinds.CORPORATE
    kind = kinds.FRN if checks.is_foreign(number) else kinds.RRN
    born, good = checks.birth(number), checks.resident(number)
    if announced:
        return (0.99 if born else 0.9), kind
    if around.is_another() and not (written.hard and good and born):
        return 0
    if born is None:
        return (0.7, kinds.CORPORATE) if written.hard and written.groups == (6, 7) and checks.corporate(number) else 0
    if written.hard:
        if good or checks.may_lack_check(born):
            return 0.97, kind
        if checks.corporate(number):
            return 0.8, kinds.CORPORATE
        return (0.8, kind) if len(written.groups) <= 3 and around.labelled(kinds.ACCOUNT) < 0 else 0
    if not written.alone or not good:
        tidy = written.alone and written.groups == (6, 7) and "\n" not in around.text[around.start:around.end]
        return (0.6 if tidy and checks.may_lack_check(born) else 0), kind
    return (0.85 if len(written.groups) <= 2 else 0.7), kind


def business(written: Written, around: Around) -> float:
    label = around.labelled(kinds.BUSINESS)
    shaped = written.hard >= 2 and (written.groups == (3, 2, 5) or written.blanks > 0 or len(written.groups) > 3)
    if label >= 0:
        return 0.98 if shaped or written.alone else 0.9
    if written.hard == 2 and written.groups == (3, 2, 5) and around.labelled_after(kinds.BUSINESS, 8):
        return 0.9
    if not shaped or around.labelled(kinds.ACCOUNT) >= 0 and not checks.business(written.digits):
        return 0
    return 0.93 if checks.business(written.digits) and not around.is_another() else 0


def driver(written: Written, around: Around) -> float:
    region = 11 <= int(written.digits[:2]) <= 28
    if around.labelled(kinds.DRIVER) >= 0:
        return 0.98
    return 0.92 if written.hard >= 3 and region and not around.is_another() and around.labelled(kinds.ACCOUNT) < 0 else 0


def card(written: Written, around: Around) -> float:
    number, label = written.digits, around.labelled(kinds.CARD)
    grouped = written.groups in ((4, 4, 4, 4), (4, 6, 5), (4, 6, 4), (4, 4, 4, 4, 3), (len(number),)) or written.hard >= 3
    if not checks.luhn(number):
        return 0.8 if 0 <= label <= 4 and grouped and len(number) >= 15 else 0
    if not checks.card_issuer(number):
        return 0.8 if 0 <= label <= 12 else 0
    if label >= 0:
        return 0.97
    if around.is_another() or around.labelled(kinds.ACCOUNT) >= 0:
        return 0
    if len(written.groups) > 1:
        if not written.hard and not written.alone:  # a row of a table: one in ten of any numbers has the check digit
            return 0
        return 0.95 if grouped and (written.hard or written.groups[0] == 4) else 0.7 if written.alone else 0
    return 0.75 if len(number) >= 15 else 0


def account(written: Written, around: Around) -> float:
    """No check digits anywhere: the words around decide."""
    label = around.labelled(kinds.ACCOUNT)
    if label < 0 and not around.labelled_after(kinds.ACCOUNT, 12):
        return 0
    if len(set(written.digits)) == 1 or written.digits[0] == "0" and written.digits[1] == "1" and len(written.digits) == 11 and label > 3:
        return 0
    for other in (kinds.PHONE, kinds.BUSINESS, kinds.RRN, kinds.CARD):
        if 0 <= (at := around.labelled(other)) and (label < 0 or at < label):
            return 0
    strict = not written.blanks
    if label < 0:
        return 0.7 if strict or written.hard and written.alone and around.labelled_after(kinds.ACCOUNT, 6) else 0
    if not strict:
        return 0.82 if written.hard or written.alone else 0
    return 0.96 if label <= 4 else 0.93


def account_short(written: Written, around: Around) -> float:
    """Seven to nine digits (the United Kingdom, the United States) right behind the word."""
    return 0.9 if 0 <= around.labelled(kinds.ACCOUNT) <= 4 and written.alone else 0


def routing(written: Written, around: Around) -> float:
    return 0.9 if "routing" in around.before[-20:] or "aba" in around.before[-8:] and checks.routing(written.digits) else 0


def ssn(written: Written, around: Around) -> float:
    if not checks.social_security(written.digits):
        return 0.7 if 0 <= around.labelled(kinds.SSN) <= 6 else 0
    if around.labelled(kinds.SSN) >= 0:
        return 0.98
    shaped = written.hard == 2 and (written.groups == (3, 2, 4) or written.blanks > 0)
    return 0.85 if shaped and not around.is_another() and around.labelled(kinds.ACCOUNT) < 0 else 0


def nhs(written: Written, around: Around) -> float:
    return 0.97 if around.labelled(kinds.NHS) >= 0 and checks.nhs(written.digits) else 0.9 if 0 <= around.labelled(kinds.NHS) <= 6 else 0


_START, _END = r"(?<!\d)(?<!\d-)(?<![A-Za-z]-)", r"(?!\d)(?!-\d)"
_LOOSE = f"{S}(?:-{{1,2}}{S})?"
_J = f"{S}(?:[-./·_~]{{1,2}}{S})?"  # a separator that may be absent; one way to read any blanks, so that nothing multiplies


def _joined(*lengths: int) -> str:
    return _J.join(digits(length) for length in lengths)


PATTERNS = (
    Pattern(kinds.RRN, re.compile(rf"{_START}{digits(6)}{_J}[0-9](?:{S}\d){{6}}{_END}"), rrn, 13),
    Pattern(kinds.DRIVER, re.compile(rf"{_START}{_joined(2, 2, 6, 2)}{_END}"), driver, 12),
    Pattern(kinds.CARD, re.compile(rf"{_START}{_joined(4, 4, 4, 4)}(?:{_J}{digits(3)})?{_END}"), card, 16),
    Pattern(kinds.CARD, re.compile(rf"{_START}3[0-9 ]{{0,3}}\d(?:{_J}\d){{11,12}}{_END}"), card, 14),
    Pattern(kinds.BUSINESS, re.compile(rf"{_START}{_joined(3, 2, 5)}{_END}"), business, 10),
    Pattern(kinds.ACCOUNT, re.compile(r"(?<!\d)(?<![\d][-.])\d{2,8}(?:-\d{1,8}){1,5}(?!\d)(?!-\d)"), account, 9),
    Pattern(kinds.ACCOUNT, re.compile(r"(?<!\d)(?<![\d][-.])\d{10,16}(?!\d)(?!-\d)"), account, 10),
    Pattern(kinds.ACCOUNT, re.compile(rf"(?<!\d)(?<![\d][-.])\d(?:{_LOOSE}\d){{9,15}}(?!{_LOOSE}\d)"), account, 10),
    Pattern(kinds.ACCOUNT, re.compile(rf"{_START}\d{{7,9}}{_END}"), account_short, 7),
    Pattern(kinds.ACCOUNT, re.compile(rf"{_START}\d{{9}}{_END}"), routing, 9),
    Pattern(kinds.SSN, re.compile(rf"{_START}{_joined(3, 2, 4)}{_END}"), ssn, 9),
    Pattern(kinds.NHS, re.compile(rf"{_START}{_joined(3, 3, 4)}{_END}"), nhs, 10),
)
_CARD = re.compile(rf"(?:카드|[Cc]ard|CARD|[Vv]isa|VISA|[Mm]aster(?:[Cc]ard)?|[Aa]mex|AMEX)(?:번호|[ ]?(?:number|[Nn]o\.?|#))?(?:은|는)?[ \n:=#(|]{{0,6}}(?:is )?(?P<number>\d(?:{_J}\d){{11,18}}){_END}")
_HALF = re.compile(rf"(?:주{S}민|주민등록|등록)[가-힣 \n]{{0,8}}(?:앞|뒷|뒤){S}(?:번호|자리)[ \n:=(는은이]{{0,4}}(?P<half>\d{{6,7}})(?!\d)"
                   rf"|(?:앞|뒷|뒤){S}자리[ \n:=(는은이]{{0,4}}(?P<other>\d{{7}})(?!\d)")
_STARS = re.compile(r"\d(?<!\d\d)\d{5}[ ]?-[ ]?[1-8](?:\d{0,5}[*●○xX]{1,6})(?![\d*])")  # 850101-1******: the date of birth is a person's too
_SORT_CODE = re.compile(rf"[Ss]ort[ -]?[Cc]ode[^\d\n]{{0,12}}(?P<code>{_joined(2, 2, 2)}){_END}")


def runs(text: str) -> list[tuple[int, int, int]]:
    """(start, end, digits) of every run of seven digits and more, without tables of single digits: no number is 60 of these."""
    found = []
    for match in RUN.finditer(text):
        raw = match[0]
        count = len(raw) - len(_DIGIT.sub("", raw))
        if count <= 60 or len(_NOT_DIGIT.findall(raw)) * 3 < count * 2:
            found.append((match.start(), match.end(), count))
    return found


def tried(text: str, patterns: tuple[Pattern, ...], found: list[tuple[int, int, int]]) -> Iterator[Span]:
    """What the patterns' judges accept in the runs."""
    for start, end, count in found:
        seen: dict[tuple[int, int], tuple[Written, Around]] = {}  # several patterns see the same places
        for pattern in patterns:
            if count < pattern.least:
                continue
            at, limit = max(0, start - BEFORE), min(end + BEYOND, len(text))
            while match := pattern.regex.search(text, at, limit):
                first, last = match.span()
                while text[first] in " \n" or text[first] == "(" and ")" not in match[0]:
                    first += 1
                if (first, last) not in seen:
                    seen[first, last] = Written.of(text, first, last), Around(text, first, last)
                verdict = pattern.judge(*seen[first, last])
                score, kind = verdict if isinstance(verdict, tuple) else (verdict, pattern.kind)
                if score:
                    yield Span(first, last, kind, score)
                at = last if score else match.start() + 1


def find(text: str, found: list[tuple[int, int, int]]) -> Iterator[Span]:
    """What is no pattern alone: behind words, halves, with stars. In a normalised text."""
    for match in _CARD.finditer(text) if found else ():  # twelve to nineteen digits of any issuer, behind the word
        if checks.luhn("".join(_DIGIT.findall(match["number"]))):
            yield Span(*match.span("number"), kinds.CARD, 0.85)
    if "자리" in text or "뒷번호" in text or "앞번호" in text:
        yield from (Span(*match.span("half" if match["half"] else "other"), kinds.RRN, 0.9) for match in _HALF.finditer(text))
    yield from (Span(*match.span(), kinds.RRN, 0.9) for match in (_STARS.finditer(text) if "-" in text else ()) if checks.birth(match[0][:6] + match[0].partition("-")[2].lstrip()[0]))
    if "ort" in text:
        yield from (Span(*match.span("code"), kinds.ACCOUNT, 0.9) for match in _SORT_CODE.finditer(text))
