"""Telephone numbers: Korea's in all their spellings, those of the United States and the United Kingdom, and any that begin with + and a country.

One wide pattern finds what may be one; what it is made of (national digits, separators, words before it) decides. Korea's plan: 02 and 03x-06x are areas,
01x mobile, 070 internet, 080 free, 050x forwarded, 15xx-18xx companies.
"""
import re

from megatron_ext.curate.privacy import kinds
from megatron_ext.curate.privacy.context import Around, S, digits
from megatron_ext.curate.privacy.numbers import Pattern, Written
from megatron_ext.curate.privacy.spans import Span

_AREAS = frozenset("031 032 033 041 042 043 044 051 052 053 054 055 061 062 063 064".split())
_COMPANIES = frozenset("1522 1533 1544 1551 1566 1577 1588 1599 1600 1644 1661 1666 1668 1670 1688 1800 1811 1833 1855 1877 1899".split())
_J = f"{S}(?:[-.·/_)~*]{{1,2}}{S})?"
_START, _END = r"(?<![\d.])(?<!\d-)(?<![A-Za-z]-)", r"(?!\d)(?![-.]\d)"
_COUNTRY = rf"(?:\+{S}|00{S})?8{S}2{S}[-.·/_)]?{S}(?:\(?{S}0{S}\)?)?"
_KOREAN = re.compile(rf"{_START}(?:\(?{S}\+{S}8{S}2{S}\)?{S}[-.·/_]?{S}(?:\({S}0{S}\){S}|0{S})?|{_COUNTRY}|\(?{S}0{S})"
                     rf"[1-8](?:{S}\d){{0,2}}{_J}{digits(3, 4)}{_J}{digits(4)}{_END}")
_COMPANY = re.compile(rf"{_START}{digits(4)}{S}[-.·/_]{{0,2}}{S}{digits(4)}{_END}")
_LOCAL = re.compile(rf"{_START}\d{{3,4}}{S}[-.·/_]{S}\d{{4}}{_END}")
_AMERICAN = re.compile(rf"{_START}(?:(?:\+{S}|00)?1{_J})?\(?{S}[2-9]{S}\d{S}\d{S}\)?{_J}[2-9]{S}\d{S}\d{_J}{digits(4)}(?:[ ]?(?:x|ext\.?)[ ]?\d{{1,6}})?{_END}")
_BRITISH = re.compile(rf"{_START}(?:\+{S}4{S}4{S}[-.]?{S}(?:\({S}0{S}\){S})?|\(?{S}0{S})[1-9](?:{_J}\d){{8,9}}{_END}")
_ANY = re.compile(rf"\+{S}[1-9]\d{{0,2}}(?:[ \-.()\n]{{0,3}}\d){{7,12}}{_END}")


def _national(number: str) -> str:
    """Digits with the leading 0 of the country."""
    for prefix in ("0082", "82"):
        if number.startswith(prefix):
            number = number[len(prefix):]
            break
    return number if number.startswith("0") else "0" + number


def in_korea(number: str) -> str | None:
    """What kind of number of Korea these national digits are (mobile, area, other), None where they are none."""
    length = len(number)
    if number.startswith("010"):
        return "mobile" if length == 11 and number[3] != "0" else None
    if number[:3] in ("011", "016", "017", "018", "019"):
        return "mobile" if length in (10, 11) and number[3] != "0" else None
    if number.startswith("02"):
        return "area" if length in (9, 10) and number[2] not in "01" else None
    if number[:3] in _AREAS:
        return "area" if length in (10, 11) and number[3] not in "01" else None
    if number.startswith("050"):
        return "other" if length in (11, 12) else None
    return "other" if number[:3] in ("070", "080", "060", "030") and length in (10, 11) else None


def korean(written: Written, around: Around) -> float:
    raw = around.text[around.start:around.end]
    abroad = not written.digits.startswith("0") or written.digits.startswith("00")
    if abroad and "+" not in raw and not written.hard and around.labelled(kinds.PHONE) < 0 and not written.digits.startswith("0082"):
        return 0
    number = _national(written.digits)
    what = in_korea(number)
    if what is None:  # none of the plan, but written and announced as one: of a form, an example, or older than the plan
        called = 0 <= around.labelled(kinds.PHONE) <= 6 and written.hard and not written.blanks and len(written.groups) == 3
        return 0.85 if called and (number[:2] in ("01", "02") or number[:3] in _AREAS) and 9 <= len(number) <= 11 else 0
    if around.labelled(kinds.PHONE) >= 0:
        return 0.98
    if around.is_another():
        return 0
    tidy = len(written.groups) <= 3 + abroad
    if written.hard or "+" in raw:
        return 0.93
    if not written.blanks:
        return 0.88 if what == "mobile" else 0
    if what == "mobile":
        return 0.85 if tidy or written.alone else 0.55
    return 0.6 if tidy and written.groups[-1] == 4 and written.alone else 0


