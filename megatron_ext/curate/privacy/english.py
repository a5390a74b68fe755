"""Names and addresses in English.

A name is a run of capitalised words that begins with a first name, stands behind a title (Dr.) or a label (Patient: ...), or right beside a number of a person.
An address is a house number and a street by its ending, with what follows: flat, town, state, ZIP or postcode.
"""
import re
from collections.abc import Iterable, Iterator

from megatron_ext.curate.privacy import kinds
from megatron_ext.curate.privacy import words_en as words
from megatron_ext.curate.privacy.spans import Span

_B = "[ \n]{1,3}"
_WORD = r"(?:[A-Z][a-z]{0,2}')?(?:Ma?c)?[A-Z](?:[a-z]){1,19}(?:-[A-Za-z][a-z]{1,19})?"
_NAME = rf"{_WORD}(?:{_B}[A-Z]\.?(?![A-Za-z']))?(?:{_B}(?:(?:van|von|de|der|di|da|la|al|bin){_B}){{0,2}}{_WORD}){{0,2}}"
_RUN = re.compile(rf"[A-Z](?<![A-Za-z0-9'].)[a-z]{{1,19}}(?:-[A-Z][a-z]{{1,19}})?(?:{_B}[A-Z]\.?(?![A-Za-z']))?(?:{_B}(?:(?:van|von|de|der|di|da|la|al|bin){_B}){{0,2}}{_WORD}){{1,2}}")
_TITLED = re.compile(rf"(?:{words.TITLES})(?:\.[ \n]{{0,3}}|{_B})(?P<name>{_NAME})")
_SIGNED = re.compile(rf"[:=#|][ \n]{{0,6}}(?P<name>{_WORD},{_B}{_WORD}|{_NAME}|[A-Z]{{2,20}}(?:,? [A-Z]\.?)?(?:,? [A-Z]{{2,20}}){{1,2}})(?:,? ?(?:MD|PhD|DDS|DVM|RN|Jr\.?|Sr\.?))?(?![A-Za-z])")
_LABEL = re.compile(rf"(?<![a-z])(?P<label>{words.LABELS})[ \n]{{0,2}}$", re.IGNORECASE)
_CLOSING = re.compile(rf"(?:incerely|egards|Best|hanks|heers|ruly|aithfully|igned|igned by)[ ]?[,:][ \n]{{1,4}}(?P<name>{_NAME})(?=[ ]?(?:\n|$|[.,]))")
_DEAR = re.compile(rf"(?:D(?<![A-Za-z].)ear|H(?<![A-Za-z].)(?:i|ello)){_B}(?P<name>{_NAME})(?=[ \n]?[,:;\n])")
_NOT_DEAR = frozenset("Sir Sirs Madam All Customer Team Colleagues Colleague Mr Mrs Ms Dr World There Everyone Everybody Folks Guys Again Friend Friends Both Kitty".split())
# Korean names in Latin letters: Park Ji-young, Ji-young Park. No surname that is also an English word (An, Oh, Son).
_SURNAME = (r"(?:Kim|Lee|Yi|Rhee|Park|Pak|Choi|Choe|Jung|Jeong|Chung|Kang|Cho|Jo|Yoon|Yun|Jang|Chang|Lim|Han|Seo|Suh|Shin|Kwon|Hwang|Ahn|Ryu|Yoo|Hong|Jeon|Jun|Chun|Ko|Koh|Moon|Sohn|Yang|Bae|Baek|Paik|Heo|Hur|Nam|Shim|Noh|Roh|"
            r"Kwak|Cha|Joo|Ju|Woo|Min|Eom|Bang|Kong|Hyun)")
_GIVEN = re.compile(r"[A-Z](?<![A-Za-z].)[a-z]{1,7}-[A-Za-z][a-z]{1,7}(?![A-Za-z-])")
_SURNAME_BEFORE, _SURNAME_BEHIND = re.compile(rf"(?<![A-Za-z]){_SURNAME},?[ ]{{1,2}}$"), re.compile(rf"[ ]{{1,2}}{_SURNAME}(?![A-Za-z-]|[ ][A-Z][a-z]{{1,7}}-)")
_PHRASE = re.compile(rf"(?i:(?<![a-z])(?:{words.PHRASES})){_B}$")
_LAST_FIRST = re.compile(rf"[A-Z](?<![A-Za-z].)[A-Za-z'-]{{1,24}},{_B}(?P<first>[A-Z][a-z]{{1,19}})(?:{_B}[A-Z]\.?)?(?![a-z])")
_VERB = re.compile(r"(?:'s)?[ \n,]{1,3}(?:said|says|wrote|told|asked|called|was|is|has|had|lives|lived|works|worked|who|aged|born|of|and|at|will|can|may|\(|reported|signed|filed|submitted|visited|requested|applied|moved|agreed|paid|joined|died)\b|[.,;:)!?\n]|\Z")
_LONELY = frozenset(("will may mark grant bill rose grace hope faith joy art dean chase drew gene jack frank sue pat rob jean ray guy earl duke hunter robin spencer dana").split())
_BESIDE = re.compile(rf"(?P<name>{_WORD}(?:{_B}[A-Z]\.?)?{_B}{_WORD})[ \n]{{0,2}}(?:[(,:<|\-/\[][ \n]{{0,2}}|[ \n])(?:(?:at|on|phone|tel|email|e-mail|cell|mobile|SSN|DOB|ssn)\.?:?[ \n]{{1,2}})?$")

