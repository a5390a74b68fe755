"""Tables in text: rows whose first line names the columns (성명 | 주민등록번호 | 연락처, or CSV, or tabs). A cell is read behind the name of its column.

All cells of columns that are announced are put behind one another, each behind its label, as one text that the recognisers read once; what they find there is
brought back. A column of names is taken at its word: what stands in it alone, and could be a name, is one.
"""
import re
from collections.abc import Callable, Iterable, Iterator

from megatron_ext.curate.privacy import kinds
from megatron_ext.curate.privacy.spans import Span

_NAMES = re.compile(r"(?:성명|성함|[가-힣]{2,4}인성명|학생명|환자명|직원명|사원명|회원명|고객명|강사명|신청인|신청자|민원인|예금주|대표자|보호자|세대주|피보험자|임차인|임대인|수급자|수령인|배우자|"
                    r"full ?name|employee ?name|patient ?name|customer ?name|student ?name|first ?name|last ?name|surname|patient|applicant|tenant|employee)")
_PERHAPS = re.compile(r"(?:이름|담당자|담당|작성자|참석자|name|contact|manager)")  # of things, too, unless another column is a person's
_COLUMNS = (
    (re.compile(r"주민(?:등록)?번호|rrn|resident ?(?:registration ?)?(?:no|number)"), "주민등록번호: "), (re.compile(r"외국인등록번호"), "외국인등록번호: "),
    (re.compile(r"생년월일|생일|출생일|dob|date ?of ?birth|birth ?date|birthday"), "생년월일: "),
    (re.compile(r"(?:휴대|자택|직장|유선|대표|긴급)?(?:전화|연락처|폰|핸드폰)(?:번호)?|휴대폰(?:번호)?|팩스(?:번호)?|(?:home |work |mobile |cell )?(?:phone|tel|telephone|mobile|cell|fax)(?: ?(?:no|number))?"), "전화: "),
    (re.compile(r"(?:환불|입금|지급|급여)?계좌(?:번호)?|account(?: ?(?:no|number))?"), "계좌번호: "), (re.compile(r"(?:신용)?카드(?:번호)?|card(?: ?(?:no|number))?"), "카드번호: "),
    (re.compile(r"(?:자택|현|등록|배송지|거주지)?주소(?:지)?|거주지|소재지|본적"), "주소: "), (re.compile(r"(?:home |street |mailing )?address"), "address: "), (re.compile(r"여권번호|passport(?: ?(?:no|number))?"), "passport number "),
    (re.compile(r"(?:운전)?면허번호"), "운전면허 "), (re.compile(r"차량번호|차번호|vehicle|plate"), "차량 "), (re.compile(r"사업자(?:등록)?번호"), "사업자번호 "),
    (re.compile(r"e-?mail(?: ?address)?|이메일|메일|전자우편"), "mail: "), (re.compile(r"ssn|social ?security(?: ?(?:no|number))?"), "SSN "), (re.compile(r"ni(?:no)?(?: ?number)?|national ?insurance(?: ?(?:no|number))?"), "National Insurance number "),
    (re.compile(r"ip(?: ?(?:주소|address))?|접속ip"), "IP "),
)
_SENTENCE = re.compile("[0-9?!]")
_CELL = re.compile(r'"[^"\n]{0,400}"|[^,\n"]{0,400}')
_NAME = re.compile(r"[가-힣]{2,5}|[가-힣](?: {1,3}[가-힣]){1,3}|[^\W\d_가-힣][^\W\d_가-힣]{0,20}(?:['.-][^\W\d_가-힣]{1,20}){0,2}\.?(?:,? [^\W\d_가-힣][^\W\d_가-힣]{0,20}(?:['.-][^\W\d_가-힣]{1,20}){0,2}\.?){0,4}")
_NO_NAME = frozenset("합계 소계 총계 평균 없음 미정 해당없음 비고 성명 이름 성함 기타 비공개 익명 미상 공석 Total Sum None Name Average Unknown Various Other".split())
_WIDE, _ROW, _MOST = 26, 4000, 60  # characters of a column's name and of a row, columns
_APART = "\n" * 8  # more than any pattern goes over


