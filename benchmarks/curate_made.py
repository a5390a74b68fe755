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
