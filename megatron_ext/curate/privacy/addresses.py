"""Korean addresses: by road (서울특별시 강남구 테헤란로 152, 3층) and by lot (역삼동 737-32번지).

The anchor is a syllable that ends a road or a quarter, with a number behind it. From there the words are read backwards for as long as they are parts of an
address (…동, …읍, …구, …시, a province), and forwards over house, floor, room and what stands in brackets. How many parts were found decides. The blanks
that random spacing puts into words (강남 구) are joined.
"""
import re
from collections.abc import Iterator

from megatron_ext.curate.privacy import kinds
from megatron_ext.curate.privacy.context import REACH, S, _tight
from megatron_ext.curate.privacy.places import NOT_QUARTERS, NOT_STREETS, PARTICLES, PROVINCES, STREET_LABEL
from megatron_ext.curate.privacy.spans import Span

_ANCHOR = re.compile(rf"[로길동리가읍면](?:(?<=[로길])(?P<branch>{S}\d{{1,4}}(?:{S}[가나다라마바사아])?{S}(?:번{S})?[길로])?{S}(?:,{S})?(?:지{S}하{S})?(?P<number>(?:\d(?:[ ]\d){{1,3}}(?![ ]?[층동호\d])|\d{{1,4}})(?:{S}-{S}\d{{1,3}})?)(?![\d])"
                     rf"|(?<=[동리가읍면])(?P<hill>{S}산)?{S}(?P<lot>\d(?:{S}\d){{0,3}}(?:{S}-{S}\d{{1,4}}|{S}의{S}\d{{1,3}})?)(?P<word>{S}번{S}지)?(?![\d]))")
_AFTER_NUMBER = re.compile(r" ?(?:년|월|원|억|만|천|백|명|개|%|퍼센트|회|건|㎡|km|kg|~ ?\d)|(?:일(?!동)|세|조|항|시(?!동)|분|초|쪽|k|m|톤|평|가구|여|배|차|위|종|인|대(?=[ 의를가])|단계|단지의|가지|곳|번째|점|급|,\d|\.\d|/\d|:\d|~)")
_DETAIL = re.compile(
    rf"(?:{S},?{S}(?:"
    rf"\([^()\n]{{1,40}}(?:\n[^()\n]{{1,30}})?\)"  # (역삼동, 한빛아파트)
    rf"|(?:지{S}하|제|B|비)?{S}\d(?:{S}\d){{0,3}}{S}[동호층](?:실|(?=[^가-힣]|에|의|으로|로|은|는|이|가|을|를|입|이|,|\Z))"  # 101동 1203호
    rf"|\d{{1,4}}-\d{{1,4}}(?![-\d])(?:호)?"
    rf"|[A-Za-z가나다라마]{S}동(?=[ \n]?\d)"
    rf"|[가-힣A-Za-z0-9]{{1,14}}(?:아파트|빌라|빌딩|타워|오피스텔|맨션|연립|주택|하이츠|팰리스|파크|타운|마을|단지|센터|프라자|플라자|상가|빌|캐슬|자이|푸르지오|래미안|힐스테이트|원룸|고시원|기숙사|하우스)(?:{S}\d{{1,2}}(?:차|단지))?"
    rf"|[가-힣A-Za-z0-9]{{2,14}}{S},?{S}(?=(?:제)?\d{{1,4}}동{S}\d{{1,4}}호|\d{{1,4}}동{S}제?\d|\d{{1,4}}호)"  # a name before 101동 1203호
    rf")){{1,6}}")
_PART = re.compile(r"[가-힣][가-힣0-9]{0,7}(?:특별자치도|특별자치시|특별시|광역시|도|시|군|구|읍|면|동|리|가)$")
_ROAD = re.compile(r"[가-힣0-9](?:[가-힣0-9·.]){0,24}$")
_GLUED = re.compile(r"(?P<province>서울|부산|대구|인천|광주|대전|울산|세종|경기|강원|충북|충남|충청북|충청남|전북|전남|전라북|전라남|경북|경남|경상북|경상남|제주)(?:특별자치시|특별자치도|특별시|광역시|시|도)?"
                    r"(?P<rest>[가-힣0-9]{2,24})$")
_GLUED_PARTS = re.compile(r"(?:[가-힣]{1,4}[시군])?(?:[가-힣]{1,4}구)?(?:[가-힣]{1,4}[읍면])?(?P<last>[가-힣0-9]{1,12})$")
_ENDINGS = frozenset("도시군구읍면동리가로길")
_LABEL = re.compile(STREET_LABEL)
_WORDS_BEFORE = re.compile(r"[^\s,()\[\]:;\"'<>/|=]+")
_POSTCODE = re.compile(rf"(?<!\d)(?<!\d-)(?:우{S}(?:편번호)?{S}[:)]?{S})?[(\[]?{S}(?:우{S})?\d(?:{S}\d){{4}}{S}[)\]]?{S},?{S}$")
_SITE = re.compile(rf"(?:{STREET_LABEL})(?:은|는)?[ \n]{{0,2}}[:=|]?[ \n]{{0,3}}(?P<place>(?:{'|'.join(sorted(PROVINCES, key=len, reverse=True))})(?:[ \n]{{1,3}}[가-힣]{{1,5}}[시군구읍면동리]){{1,4}})(?![가-힣])")
_LEFT = 72  # characters before the anchor's syllable


