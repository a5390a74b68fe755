"""What stands around a candidate: the words by which a number says what it is.

Words are looked for in lower case and without the spaces beside Hangul, so that "주민 등록\\n번호 :" is 주민등록번호.
"""
import functools
import re

from megatron_ext.curate.privacy import kinds

S = "[ \n]{0,3}"  # what random spacing and wrapped lines put between two characters
REACH = 32  # characters


def digits(least: int, most: int | None = None) -> str:
    """A pattern of so many digits with such noise between them."""
    return rf"\d(?:{S}\d){{{least - 1},{(most or least) - 1}}}"


_LABELS = {
    kinds.RRN: r"주민(?:등록)?(?:번호)?|주민번호|주민증|\brrn\b|resident ?reg",
    kinds.FRN: r"외국인(?:등록)?(?:번호|증)|거소(?:신고)?(?:번호|증)|alien ?reg|foreigner ?reg|\barc(?: ?no| ?number| ?#)?\b|\bfrn\b",
    kinds.BUSINESS: r"사업자(?:등록)?(?:번호|증)?|business ?reg|tax ?id|\bbrn\b",
    kinds.CORPORATE: r"법인(?:등록)?(?:번호)|corporate ?reg|corporation ?no",
    kinds.DRIVER: r"운전면허|면허(?:증|번호|no)|driver'?s? ?licen[cs]e|driving ?licen[cs]e|\bdl(?: ?no| ?number| ?#)?\b",
    kinds.PASSPORT: r"여권|旅券|passport",
    kinds.PHONE: r"전화|연락|휴대|핸드폰|폰(?:번호|:|은|$)|통화|직통|내선|팩스|문의|문자|모바일|무선|유선|자택|카톡|☎|☏|✆|📞|📱|\btel|phone|mobile|\bcell|\bfax|\bcall|\bcontact|"
                 r"\b(?:my|his|her|our|their|your) (?:new )?number|\bhp\b|\bh\.p|\btext(?: me)? (?:at|on)|reach|\bdial|\bring|\bt:|\bm:|whatsapp|sms",
    kinds.ACCOUNT: r"계좌|입금|송금|이체|예금주|환불|통장|은행|농협|수협|신협|축협|새마을|우체국|저축|뱅크|카뱅|(?:국민|신한|우리|하나|기업|제일|씨티|외환|토스|카카오)(?:은행)?[ :]?$|증권|계번|납부처|\bacc(?:oun)?t|\ba/c|\biban|\bbank|sort ?code|routing|\baba\b|wire",
    kinds.CARD: r"카드|card|\bvisa|master|\bamex|결제|신용|체크",
    kinds.PLATE: r"차량|번호판|차번|자동차|승용차|화물차|승합차|트럭|택시|버스|차종|주차|견인|차주|등록차|차를|차가|차는|plate|vehicle|registration|\bcar\b|\bvan\b|parked|towed",
    kinds.IP: r"\bip(?:v[46])?|아이피|서버|접속|호스트|네트워크|게이트웨이|방화벽|단말|로그인|\bhost|\bdns|gateway|server|firewall|address|login|from|subnet|router",
    kinds.SSN: r"\bssn|social ?security|사회보장|\bitin\b|taxpayer ?id|\btin\b",
    kinds.NHS: r"\bnhs",
}
_LABEL = {kind: re.compile(pattern) for kind, pattern in _LABELS.items()}
# Numbers that say themselves that they are something else.
_OTHERS = re.compile(
    r"isbn|issn|doi:?|바코드|barcode|\bean\b|\bupc\b|\bgtin|운송장|송장|주문|발주|품번|품목|모델|제품|부품|일련|시리얼|문서번호|접수번호|사건번호|공고번호|고시번호|(?:공고|고시|법률|조례|훈령|예규|의안)제?$|관리번호|승인번호|인증번호|계약번호|견적|특허|출원|"
    r"디자인|상표|의안번호|청구번호|처리번호|자산번호|버전|serial|\bs/n|order|invoice|tracking|model|\bpart|\bsku|\blot\b|patent|docket|\bcase|version|firmware|\bver\b|"
    r"build|ticket|reference|\bref\b|item|catalog|asset|batch|release|commit|\bpo\b|shipment|parcel|bill")
_FILLER = re.compile(r"(?:[ :=#|(\[,.\-]|번호|number|num\b|no\b|은|는|이|is\b|at\b|on\b)*$")
_SPACES = re.compile(r"[ \n]+")
_BESIDE_HANGUL = re.compile(r"(?<=[가-힣]) | (?=[가-힣])")


class Around:
    """The surroundings of one candidate in a normalised text, looked at when asked."""

    __slots__ = ("_before", "end", "start", "text")

    def __init__(self, text: str, start: int, end: int):
        self.text, self.start, self.end = text, start, end
        self._before: str | None = None

    @property
    def before(self) -> str:
        """Up to 32 characters before, tight."""
        if self._before is None:
            self._before = _tight(self.text[max(0, self.start - REACH):self.start])
        return self._before

    def after(self, reach: int = 16) -> str:
        return _tight(self.text[self.end:self.end + reach])

    def labelled(self, kind: str) -> int:
        """Characters between the last word that announces `kind` and the candidate, without mere fillers (번호는, number is). -1: there is none."""
        return _behind(kind, self.before)

    def labelled_after(self, kind: str, reach: int = 16) -> bool:
        return _LABEL[kind].search(self.after(reach)) is not None

    def is_another(self) -> bool:
        """A number that is announced as a serial, an order, an ISBN, ..."""
        last = None
        for last in _OTHERS.finditer(self.before):
            pass
        return last is not None and len(self.before) - last.end() <= 12


@functools.lru_cache(maxsize=4096)
def _behind(kind: str, before: str) -> int:
    """Judges of several patterns ask for the same; and so do the rows of a table."""
    last = -1
    for match in _LABEL[kind].finditer(before):
        last = match.end()
    return last if last < 0 else max(0, _FILLER.search(before).start() - last)


def _tight(text: str) -> str:
    """Lower case, single spaces, none beside Hangul."""
    text = _SPACES.sub(" ", text.lower())
    return text if text.isascii() else _BESIDE_HANGUL.sub("", text)


def nearest(around: Around, candidates: tuple[str, ...]) -> str | None:
    """The kind of these whose word stands nearest before the candidate."""
    best, at = None, REACH + 1
    for kind in candidates:
        if 0 <= (distance := around.labelled(kind)) < at:
            best, at = kind, distance
    return best