def find(text: str, tabbed: str, read: Callable[[str], Iterable[Span]]) -> Iterator[Span]:
    """Spans of cells in a normalised text; `tabbed` is the same text with tabs where they were; `read` are the other recognisers."""
    parts, places, at = [], [], 0
    for label, start, end in _cells(tabbed):
        if label is None:
            if (match := _NAME.fullmatch(text, start, end)) and match[0] not in _NO_NAME:
                yield Span(start, end, kinds.PERSON, 0.9)
                continue
            label = "성명: "
        part = f"{label}{text[start:end]}{_APART}"
        parts.append(part)
        places.append((at + len(label), start, end))
        at += len(part)
    if not parts:
        return
    waiting = iter(places)
    begin, start, end = next(waiting)
    for span in sorted(read("".join(parts))):
        while span.start >= begin + end - start:
            if (place := next(waiting, None)) is None:
                return
            begin, start, end = place
        first, last = max(span.start, begin), min(span.end, begin + end - start)
        if first < last:
            yield Span(first - begin + start, last - begin + start, span.kind, span.score)


def _cells(text: str) -> Iterator[tuple[str | None, int, int]]:
    """(label, start, end) of the cells that hold something, in columns that are announced; label None = a name."""
    signs, begin = [sign for sign in "|\t,;" if sign in text], 0
    while signs and (end := text.find("\n", begin)) >= 0:
        number, sign = max((text.count(sign, begin, end), sign) for sign in signs)
        # Headers are short and no sentences.
        if not 0 < number < _MOST or end - begin > _WIDE * (number + 1) or sign == "," and (text[end - 1] in ",." or ". " in text[begin:end]) or _SENTENCE.search(text, begin, end):
            begin = end + 1
            continue
        following = text.find("\n", end + 1)
        if text.count(sign, end + 1, min(len(text) if following < 0 else following, end + _ROW)) < number:
            begin = end + 1
            continue
        columns = [_squeezed(text[a:b]) for a, b in _split(text, begin, end, sign)]
        labels = _labels(columns)
        if not labels:
            begin = end + 1
            continue
        while end >= 0:
            begin, end = end + 1, text.find("\n", end + 1)
            stop = len(text) if end < 0 else end
            if stop - begin > _ROW or text.count(sign, begin, stop) < len(columns) - 1:
                break
            cells = _split(text, begin, stop, sign)
            if len(cells) != len(columns):
                break
            for number, label in labels.items():
                a, b = cells[number]
                if a < b:
                    yield label, a, b
        if end < 0:
            return


def _labels(columns: list[str]) -> dict[int, str | None]:
    """Number of a column -> its label."""
    found: dict[int, str | None] = {}
    for number, column in enumerate(columns):
        label = next((label for pattern, label in _COLUMNS if pattern.fullmatch(column)), None)
        if label is not None:
            found[number] = label
    persons = bool(found)
    for number, column in enumerate(columns):
        if _NAMES.fullmatch(column) or persons and _PERHAPS.fullmatch(column):
            found[number] = None
    return found


def _squeezed(column: str) -> str:
    column = " ".join(column.lower().split())
    return column if column.isascii() else column.replace(" ", "")


def _split(text: str, begin: int, end: int, sign: str) -> list[tuple[int, int]]:
    """Places of the cells of a line, without blanks and quotes around them."""
    found, at = [], begin
    while at <= end:
        if sign == "," and (quoted := _CELL.match(text, at, end)):
            stop = quoted.end() if quoted.end() == end or text[quoted.end()] == sign else text.find(sign, at, end)
        else:
            stop = text.find(sign, at, end)
        stop = end if stop < 0 else stop
        a, b = at, stop
        while a < b and text[a] in ' "':
            a += 1
        while b > a and text[b - 1] in ' "':
            b -= 1
        found.append((a, b))
        at = stop + 1
    return found
