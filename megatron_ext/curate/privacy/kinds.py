"""The kinds of personal data that are found, and the words they are replaced by."""
from types import MappingProxyType

RRN, FRN, PASSPORT, DRIVER = "KR_RRN", "KR_FRN", "PASSPORT", "DRIVER_LICENCE"
BUSINESS, CORPORATE = "KR_BUSINESS", "KR_CORPORATE"
PHONE, EMAIL, ADDRESS, PERSON = "PHONE", "EMAIL", "ADDRESS", "PERSON"
ACCOUNT, CARD, PLATE, IP, BIRTH = "BANK_ACCOUNT", "CARD", "PLATE", "IP", "BIRTH_DATE"
SSN, NINO, NHS = "US_SSN", "UK_NINO", "UK_NHS"

# What a tag says in Korean text; in English it is the kind itself. The order is that of reports.
KOREAN = MappingProxyType({
    RRN: "주민등록번호", FRN: "외국인등록번호", PASSPORT: "여권번호", DRIVER: "운전면허번호", BUSINESS: "사업자등록번호", CORPORATE: "법인등록번호",
    PHONE: "전화번호", EMAIL: "전자우편", ADDRESS: "주소", PERSON: "이름", ACCOUNT: "계좌번호", CARD: "카드번호", PLATE: "차량번호", IP: "IP주소",
    BIRTH: "생년월일", SSN: "사회보장번호", NINO: "국민보험번호", NHS: "의료번호",
})
KINDS = tuple(KOREAN)
STRUCTURED = frozenset(KINDS) - {ADDRESS, PERSON}  # what has a form of its own; the others are known by their surroundings
OF_PERSONS = frozenset({RRN, FRN, PASSPORT, DRIVER, PHONE, EMAIL, ACCOUNT, CARD, BIRTH, SSN, NINO, NHS})  # a name beside one of these is a person's
