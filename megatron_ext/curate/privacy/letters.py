"""Numbers with letters in them: passports, licences of the United States, National Insurance numbers, IBANs, plates; and dates of birth.

Patterns begin with a class of characters (not with a look behind), since the search then skips what cannot begin one at the speed of C.
"""
import re
from collections.abc import Iterator

from megatron_ext.curate.privacy import checks, kinds
from megatron_ext.curate.privacy.context import Around, S, digits
from megatron_ext.curate.privacy.spans import Span

_GAP = f"{S}(?:-{S})?"
_PASSPORT = re.compile(rf"[MSRODGmsrodg](?<![A-Za-z0-9\-].){S}(?:\d(?:{S}\d){{7}}|\d{S}\d{S}\d{S}[A-Za-z]{S}{digits(4)})(?![A-Za-z0-9]|-\d)")
_PASSPORT_ABROAD = re.compile(rf"[Pp](?:assport|ASSPORT)(?:{S}(?:[Nn]umber|NUMBER|[Nn]o\.?|NO\.?|#)){{0,2}}[ \n:=#]{{0,4}}(?:is{S})?(?P<number>[A-Za-z]?{S}\d(?:{S}\d){{7,8}})(?![A-Za-z0-9])")
_LICENCE = re.compile(r"[Dd](?:(?:river(?:'?s)?|riving|RIVER(?:'?S)?)[ \n]{0,3}(?:[Ll]icen[cs]e|LICEN[CS]E)|L(?=[ ]?(?:[Nn]|#|:)))[ \n]{0,3}(?:[Nn]umber|NUMBER|[Nn]o\.?|NO\.?|#)?[ \n:=#]{0,4}(?:is )?"
                      r"(?P<number>[A-Z]{0,5}[- ]?\d(?:[- ]?[A-Z0-9]){4,18})(?![A-Za-z0-9])")
_NINO = re.compile(rf"[A-CEGHJ-PR-TW-Z](?<![A-Za-z0-9].)[A-CEGHJ-NPR-TW-Z]{_GAP}{digits(2)}{_GAP}{digits(2)}{_GAP}{digits(2)}{_GAP}[A-D](?![A-Za-z0-9])")
_NINO_LABELLED = re.compile(rf"(?:NI ?[Nn](?:umber|o\.?)|NINO|[Nn]ational [Ii]nsurance(?: [Nn](?:umber|o\.?))?)(?: is| was)?[ \n:#]{{0,4}}(?P<number>[A-Z]{{2}}{_GAP}{digits(2)}{_GAP}{digits(2)}{_GAP}{digits(2)}{_GAP}[A-D])(?![A-Za-z0-9])")
_PLATE_UK = re.compile(r"[A-Z](?<![A-Za-z0-9].)[A-Z]\d\d ?[A-Z]{3}(?![A-Za-z0-9])")
_NOT_NINO = frozenset(("BG", "GB", "NK", "KN", "TN", "NT", "ZZ"))
_IBAN = re.compile(rf"[A-Z](?<![A-Za-z0-9].)[A-Z]{S}\d{S}\d(?:{S}[A-Z0-9]){{11,30}}(?![A-Za-z0-9])")
_PLATE = re.compile(rf"\d(?<!\d\d)(?<![.,]\d){S}\d(?:{S}\d)?{S}(?P<use>[가나다라마거너더러머버서어저고노도로모보소오조구누두루무부수우주하허호배바사아자육해공국합]){S}"
                    rf"(?P<four>{digits(4)})(?!\d|,\d|\.\d)")
_AREA = re.compile(rf"(?:서{S}울|부{S}산|대{S}구|인{S}천|광{S}주|대{S}전|울{S}산|세{S}종|경{S}기|강{S}원|충{S}북|충{S}남|전{S}북|전{S}남|경{S}북|경{S}남|제{S}주){S}$")
_DIPLOMAT = re.compile(rf"[외준국협영대](?<![가-힣].)(?:교|외|제|정|사|기|영){S}\d{{3}}{S}-{S}\d{{3}}(?!\d)")
# Letters that are also words behind a number: 12조 3000억, 20주 1000원, 12호 1999년, 14로 3456.
_WORDS = frozenset("조주호로도수부자가나서아하다라고오사구")
_UNIT = re.compile(r"[ \n]{0,2}(?:년|월|일|원|억|만|천|백|명|개|건|세|호|조|항|번|회|시|분|초|쪽|%|퍼|k|m|g|c|K|M|G|톤|평|㎡|가구|여|달러|주년|학년|호실|부터|까지|페이지)")
_PLATE_BEFORE = re.compile(r"(?:제|법률|약|총|금|각|중|제목|호|조|항|권|말|위안|약간)$")
_DATE = r"(?:\d{4}|\d{2})[ \n]{0,3}[-./년][ \n]{0,3}\d{1,2}[ \n]{0,3}[-./월][ \n]{0,3}\d{1,2}(?:[ \n]{0,2}일|\.)?(?!\d)"
_MONTH = r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]{0,6}"
_BORN = re.compile(rf"(?:생년월일|출생연월일|출생일|생일|Date of [Bb]irth|date of birth|DATE OF BIRTH|DOB|D\.O\.B\.|dob|Birth ?[Dd]ate|birth ?date|Birthday|birthday|Born(?: on)?|born(?: on)?)(?:은|는|이|\(양력\)|\(음력\))?[ \n:=|\-,(]{{0,5}}(?:is |on |was )?"
                   rf"(?P<date>{_DATE}|\d{{8}}(?!\d)|\d{{6}}(?![\d-])|\d{{1,2}}[-./ ]\d{{1,2}}[-./ ](?:\d{{4}}|\d\d)(?!\d)|{_MONTH}\.? \d{{1,2}}(?:st|nd|rd|th)?,? \d{{4}}|\d{{1,2}}(?:st|nd|rd|th)? {_MONTH}\.?,? \d{{4}})")
