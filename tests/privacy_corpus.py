"""A labelled test set for de-identification: sentences with values of privacy_values.py in them, and sentences that hold none but look as if. Deterministic.

    for item in corpus(seed=1, rounds=40): item.text, item.spans     # spans: (start, end, kind)

`noise` writes structured values as people and machines spoil them: full-width digits, other hyphens, blanks at random, wrapped lines, invisible characters.
Shares no pattern and no list of words with megatron_ext/curate/privacy.
"""
import re
from dataclasses import dataclass
from random import Random

import privacy_values as make

MAKERS = {
    "RRN": (make.rrn, "KR_RRN"), "FRN": (make.frn, "KR_FRN"), "PASS": (make.passport_ko, "PASSPORT"), "LIC": (make.driver_ko, "DRIVER_LICENCE"), "BIZ": (make.business, "KR_BUSINESS"), "CORP": (make.corporate, "KR_CORPORATE"),
    "TEL": (make.phone_ko, "PHONE"), "TELW": (make.spelt_phone, "PHONE"), "ACC": (make.account_ko, "BANK_ACCOUNT"), "CARD": (make.card, "CARD"), "CAR": (make.plate, "PLATE"), "IP": (make.ip, "IP"), "MAIL": (make.mail, "EMAIL"),
    "NAME": (make.name_ko, "PERSON"), "ADDR": (make.address_ko, "ADDRESS"), "BANK": (lambda rng: rng.choice(make.BANKS), None),
    "ENAME": (make.name_en, "PERSON"), "EADDR": (make.address_en, "ADDRESS"), "USTEL": (make.phone_us, "PHONE"), "UKTEL": (make.phone_uk, "PHONE"), "SSN": (make.ssn, "US_SSN"), "NINO": (make.nino, "UK_NINO"), "NHS": (make.nhs, "UK_NHS"),
    "SORT": (lambda rng: "-".join(make.digits(rng, 2) for _ in range(3)), "BANK_ACCOUNT"), "IBAN": (make.iban, "BANK_ACCOUNT"), "USPASS": (lambda rng: make.digits(rng, 9), "PASSPORT"), "USLIC": (lambda rng: rng.choice("ABDFKMS") + make.digits(rng, 7), "DRIVER_LICENCE"), "USACC": (lambda rng: make.digits(rng, rng.choice([8, 10, 12])), "BANK_ACCOUNT"),
    "N": (lambda rng: str(rng.randrange(2, 99)), None), "NN": (lambda rng: str(rng.randrange(100, 9999)), None), "Y": (lambda rng: str(rng.randrange(1950, 2027)), None),
    "M": (lambda rng: str(rng.randrange(1, 13)), None), "D": (lambda rng: str(rng.randrange(1, 29)), None), "D4": (lambda rng: make.digits(rng, 4), None), "D6": (lambda rng: make.digits(rng, 6), None),
    "P": (lambda rng: f"{rng.randrange(1, 999):,}".replace(",", "") + "," + make.digits(rng, 3) + rng.choice(["", "," + make.digits(rng, 3)]), None),
}
KOREAN = """신청인의 주민등록번호는 {RRN}입니다.
{NAME}({RRN}) 씨가 민원을 접수하였다.
주민번호 {RRN}, 연락 가능한 번호 {TEL}
제출 서류에 적힌 번호 {RRN}를 확인하여 주시기 바랍니다.
외국인등록번호: {FRN} (체류자격 F-4)
거주 외국인 {FRN}의 체류기간을 연장함
여권번호 {PASS}로 출국한 기록이 있습니다.
여권 사본을 첨부합니다. 번호는 {PASS} 입니다.
운전면허번호는 {LIC}이고 갱신일이 지났습니다.
면허증({LIC})을 분실하여 재발급을 신청합니다.
사업자등록번호 {BIZ}인 업체에 대금을 지급하였다.
공급자: 주식회사 가나다 ({BIZ})
법인등록번호 {CORP}의 등기부를 열람함
문의사항은 {TEL}로 연락 바랍니다.
휴대전화 {TEL} / 이메일 {MAIL}
담당 부서 전화는 {TEL}, 팩스는 {TEL}입니다.
제 번호 {TEL}인데 문자 주세요
급하면 {TEL} 여기로 전화해
연락처: {TELW}
직거래만 합니다 {TELW} 카톡 주세요
{MAIL}로 자료를 보내 주시면 검토하겠습니다.
답변은 {MAIL} 앞으로 회신 바랍니다.
{BANK} {ACC} (예금주 {NAME})으로 입금해 주세요.
환불 계좌: {BANK} {ACC}
{ACC} {BANK} 계좌로 이체하였습니다.
결제 카드번호 {CARD}, 유효기간 {N}/{N}
카드 {CARD} 승인이 거절되었습니다.
차량번호 {CAR} 소유자는 즉시 이동 주차 바랍니다.
{CAR} 차량이 불법 주차되어 견인하였음
접속 IP {IP}에서 비정상 로그인이 확인됨
서버 주소는 {IP} 이고 포트는 8080입니다.
주소: {ADDR}
저는 {ADDR}에 살고 있습니다.
배송지는 {ADDR}입니다.
본 사업장은 {ADDR}에 위치하고 있다.
{ADDR}로 이사한 지 {N}년이 되었다.
{ADDR} 소재 건물의 임대차 계약
성명: {NAME}
성    명 : {NAME}     생년월일 : 비공개
담당자 {NAME} 주무관에게 문의하시기 바랍니다.
{NAME} 의원이 대표발의한 법률안이다.
{NAME} 교수는 이번 연구의 책임을 맡았다.
피고인 {NAME}은 공소사실을 모두 인정하였다.
원고 {NAME}, 피고 {NAME} 사이의 손해배상 사건
환자 {NAME}님의 검사 결과를 안내드립니다.
어제 {NAME} 씨를 만나 이야기를 나누었다.
{NAME} 선생님께서 아이를 잘 지도해 주셨어요.
참석자는 {NAME}, {NAME}, {NAME} 등 3명이다.
발의자 : {NAME}·{NAME}·{NAME}·{NAME} 의원
위원장 {NAME}은 개회를 선언하였다.
{NAME} 학생이 전국 대회에서 상을 받았다.
보호자 {NAME} ({TEL})
받는 사람: {NAME}, {ADDR}
{NAME}에게 {TEL}로 전화하니 받지 않았다.
제 이름은 {NAME}이고 올해 {N}살입니다.
고객 {NAME}님, 주문하신 상품이 {ADDR}(으)로 발송되었습니다.
{NAME} 팀장이 {MAIL}로 회의록을 공유했습니다.
작성자 {NAME} (전화 {TEL})
{NAME}이 학교를 그만두었다는 소식을 들었다.
친구 {NAME}가 어제 결혼했다.
대표이사 {NAME} 는 {Y}년에 회사를 세웠다.
{NAME} 할머니는 {ADDR}에서 혼자 지내신다.
수험번호 {D4}, 성명 {NAME}, 연락처 {TEL}
세대주 {NAME}와 배우자 {NAME}의 혼인관계증명서
경찰은 {NAME}(47)를 구속했다고 밝혔다.
기자 {NAME} {MAIL}""".split("\n")
ENGLISH = """My name is {ENAME} and I live at {EADDR}.
Please call {ENAME} at {USTEL} before noon.
Patient: {ENAME}, SSN {SSN}
Her social security number is {SSN}.
Employee {ENAME} ({SSN}) started in {Y}.
You can reach me on {UKTEL} or by email at {MAIL}.
Dr. {ENAME} will see you on Monday.
Dear {ENAME},
Contact: {ENAME}, {USTEL}
Send the form to {EADDR}.
The tenant at {EADDR} has moved out.
National Insurance number: {NINO}
His NI number {NINO} is on the payslip.
NHS number {NHS} was recorded for the referral.
Passport No. {USPASS}
Driver's license number {USLIC} expired last year.
Please pay into IBAN {IBAN} within {N} days.
Account number {USACC}, sort code {SORT}
Visa card {CARD} was declined.
The request came from {IP} at 10:42:07.
Write to {MAIL} for details.
{ENAME} wrote to the council in {Y}.
Signed, {ENAME}
Sincerely,
{ENAME}
The witness, {ENAME}, said nothing.
{ENAME} and {ENAME} were present at the meeting.
According to {ENAME}, the road was closed.
Attn: {ENAME}
{EADDR}
Phone: {USTEL} Fax: {USTEL}
Text me: {USTEL}
Mrs. {ENAME} has lived at {EADDR} since {Y}.
Defendant {ENAME} was represented by {ENAME}.
Emergency contact: {ENAME} ({USTEL})
The caller left the number {UKTEL}.""".replace("Sincerely,\n", "Sincerely,\\n").replace("Attn: {ENAME}\n", "Attn: {ENAME}\\n").split("\n")
# No personal data at all.
NEGATIVE = """법률 제{D4}호 일부개정 {Y}. {M}. {D}.
제{N}조제{M}항제{D}호에 따라 과태료를 부과한다.
대통령령 제{D6}호, {Y}. {M}. {D}., 타법개정
이 법은 {Y}년 {M}월 {D}일부터 시행한다.
총사업비 {P}원 중 국비 {P}원을 지원한다.
가격은 {P}원이며 배송비 {N}00원은 별도입니다.
ISBN 978-89-{D4}-{N}{D}-{M}
ISBN 979-11-{D6}-{M}-{D}
{Y}헌마{NN} 전원재판부 결정
서울중앙지방법원 {Y}가합{D6} 판결
문서번호 총무과-{D4}({Y}. {M}. {D}.)
특허 제10-{D6}{M}호
인구는 {P}명으로 전년보다 {N}.{M}% 늘었다.
{Y}년 {M}월 {D}일 오후 {M}시 {N}분에 시작한다.
버전 {M}.{D}.{N}.{D}로 올려 주세요.
경기도 예산은 12조 {D4}억원이다.
임진왜란은 1592-1598년에 일어났다.
점수는 {N}-{N}로 끝났다.
위도 37.{D6}, 경도 127.{D6}
이번 주 정부는 고용 정책을 발표했다.
주민은 조례의 제정을 청구할 수 있다.
신청인은 서류를 제출하여야 한다.
고객님의 의견을 소중히 생각합니다.
담당자는 접수증을 교부하여야 한다.
피고인은 무죄로 추정된다.
환자의 권리를 존중한다.
이사회는 정관을 변경할 수 있다.
서울특별시와 부산광역시의 인구를 비교하였다.
강남구 3개 동에서 시범 운영한다.
도로 10곳을 보수하고 앞으로 5년간 관리한다.
운동 3세트, 활동 5가지를 기록한다.
한국은행은 기준금리를 {M}.{N}%로 동결했다.
전기차 {N}대와 수소버스 {D}대를 도입한다.
조사 대상은 전국 {NN}가구이다.
이 제품은 {N}주 {D4}원에 판매된다.
운송장 번호 {D4}-{D4}-{D4}
주문번호 {Y}{D6}{D6}
표 {M}.{D} 참조, 그림 {M}-{D}
면적은 {NN}㎡이고 높이는 {N}m이다.
고려 시대의 문화와 조선 후기의 사상을 배운다.
우리 민족의 전통을 이어 가자.
봄이 오면 강가에 꽃이 핀다.
선생님이 학생에게 문제를 냈다.
남자 친구가 여행을 가자고 했다.
안녕하세요 반갑습니다
정말 고민이 많아요.
하루 {N}회, {M}주 동안 복용한다.
코드 {D4}-{D6} 오류가 발생했습니다.
The act of {Y} was amended on {M}/{D}/{Y}.
Section {N}.{M} of the Housing Act applies.
The price is ${P}.{N} per unit.
ISBN 0-306-40615-2
Order number {Y}{D6}{D6} has shipped.
Version {M}.{D}.{M}.{D} fixes the bug.
The meeting starts at 10:30 and ends at 12:15.
It happened between 1914 and 1918.
Grand Canyon National Park is in Arizona.
The University of Oxford was founded early.
He scored {N} points in {M} games.
The Supreme Court of the United States held otherwise.
New York and Los Angeles are large cities.
Please refer to Figure {M} and Table {D}.
In {Y}, about {P} people visited Central Park.
Take one tablet every {M} hours.
The Washington Post reported on Tuesday.
Model number XR-{D4}-{D6}
Chapter {N} describes the Data Protection Act.
Prime Minister's questions are held on Wednesdays.
The ratio was {N}:{M} and the error {M}.{D6}.""".split("\n")
_SLOT = re.compile(r"\{(\w+)\}")
_FULL = {ord(c): chr(ord(c) + 0xFEE0) for c in "0123456789"}
_HYPHENS = "‐‑–—−－"
_UNMARKED = ("MAIL", "NAME", "ENAME", "ADDR", "EADDR", "IP", "TELW")