def company(written: Written, around: Around) -> float:
    first, second = written.digits[:4], written.digits[4:]
    if first not in _COMPANIES:
        return 0
    if around.labelled(kinds.PHONE) >= 0:
        return 0.96
    years = abs(int(second) - int(first)) <= 200 or around.after(4).startswith(("년", "세기"))
    return 0.75 if written.hard and not years and not around.is_another() and around.labelled(kinds.ACCOUNT) < 0 else 0


def local(written: Written, around: Around) -> float:
    """Without the area: only where the word stands right before."""
    return 0.85 if 0 <= around.labelled(kinds.PHONE) <= 6 and written.digits[0] not in "01" else 0


def american(written: Written, around: Around) -> float:
    number = written.digits.removeprefix("00").removeprefix("1")[:10]
    if number[1:3] == "11" or number[4:6] == "11" or number[:3] == number[3:6] == number[6:9]:
        return 0
    raw = around.text[around.start:around.end]
    if around.labelled(kinds.PHONE) >= 0:
        return 0.96
    if around.is_another() or around.labelled(kinds.ACCOUNT) >= 0 or around.labelled(kinds.NHS) >= 0:
        return 0
    if "+" in raw or "(" in raw and ")" in raw:
        return 0.93
    return 0.85 if written.hard >= 2 else 0


_SHAPES = {(5, 6), (5, 3, 3), (4, 3, 4), (3, 4, 4), (3, 8), (4, 7), (11,), (4, 6), (5, 5), (5, 2, 4), (4, 3, 3)}


def british(written: Written, around: Around) -> float:
    raw = around.text[around.start:around.end]
    abroad = "+" in raw
    number = written.digits.removeprefix("44") if abroad else written.digits
    number = number if number.startswith("0") else "0" + number
    if number[1] not in "12378" or len(number) not in (10, 11):
        return 0
    if abroad:
        return 0.95
    if len(written.groups) > 1 and written.groups not in _SHAPES and not (number[1] == "7" and written.alone):
        return 0  # 02) 748 - 6350, and 7 of something else
    if around.labelled(kinds.PHONE) >= 0:
        return 0.95
    if around.is_another() or len(number) != 11:
        return 0
    if number[1] == "7" and number[2] in "1345789" and (len(written.groups) <= 3 or written.alone):
        return 0.8
    return 0.7 if written.groups in _SHAPES and len(written.groups) > 1 and (number[2] != "0" or number.startswith(("020", "080", "0300"))) else 0


def anywhere(written: Written, around: Around) -> float:
    return 0.8 if 9 <= len(written.digits) <= 15 else 0


PATTERNS = (
    Pattern(kinds.PHONE, _KOREAN, korean, 9),
    Pattern(kinds.PHONE, _COMPANY, company, 8),
    Pattern(kinds.PHONE, _LOCAL, local, 7),
    Pattern(kinds.PHONE, _AMERICAN, american, 10),
    Pattern(kinds.PHONE, _BRITISH, british, 9),
    Pattern(kinds.PHONE, _ANY, anywhere, 8),
)

# Digits written as words or as letters that look alike: 공일공-일이삼사-오육칠팔, O1O-1234-5678.
_ZERO, _ONE = "0공영OoㅇΟ", "1일lI|"
_WORD = f"{_ZERO}{_ONE}이삼사오육륙칠팔구\\d"
_SPELT = re.compile(rf"[{_ZERO}](?<![가-힣A-Za-z0-9].){S}[{_ONE}]{S}[{_ZERO}륙육칠팔구16-9](?:[ \n\-.·]{{0,3}}[{_WORD}]){{7,8}}(?!\d)")
_PLAIN = re.compile(r"[\d \n\-.·]+")


def spelt(text: str) -> list[Span]:
    """Mobile numbers with at least one digit that is not written as one."""
    return [Span(*match.span(), kinds.PHONE, 0.9) for match in _SPELT.finditer(text) if not _PLAIN.fullmatch(match[0])]