_LICENCE_KOREAN = re.compile(rf"[서부대인광울경강충전제](?<![가-힣].){S}[울산구천주기원북남전]{_GAP}{digits(2)}{S}-{S}{digits(6)}{S}-{S}{digits(2)}(?!\d|-\d)")


def find(text: str) -> Iterator[Span]:
    """Everything of this file in a normalised text that has a digit."""
    for match in _PASSPORT.finditer(text):
        around = Around(text, *match.span())
        if around.labelled(kinds.PASSPORT) >= 0:
            yield Span(*match.span(), kinds.PASSPORT, 0.98)
        elif match[0][0].isupper() and " " not in match[0] and "\n" not in match[0] and not around.is_another():
            yield Span(*match.span(), kinds.PASSPORT, 0.7)
    if "ass" in text or "ASS" in text:
        yield from (Span(*match.span("number"), kinds.PASSPORT, 0.95) for match in _PASSPORT_ABROAD.finditer(text))
    if "ri" in text or "RI" in text or "DL" in text:
        yield from (Span(*match.span("number"), kinds.DRIVER, 0.95) for match in _LICENCE.finditer(text))
    yield from (Span(*match.span(), kinds.DRIVER, 0.95) for match in _LICENCE_KOREAN.finditer(text))
    for match in _NINO.finditer(text):
        if match[0][:2] not in _NOT_NINO and not Around(text, *match.span()).is_another():
            yield Span(*match.span(), kinds.NINO, 0.95)
    if "NI" in text or "nsurance" in text:
        yield from (Span(*match.span("number"), kinds.NINO, 0.9) for match in _NINO_LABELLED.finditer(text))
    for match in _PLATE_UK.finditer(text):
        around = Around(text, *match.span())
        if 0 <= around.labelled(kinds.PLATE) <= 12 or around.labelled_after(kinds.PLATE, 16):
            yield Span(*match.span(), kinds.PLATE, 0.85)
    for match in _IBAN.finditer(text):
        yield from _iban(match)
    yield from plates(text)
    yield from (Span(*match.span("date"), kinds.BIRTH, 0.95) for match in _BORN.finditer(text))


def _iban(match: re.Match) -> Iterator[Span]:
    """Words in capitals may follow without a break: the longest part with the right check digits is it."""
    raw, length = match[0], len(match[0])
    while length >= 15:
        value = "".join(raw[:length].split())
        if 15 <= len(value) <= 34 and checks.iban(value) and (length == len(raw) or not raw[length].isalnum()):
            yield Span(match.start(), match.start() + length, kinds.ACCOUNT, 0.98)
            return
        length = len(raw[:length - 1].rstrip())


def plates(text: str) -> Iterator[Span]:
    for match in _PLATE.finditer(text):
        around = Around(text, *match.span())
        start = match.start()
        area = _AREA.search(text, max(0, start - 8), start)
        said = around.labelled(kinds.PLATE) >= 0 or around.labelled_after(kinds.PLATE, 8)
        if area:
            start = area.start()
        elif start and (text[start - 1].isalnum() or text[start - 1] in "-/") and not said:
            continue
        if not (area or said):
            if _UNIT.match(text, match.end()) or _PLATE_BEFORE.search(around.before) or around.is_another():
                continue
            blank = text[match.start("use") - 1] in " \n" or text[match.end("use")] in " \n"
            if match["use"] in "육해공국합" or match["use"] in _WORDS and blank:
                continue
        yield Span(start, match.end(), kinds.PLATE, 0.97 if said or area else 0.8)
    for match in _DIPLOMAT.finditer(text):
        yield Span(*match.span(), kinds.PLATE, 0.85)