def find(text: str) -> Iterator[Span]:
    """Everything of this file in a normalised text."""
    at = 0
    while match := _ANCHOR.search(text, at):
        span = _read(text, match)
        at = span.end if span else match.start() + 1
        if span:
            yield span
    for match in _SITE.finditer(text):
        yield Span(*match.span("place"), kinds.ADDRESS, 0.75)


def _read(text: str, match: re.Match) -> Span | None:
    road = match["number"] is not None
    if match.start() == 0 or not (text[match.start() - 1].isalnum() or text[match.start() - 1] in " \n"):
        return None
    group = "number" if road else "lot"
    end = match.end()
    number = match[group]
    if _AFTER_NUMBER.match(text, end):
        return None
    words, start = _backwards(text, match.start() + 1)
    if not words:
        return None
    last = words[-1]
    score = _score(words, last, road, match)
    if score <= 0:
        before = _tight(text[max(0, start - REACH):start])
        if len(last) < 2 or last in NOT_STREETS or last in NOT_QUARTERS or last.endswith(PARTICLES) or not _LABEL.search(before[-14:]):
            return None
        score = 0.7 if road or "-" in number or match["word"] or match["hill"] else 0
        if not score:
            return None
    if detail := _DETAIL.match(text, end, end + 160):
        end = detail.end()
    if post := _POSTCODE.search(text, max(0, start - 16), start):
        start = post.start()
    while text[start] in " \n,":
        start += 1
    while text[end - 1] in " \n,":
        end -= 1
    return Span(start, end, kinds.ADDRESS, score)


def _score(words: list[str], last: str, road: bool, match: re.Match) -> float:
    """Of what was read: a province, parts below it, and how much the number looks like a house's."""
    parts, province = len(words) - 1, words[0] in PROVINCES
    if (glued := _GLUED.match(last)) and len(last) > 5 and (inner := _GLUED_PARTS.match(glued["rest"])) and len(inner["last"]) < len(glued["rest"]):
        parts, province, last = parts + 2, True, inner["last"]
    if road:
        if last in NOT_STREETS or len(last) < 2 or last.endswith(PARTICLES):
            return 0
        if match["branch"]:
            return 0.95 if parts else 0.85
        return 0.95 if province and parts >= 2 else 0.9 if parts >= 2 else 0.8 if parts else 0
    if last in NOT_QUARTERS and not (province and parts >= 2) or len(last) < 2:
        return 0
    lot = "-" in match["lot"] or match["word"] is not None or match["hill"] is not None or "의" in match["lot"]
    if last[-1] in "읍면" and not lot and not (province and parts >= 2):
        return 0
    if parts >= 2 or province and parts:
        return 0.9 if lot else 0.75 if province or parts >= 2 else 0
    if parts:
        return 0.85 if lot else 0.55 if last[-1] in "동리" else 0
    return 0.7 if match["word"] or lot and last[-1] == "동" and len(match["lot"].partition("-")[0]) >= 2 and len(last) >= 3 else 0


def _backwards(text: str, end: int) -> tuple[list[str], int]:
    """The words of an address that end at `end`, in the order of the text, and where the first begins. The last one is the road or quarter."""
    left = max(0, end - _LEFT)
    found = [(match[0], left + match.start()) for match in _WORDS_BEFORE.finditer(text[left:end])]
    if not found or found[-1][1] + len(found[-1][0]) != end:
        return [], end
    words: list[str] = []
    start, word, over = end, "", False
    next_at = end
    for piece, at in reversed(found):
        gap = text[at + len(piece):next_at]
        if words and (len(gap) > 4 or gap.strip(" \n,")):
            break
        word = piece + word
        next_at = at
        if len(word) == 1 and word in _ENDINGS:  # 강남 구: its word stands before
            continue
        if not words:
            if not _ROAD.match(word) or word[-1] not in _ENDINGS:
                return [], end
        elif len(words) == 1 and not over and len(word) > 2 and _ROAD.match(word) and word.endswith(("로", "길")) and word not in NOT_STREETS:
            over, word = True, ""  # 동탄대로 시범길 133: of an address if a part of one stands before
            continue
        elif word not in PROVINCES and not _PART.match(word) or len(word) > 14:
            break
        words.append(word)
        start, word = at, ""
        if words[-1] in PROVINCES and len(words) > 1 or len(words) > 6:
            break
    words.reverse()
    return words, start
