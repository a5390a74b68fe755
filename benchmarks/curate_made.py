"""Texts for benchmarks and campaigns of curation: made from a seed, no two alike unless a copy was asked for, all of them such as `quality` keeps."""
import json
import random
from pathlib import Path

NOUNS = ("국민 법률 행정 기관 예산 사업 지원 교육 복지 보건 과학 기술 연구 개발 시설 운영 계획 수립 시행 평가 결과 보고 자료 정보 공개 신청 처리 기준 절차 대상 기간 금액 방법 내용 "
         "사항 규정 위원회 협의 심의 의결 제출 통보 승인 허가 등록 신고 조사 점검 관리 감독 보조 부담 비용 재원 지역 도시 농촌 환경 수질 토양 산림 해양 교통 도로 철도 항만 주택 건축 "
         "토지 안전 재난 소방 의료 병원 질병 예방 검사 치료 학교 학생 교원 과정 시험 자격 취업 고용 근로 임금 산업 기업 창업 수출 통계 분석 모형 자원 전력 통신 방송 문화 체육 관광").split()
PARTICLES = "은 는 이 가 을 를 에 의 로 와 과 도".split()
KOREAN = [noun + particle for noun in NOUNS for particle in PARTICLES]
ENGLISH = ("the of and to with that people law office budget project support school welfare health science research plan report result public record request rule method case "
           "year amount water energy road bridge harbour market price wage labour farm forest river ocean climate weather winter summer morning evening letter number table "
           "figure chapter section order permit notice appeal court judge member council meeting vote party region city village house street garden museum library theatre music "
           "painting history language grammar reader writer teacher student lesson answer question problem solution example exercise measure weight length surface colour "
           "sound light motion force pressure heat metal stone glass paper cotton silk bread fruit coffee sugar").split()
STOPS = ("the", "of", "and", "to", "with", "that")


def text(draw: random.Random, korean: bool, length: int) -> str:
    """A text of about `length` characters (at least 350 keep the rules of `quality`), lines of sentences of 8 to 12 words."""
    words = draw.choices(KOREAN if korean else ENGLISH, k=max(24 if korean else 54, length // (4 if korean else 7)))
    lines, at = [], 0
    while at < len(words):
        step = draw.randint(8, 12)
        lines.append(" ".join(words[at : at + step] if korean else [draw.choice(STOPS), *words[at : at + step]]) + ("한다." if korean else "."))
        at += step
    return "\n".join(lines)


def write(path: Path, count: int, length: int = 1000, copies: float = 0.05, seed: int = 0) -> int:
    """A file of JSON lines, Korean and English in turns; a share of them are copies of the one before. Returns its bytes."""
    draw, last = random.Random(f"{seed} {count}"), ""
    with path.open("w", encoding="utf-8") as stream:
        for number in range(count):
            last = last if last and draw.random() < copies else text(draw, number % 2 == 0, length)
            stream.write(json.dumps({"text": last}, ensure_ascii=False) + "\n")
    return path.stat().st_size


# ---- a corpus of which everything is known ------------------------------------------------------------------------------------------------

BROKEN, SHORT, DIGITS, AGAIN, EXACT, NEAR, PERSONAL, PLAIN = "broken", "too_short", "letters", "repeated_lines", "exact", "near", "personal", "plain"
OF_THOUSAND = {BROKEN: 1, SHORT: 10, DIGITS: 10, AGAIN: 10, EXACT: 30, NEAR: 20, PERSONAL: 100}  # the rest is plain
_ORDER = [kind for kind, count in OF_THOUSAND.items() for _ in range(count)]
_ORDER += [PLAIN] * (1000 - len(_ORDER))
random.Random(8).shuffle(_ORDER)
_LETTERS = [a + b for a in "bdfgklmnprst" for b in "aeiou"]


def serial(number: int) -> str:
    """A word that no other number has and that is nothing personal: qbabebi..."""
    found = ""
    for _ in range(5):
        number, digit = divmod(number, len(_LETTERS))
        found += _LETTERS[digit]
    return f"q{found}"


def _resident(draw: random.Random) -> str:
    """A resident registration number with its check digit, of someone born in the 20th century."""
    digits = f"{draw.randrange(50, 100):02d}{draw.randrange(1, 13):02d}{draw.randrange(1, 29):02d}{draw.choice('12')}{draw.randrange(10**5):05d}"
    check = (11 - sum(int(digit) * weight for digit, weight in zip(digits, (2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5))) % 11) % 10
    return f"{digits[:6]}-{digits[6:]}{check}"


def personal(draw: random.Random, korean: bool) -> tuple[str, dict[str, int]]:
    """A line with a phone number and an e-mail address, in Korean with a resident registration number too; and how many of each kind."""
    phone, mail = f"010-{draw.randrange(1000, 10000)}-{draw.randrange(1000, 10000)}", f"{serial(draw.randrange(10**8))}{draw.randrange(100)}@example.kr"
    if korean:
        return f"연락처는 {phone}, 전자우편은 {mail}, 주민등록번호는 {_resident(draw)}이다.", {"PHONE": 1, "EMAIL": 1, "KR_RRN": 1}
    return f"Please call {phone} or write to {mail} about it.", {"PHONE": 1, "EMAIL": 1}


def planted(folder: Path, count: int, length: int, files: int = 8, seed: int = 8) -> dict:
    """`count` records (a multiple of 1,000 * files) as JSON lines. Returns what is in them: of each kind how many, bytes, and personal data by kind."""
    folder.mkdir(parents=True)
    found: dict = {"kinds": dict.fromkeys((*OF_THOUSAND, PLAIN), 0), "personal": {}, "bytes": 0}
    for file in range(files):
        draw, last = random.Random(f"{seed} {file}"), ""
        path = folder / f"{file:02d}.jsonl"
        with path.open("w", encoding="utf-8") as stream:
            for number in range(file * count // files, (file + 1) * count // files):
                kind, korean = _ORDER[number % 1000], number % 2 == 0
                if kind in (EXACT, NEAR) and not last:
                    kind = PLAIN
                found["kinds"][kind] += 1
                if kind == BROKEN:
                    stream.write('{"text": "cut off\n')
                    continue
                if kind == EXACT:
                    made = last.replace("\n", " \n") if korean else last.replace("\n", "  ")
                elif kind == NEAR:
                    made = last + (" 끝" if korean else " x")
                elif kind == SHORT:
                    made = " ".join(draw.choices(KOREAN if korean else ENGLISH, k=12)) + f" {serial(number)}."
                elif kind == DIGITS:
                    made = " ".join(str(draw.randrange(100, 1000)) for _ in range(90))
                elif kind == AGAIN:
                    line = " ".join(draw.choices(KOREAN, k=10) if korean else [*STOPS, *draw.choices(ENGLISH, k=8)]) + "."
                    made = "\n".join([f"{serial(number)} {line}", *[line] * 9])
                else:
                    made = f"{serial(number)} {text(draw, korean, length)}"
                    if kind == PERSONAL:
                        said, of = personal(draw, korean)
                        made = f"{made}\n{said}"
                        for name, times in of.items():
                            found["personal"][name] = found["personal"].get(name, 0) + times
                    else:
                        last = made
                stream.write(json.dumps({"text": made}, ensure_ascii=False) + "\n")
        found["bytes"] += path.stat().st_size
    return found