@dataclass(frozen=True)
class Item:
    text: str
    spans: tuple[tuple[int, int, str], ...]
    language: str


def noise(value: str, rng: Random) -> str:
    """A number as it comes out of forms, scans and chats."""
    kind = rng.randrange(6)
    if kind == 0:
        return value.translate(_FULL)
    if kind == 1:
        return value.replace("-", rng.choice(_HYPHENS))
    if kind == 2:
        return value.replace("-", rng.choice([" - ", "- ", " -", " － "]))
    if kind == 3:
        return value.replace("-", "-\n", 1) if "-" in value else value
    if kind == 4:
        return "".join(c + (rng.choice(["\u200b", "\u00ad", ""]) if c.isdigit() and i < len(value) - 1 else "") for i, c in enumerate(value))
    if "-" not in value:
        return value
    return "".join(c + (" " if c.isdigit() and i < len(value) - 1 and rng.random() < 0.25 else "") for i, c in enumerate(value))


def fill(template: str, rng: Random, language: str, spoil: float = 0.0) -> Item:
    parts, spans, at, last = [], [], 0, 0
    for match in _SLOT.finditer(template):
        before = template[last:match.start()].replace("\\n", "\n")
        maker, kind = MAKERS[match[1]]
        value = maker(rng)
        if kind and match[1] not in _UNMARKED and rng.random() < spoil:
            value = noise(value, rng)
        parts += [before, value]
        at += len(before)
        if kind:
            spans.append((at, at + len(value), kind))
        at += len(value)
        last = match.end()
    parts.append(template[last:].replace("\\n", "\n"))
    return Item("".join(parts), tuple(spans), language)


def corpus(seed: int = 20261129, rounds: int = 30, spoil: float = 0.0) -> list[Item]:
    """Every sentence `rounds` times with other values: about 110 spans a round; the negatives as often."""
    rng = Random(seed)
    items = []
    for _ in range(rounds):
        items += [fill(template, rng, "ko", spoil) for template in KOREAN] + [fill(template, rng, "en", spoil) for template in ENGLISH]
        items += [fill(template, rng, "-", 0) for template in NEGATIVE]
    rng.shuffle(items)
    return items


def documents(items: list[Item], each: int = 12) -> list[Item]:
    """Sentences put together to longer texts, each on lines of its own."""
    made = []
    for start in range(0, len(items), each):
        text, spans = "", []
        for item in items[start:start + each]:
            spans += [(a + len(text), b + len(text), kind) for a, b, kind in item.spans]
            text += item.text + "\n"
        made.append(Item(text, tuple(spans), "mixed"))
    return made