_UNIT = r"(?:Apartment|Apt|Suite|Ste|Unit|Flat|Floor|Room|Rm|Building|Bldg|No|#)\.?[ \n]{0,2}#?[ \n]?(?:[A-Za-z]?\d{1,5}[A-Za-z]?|[A-Z])(?![A-Za-z])"
_POSTCODE = r"[A-Z]{1,2}\d[A-Z\d]?[ \n]{0,2}\d[A-Z]{2}(?![A-Za-z0-9])"
_TOWN = r"[A-Z][A-Za-z'.-]{1,19}(?:[ \n][A-Za-z][A-Za-z'.-]{1,19}){0,3}?"
_STATE = rf"(?:{words.STATES})(?![A-Za-z])"
_TAIL = (rf"(?:[ \n]{{0,2}},?[ \n]{{0,3}}{_UNIT})?"
         rf"(?:(?:[ \n]{{0,2}},[ \n]{{0,3}}{_TOWN}){{0,2}}?[ \n]{{0,2}},?[ \n]{{0,3}}(?:{_TOWN},?[ \n]{{1,3}})?(?:{_STATE}(?:[ \n]{{0,2}},?[ \n]{{0,2}}\d{{5}}(?:-\d{{4}})?(?!\d))?|{_POSTCODE}))?")
_STREET = re.compile(rf"\d(?<![\d.,/-]\d)\d{{0,4}}[A-Za-z]?(?:[-/]\d{{1,4}})?,?[ \n]{{1,3}}(?:(?:[NSEW]|North|South|East|West|NE|NW|SE|SW)\.?[ \n]{{1,2}})?"
                     rf"(?:(?:[A-Z][A-Za-z'.-]{{1,19}}|\d{{1,3}}(?:st|nd|rd|th)|of|the)[ \n]{{1,2}}){{1,4}}?(?:{words.STREETS})(?![A-Za-z])\.?(?:[ \n](?:[NSEW]|NE|NW|SE|SW)(?![A-Za-z])\.?)?{_TAIL}")
_BROADWAY = re.compile(rf"\d(?<![\d.,/-]\d)\d{{0,4}}[ \n]{{1,3}}(?:(?:[NSEW])\.?[ \n])?Broadway(?![A-Za-z]){_TAIL}")
_BOX = re.compile(rf"P\.?[ ]?O\.?[ ]?Box[ \n]{{1,2}}\d{{1,6}}{_TAIL}")
# Whatever the street is called, a state and a ZIP, or a postcode, end an address: 61 Lee Manor, East Sophie, SL0 9QQ.
_PIECE = r"(?:[A-Z][A-Za-z'.-]{0,19}|\d{1,5}[A-Za-z]?|#\d{1,5}|of|the|de|la|and)"
_BY_CODE = re.compile(rf"\d(?<![\d.,/-]\d)\d{{0,4}}[A-Za-z]?(?:-\d{{1,4}})?,?[ \n]{{1,2}}(?=[A-Z#]){_PIECE}(?:,?[ \n]{{1,2}}{_PIECE}){{0,9}}?,?[ \n]{{1,2}}(?:{_STATE},?[ \n]{{1,2}}\d{{5}}(?:-\d{{4}})?(?!\d)|{_POSTCODE})")
_MILITARY = re.compile(r"(?:PSC|Unit|USS|USNS|USNV|USCGC|CMR)[ ][A-Za-z0-9 ,\n]{2,40}?(?:APO|FPO|DPO),?[ \n]A[AEP][ \n]\d{5}(?!\d)")
_CODED = re.compile(r"\d(?:\d{4}(?!\d)|[A-Z]{2}(?![A-Za-z0-9]))")  # a ZIP, or the end of a postcode
_NUMBER_OF = re.compile(r"(?:Flat|Apartment|Apt|Unit|Studio|Suite|Room)\.?[ \n]{1,2}$")
# Behind words that only an address follows a street may be called anything: lives at 644 Luna Spring.
_CAPITAL = r"(?!Apt|Apartment|Suite|Ste|Unit|Flat)[A-Z][a-z'-]{1,19}"
_PLACE = re.compile(rf"\d(?<![\d.,/-]\d)\d{{0,4}}[A-Za-z]?,?[ \n]{{1,2}}(?P<first>{_CAPITAL})(?:[ ]{_CAPITAL}){{0,3}}{_TAIL}")
_LIVES = re.compile(r"(?:address(?: is)?:?|liv(?:es?|ed|ing) at|resid(?:es?|ed|ing|ence) (?:at|of)|moved (?:to|from|into)|deliver(?:ed)? (?:it )?to|(?:ship|mail|send|post)(?:ped|ed)? (?:it )?to|(?:home|house|flat|property|premises|situated|located) at)"
                    r"[ \n]{1,2}(?P<unit>(?:Flat|Apartment|Apt|Unit|Studio|Suite|Room)\.?[ \n]{1,2}(?:[A-Za-z]?\d{1,4}[A-Za-z]?,?[ \n]{1,2})?)?$", re.IGNORECASE)
_DATES = re.compile(r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?|Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?|(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day)$")
_UNIT_BEFORE = re.compile(rf"(?:{_UNIT}),?[ \n]{{1,3}}$")
_NOT_HOUSE = re.compile(r"(?:chapter|section|article|page|pp?\.|no\.|vol(?:ume)?\.?|figure|table|item|route|rule|title|part|psalm|verse|in|of|since|by|from|until|before|after|the|and|than|over|about|version|exit)[ \n]{1,3}$", re.IGNORECASE)
_POST_LABEL = re.compile(rf"[PpZz](?:ost ?code|IP(?: code)?|ip ?code)[ \n:]{{1,4}}(?:is )?(?P<code>{_POSTCODE}|\d{{5}}(?:-\d{{4}})?(?!\d))")


def addresses(text: str) -> Iterator[Span]:
    """English addresses in a normalised text."""
    for pattern in [_STREET, *(_BROADWAY,) * ("Broadway" in text), *(_BOX,) * ("Box" in text), *(_BY_CODE,) * bool(_CODED.search(text)), *(_MILITARY,) * ("PO" in text)]:
        for match in pattern.finditer(text):
            start, end = match.span()
            if _NOT_HOUSE.search(text, max(0, start - 14), start) and not re.search(r"\d{5}|\d[A-Z]{2}$|,", match[0]):
                continue
            if before := _UNIT_BEFORE.search(text, max(0, start - 24), start) or _NUMBER_OF.search(text, max(0, start - 14), start):
                start = before.start()
            while text[end - 1] in " \n,":
                end -= 1
            yield Span(start, end, kinds.ADDRESS, 0.85)
    for match in _PLACE.finditer(text):
        lives = _LIVES.search(text, max(0, match.start() - 40), match.start())
        if lives and not _DATES.match(match["first"]):
            yield Span(match.start() if lives["unit"] is None else lives.start("unit"), match.end(), kinds.ADDRESS, 0.85)
    yield from (Span(*match.span("code"), kinds.ADDRESS, 0.85) for match in _POST_LABEL.finditer(text))


def names(text: str, others: Iterable[Span]) -> Iterator[Span]:
    """English names in a normalised text; `others` are what else was found in it."""
    for match in _TITLED.finditer(text):
        parts = match["name"].split()
        if not text[max(0, match.start() - 1):match.start()].isalpha() and (len(parts) == 1 or parts[-1] not in words.NOT_LAST or parts[-1] in _ALSO_LAST):
            yield Span(*match.span("name"), kinds.PERSON, 0.9)
    for match in _SIGNED.finditer(text):
        label = _LABEL.search(text, max(0, match.start() - 24), match.start())
        if label and _believed(match["name"], label["label"].lower()):
            yield Span(match.start("name"), _line_end(text, *match.span("name")), kinds.PERSON, 0.88)
    yield from (Span(*match.span("name"), kinds.PERSON, 0.8) for match in _CLOSING.finditer(text) if _kept(match["name"]) and not set(match["name"].split()) & _COMMON)
    yield from (Span(*match.span("name"), kinds.PERSON, 0.85) for match in _DEAR.finditer(text) if match["name"].split()[0] not in _NOT_DEAR)
    for match in _GIVEN.finditer(text) if "-" in text else ():
        before, behind = _SURNAME_BEFORE.search(text, max(0, match.start() - 8), match.start()), _SURNAME_BEHIND.match(text, match.end())
        if before or behind:
            yield Span(before.start() if before else match.start(), match.end() if before else behind.end(), kinds.PERSON, 0.9)
    for match in _RUN.finditer(text):
        yield from _run(text, match)
    for match in _LAST_FIRST.finditer(text):
        if match["first"] in words.FIRST and _kept(match[0]) and text[:match.start()].rstrip(" ")[-1:] in ("", "\n", ":", "|", "-", ";", '"', "("):
            yield Span(*match.span(), kinds.PERSON, 0.7)
    for other in others:
        match = _BESIDE.search(text, max(0, other.start - 60), other.start) if other.kind in kinds.OF_PERSONS else None
        if match and _kept(match["name"]) and not set(match["name"].split()) & _COMMON:
            yield Span(*match.span("name"), kinds.PERSON, 0.65)


_ALSO_LAST = frozenset("May June April August March Park Hall Day Hill Hills Church House Bridge Lake Rivers River Banks Bank Court Lane Castle Bill Law Post Street Abbey Palace".split())
_COMMON = frozenset("Business Partner Manager Director Officer Senior Junior Chief Executive Human Resources Department Team Lead Head Assistant Analyst Engineer Consultant Coordinator Administrator Specialist Secretary President "
                    "Vice Operations Finance Legal Reception Enquiries Section Division Unit Branch Headquarters Centre Center Hospital Clinic School University Council Ministry Agency "
                    "Please Call Contact Phone Mobile Office Number Account Customer Service Help Desk Support Email Mail Social Security Card Bank Our The My Your His Her Their At On By For New Main Fax Home Work Cell Send Reach Text Emergency Passport "
                    "Visa National Insurance Tax Health Patient Employee Hotline Front Credit Debit Billing Sales Press Media Public General Direct Toll Free Date Birth Routing Sort Driver Licence License".split())


def _run(text: str, match: re.Match) -> Iterator[Span]:
    """The part of a run of capitalised words that is a name: from a first name on."""
    parts = [(part.start() + match.start(), part[0]) for part in re.finditer(r"[^ \n]+", match[0])]
    for place, (start, word) in enumerate(parts[:-1]):
        if word.partition("-")[0] not in words.FIRST:
            continue
        rest = [other for _, other in parts[place + 1:]]
        if rest[0].rstrip(".") in words.NOT_LAST or rest[-1] in words.NOT_LAST:
            return
        if word.lower() in _LONELY and place == 0 and not _PHRASE.search(text, max(0, start - 24), start) and not _VERB.match(text, match.end()):
            return
        if place and parts[place - 1][1] in ("Saint", "St", "Mount", "Port", "Fort", "Lake", "Cape", "San", "Santa", "King", "Queen"):
            return
        yield Span(start, _line_end(text, start, match.end()), kinds.PERSON, 0.75)
        return
    last = parts[-1][1]
    if len(parts) == 2 and _PERSONS.match(text, match.end()) and _kept(match[0]) and not {parts[0][1], last} & _COMMON and parts[0][1] not in _OPENERS:
        yield Span(match.start(), match.end(), kinds.PERSON, 0.55)
        return
    if _PHRASE.search(text, max(0, match.start() - 24), match.start()) and _kept(match[0]) and _STRONG.search(text, max(0, match.start() - 24), match.start()):
        yield Span(match.start(), match.end(), kinds.PERSON, 0.6 if last not in words.NOT_LAST else 0.1)


_STRONG = re.compile(rf"(?i:my name is|name is|i'm|signed by|spoke (?:to|with)|c/o|on behalf of|represented by|interviewed|colleague|neighbou?r|patient|husband|wife|defendant|plaintiff|witness|tenant|applicant|named){_B}$")


# What only persons do; and words that are capitalised because a sentence begins.
_PERSONS = re.compile(rf"{_B}(?:said|says|wrote|told|lives|lived|signed|joined|died|married|resigned|testified|smiled|nodded|replied|was born|who)(?![a-z])")
_OPENERS = frozenset("The This That These Those A An In On At By For From With When While If Although Because But And Or So Yet As After Before Since Until Once Then Later Today Yesterday Last Next Our Their His Her Its My Your Every Each No Some Many Most".split())


def _line_end(text: str, start: int, end: int) -> int:
    """The end of a name before the label of the next line, which has a capital too: Mary Smith, Phone: ..."""
    line = text.rfind("\n", start, end)
    return line if line > start and text[end:end + 2].lstrip(" ")[:1] == ":" else end


def _kept(name: str) -> bool:
    parts = name.replace(",", " ").split()
    return not any(part.rstrip(".") in words.NOT_LAST for part in parts)


def _believed(name: str, label: str) -> bool:
    """One word is a name behind `Name:`, or when it is a first name."""
    parts = name.replace(",", " ").split()
    first = len(parts) == 2 and parts[0] in words.FIRST and parts[1] in _ALSO_LAST  # Name: Jennifer May
    if not (first or _kept(name)) or set(parts) & _COMMON:
        return False
    return " " in name or "\n" in name or name in words.FIRST or label in ("first name", "last name", "surname", "name", "full name")
