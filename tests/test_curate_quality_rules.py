"""Heuristics, repetition, boilerplate and word lists: each rule by a text that breaks it alone, and real text that breaks none."""
import re
from dataclasses import replace

import pytest
from curate_texts import SHARED, shuffled, statutes

from megatron_ext.curate.quality import heuristics, lists, repetition
from megatron_ext.curate.quality.block import Quality
from megatron_ext.curate.quality.boilerplate import clean
from megatron_ext.curate.quality.config import LanguageModelConfig, ListsConfig, QualityConfig
from megatron_ext.curate.quality.text import is_korean, paragraphs
from megatron_ext.curate.quality.train import fit
from megatron_ext.errors import UserError

needs_data = pytest.mark.skipif(not SHARED.exists(), reason=f"{SHARED} is not there")
KOREAN = """국가는 평생교육을 진흥하여야 한다. 지방자치단체는 주민의 복리에 관한 사무를 처리하고 재산을 관리한다.
모든 국민은 능력에 따라 균등하게 교육을 받을 권리를 가진다. 학교교육의 제도와 운영에 관한 기본적인 사항은 법률로 정한다.
감사원은 세입과 세출의 결산을 매년 검사하여 대통령과 다음 해 국회에 그 결과를 보고하여야 한다. 정당의 설립은 자유이며 복수정당제는 보장된다."""
ENGLISH = """The committee met in the old town hall to discuss the plans of the new library. Many of the residents have waited for years.
It was agreed that the building should be open to all and that the garden behind it would be kept. The architect said that work with the
stone would begin in spring. A second meeting is to be held in autumn, when the costs of the roof are known."""


def test_running_text_passes():
    assert heuristics.judge(KOREAN, korean=True) is None and repetition.repeated(KOREAN, korean=True) is None
    assert heuristics.judge(ENGLISH, korean=False) is None and repetition.repeated(ENGLISH, korean=False) is None
    assert is_korean(KOREAN) and not is_korean(ENGLISH) and is_korean(ENGLISH, "ko") and not is_korean(KOREAN, "en")


@needs_data
@pytest.mark.parametrize("name", ["constitution", *map(str, range(1809890, 1809900))])
def test_statutes_and_bills_pass(name):
    """Bills are hard text: tables of hyphens, one line in two blank, words broken by line ends."""
    text = statutes()[name]
    assert heuristics.judge(text, korean=True) is None
    assert repetition.repeated(text, korean=True) is None


WORDS = KOREAN.split()
BROKEN = {
    "too_short": "짧은 글이다.",
    "too_long": "국민은 " * 46_000,
    "word_length": " ".join("".join(WORDS[at : at + 5]) for at in range(0, len(WORDS), 5)) + " 국민은 나라를" * 9 + "가" * 900,
    "symbols": re.sub(r" ", " # ", KOREAN, count=20),
    "letters": KOREAN + " 1234 5678 90" * 20,
    "stop_words": "서울 부산 대구 인천 광주 대전 울산 세종 경기 강원 충북 충남 전북 전남 경북 경남 제주 독도 울릉 강화 옹진 연천 포천 가평 양평 여주",
    "bullets": "\n".join(f"- {one}" for one in re.split(r"\.\s", KOREAN)),
    "ellipses": "\n".join(f"{one}..." for one in KOREAN.split("\n")),
    "ended_lines": KOREAN.replace(".", "").replace("다", "다만").replace("\n", " "),
    "short_lines": "\n".join([*WORDS[:4], " ".join(WORDS[4:])]),
    "line_breaks": "\n".join(f"{word}정한바에따르고 관하여정한바에따른다" for word in WORDS),
    "sentences": " ".join(KOREAN.replace(".", "").split()) + ".",
    "runs": KOREAN + "\n" + "-" * 300 + " 끝이다.",
    "banned": KOREAN + " Lorem ipsum dolor sit amet.",
}


@pytest.mark.parametrize("reason", sorted(BROKEN))
def test_each_rule_has_its_reason(reason):
    assert heuristics.judge(BROKEN[reason], korean=True) == reason


LINE = "국회는 국가의 예산안을 심의하고 확정한다는 규정이 있다."
VARIED = [f"{a}{b}" for a in "가나다라마바사아자차" for b in ("국은", "민을", "법에", "산의", "강도", "들로")]
REPEATED = {
    "repeated_paragraphs": "\n\n".join([LINE, LINE, KOREAN.split("\n")[0], LINE]),
    "repeated_lines": "\n".join([LINE, LINE, LINE, LINE, *KOREAN.split("\n")]),
    "repeated_lines_characters": "\n".join(["가나다", "라마바", "사아자", LINE * 3, LINE * 3, KOREAN]),
    "top_2_gram": " ".join(f"국가는 국민의 {one}" for one in VARIED),
    "repeated_10_grams": " ".join([*VARIED[:20], "앞의", *VARIED[:10], *VARIED[20:], *"하나 둘 셋 넷 다섯 여섯 일곱".split()]),
}


@pytest.mark.parametrize("reason", sorted(REPEATED))
def test_each_repetition_has_its_reason(reason):
    assert repetition.repeated(REPEATED[reason], korean=True) == reason


def test_repeated_n_grams_by_hand():
    # 12 words of 2 letters, of which words 6 to 10 were there before: 5 of 12 words lie in 5-grams that were there before
    text = "aa bb cc dd ee ff aa bb cc dd ee gg"
    limits = repetition.Limits(lines=1, top=(), repeated=((5, 5 / 12 + 1e-9),))
    assert repetition.repeated(text, korean=False, limits=limits) is None
    limits = repetition.Limits(lines=1, top=(), repeated=((5, 5 / 12 - 1e-9),))
    assert repetition.repeated(text, korean=False, limits=limits) == "repeated_5_grams"
    # overlapping occurrences count each character once: words 1 to 9 of 10 are inside 5-grams that were there before
    limits = repetition.Limits(lines=1, top=(), repeated=((5, 0.9 - 1e-9),))
    assert repetition.repeated("a " * 10, korean=False, limits=limits) == "repeated_5_grams"
    limits = repetition.Limits(lines=1, top=(), repeated=((5, 0.9),))
    assert repetition.repeated("a " * 10, korean=False, limits=limits) is None


def test_boilerplate_lines_go_and_nothing_else():
    page = f"본문 바로가기\n로그인\n{LINE}\nCopyright ⓒ 홍길동. All rights reserved.\n이용약관에 따라 로그인 정보를 보관한다.\n[목록으로]"
    assert clean(page) == (f"{LINE}\n이용약관에 따라 로그인 정보를 보관한다.", 4)
    assert clean(KOREAN) == (KOREAN, 0) and clean(ENGLISH) == (ENGLISH, 0)
    long = "쿠키를 사용합니다. " + LINE * 10
    assert clean(long) == (long, 0)  # a paragraph that speaks of it


@pytest.mark.parametrize("text, count", [
    ("이 시발 새끼야", 2), ("시1발", 1), ("시*발", 1), ("씨.발", 1), ("시발점은 서울이다", 0), ("새로운 시 발전 계획", 0), ("병신년에 태어났다", 0),
    ("허리띠를 졸라매고", 0), ("ㅅㅂ 진짜", 1), ("what the f*uck", 1), ("shiitake and shitake", 0), ("class assessment", 0), ("닥쳐온 위기", 0),
    ("씨발아가 시작되었다", 0), (KOREAN, 0), (ENGLISH, 0),
])
def test_toxic_terms(text, count):
    assert lists.opened("toxic_ko", "toxic_en").find(text).count == count


@pytest.mark.parametrize("text, count", [
    ("여자들은 원래 운전을 못 한다", 1), ("맘충이라는 말", 1), ("여자들은 회의에 참석했다", 0), ("벙어리장갑을 낀다", 0), (KOREAN, 0),
])
def test_biased_sentences(text, count):
    assert lists.opened("bias_ko").find(text).count == count


@needs_data
@pytest.mark.parametrize("name", ["constitution", *map(str, range(1809890, 1809900))])
def test_statutes_hold_no_listed_term(name):
    assert lists.opened("toxic_ko", "toxic_en", "bias_ko", "bias_en").find(statutes()[name]).count == 0


@pytest.mark.parametrize("content, reason", [
    ("- a", "must be a mapping"), ("terms: 3", "must have terms"), ("terms: [{term: ''}]", "entry 1"), ("a: [", "no YAML"),
    ("terms: [{term: a}, {pattern: '('}]", "entry 2"), ("match: sound\nterms: []", "match"), ("terms: [{term: a, weight: heavy}]", "entry 1"),
    ("terms: [{term: ab, except: [ac]}]", "entry 1"),
])
def test_a_wrong_list_is_named(content, reason, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=reason):
        lists.WordList(str(path))


def test_an_unknown_list_names_those_there_are():
    with pytest.raises(UserError, match="toxic_ko"):
        lists.WordList("polite")


class Page:
    def __init__(self, text, **metadata):
        self.text, self.metadata, self.id, self.media = text, metadata, "0" * 32, []


def test_the_step_gives_reasons_counts_and_flags(tmp_path):
    fit([KOREAN, f"{KOREAN} 끝.", f"{KOREAN} 더.", ENGLISH], order=4).save(tmp_path / "model.npz")
    limits = LanguageModelConfig(path=str(tmp_path / "model.npz"), max_perplexity=50, min_word_order=0.1, order_characters=100)
    settings = QualityConfig(language_model=limits)
    step = Quality(settings)
    page = Page(f"{KOREAN}\n이용약관", language="ko")
    verdict = step.process(page)
    assert (verdict.action, verdict.reason, dict(verdict.counts)) == ("change", "", {"boilerplate_lines": 1})
    assert page.text == KOREAN and page.metadata["perplexity"] < 50
    assert step.process(Page("짧다")).reason == "too_short"
    assert step.process(Page("\n".join([LINE, LINE, LINE, LINE, *KOREAN.split("\n")]))).reason == "repeated_lines"
    assert step.process(Page(KOREAN + " 시발 개새끼 지랄")).reason == "toxic"
    model_alone = Quality(replace(settings, heuristics=False, repetition=False))
    assert model_alone.process(Page("뷁쉙쮋 꿹뛣뺋 쒫쭯뀼 " * 20)).reason == "perplexity"
    assert model_alone.process(Page("뷁쉙쮋")).action == "keep"  # too short to say
    assert model_alone.process(Page(shuffled(KOREAN))).reason == "word_order"
    flagged = Page(KOREAN + " 여자들은 원래 약하다. 남자들은 원래 강하다.")
    lenient = QualityConfig(lists=ListsConfig(bias_per_thousand=1.0))
    assert Quality(lenient).process(flagged).action == "change" and flagged.metadata["flags"] == ["bias"]
    strict = QualityConfig(lists=ListsConfig(bias_per_thousand=1.0, bias_action="drop"))
    assert Quality(strict).process(Page(flagged.text)).reason == "bias"
    assert Quality(QualityConfig()).process(Page(KOREAN)).action == "keep"


def test_sources_of_records_are_not_judged_as_running_text():
    step = Quality(QualityConfig(records=("talk-*",)))
    assert step.process(Page("짧다", source="talk-2024")).action == "keep" and step.process(Page("짧다", source="web")).reason == "too_short"
    assert step.process(Page("시발 개새끼 지랄", source="talk-2024")).reason == "toxic"


def test_paragraphs_are_what_blank_lines_part():
    assert paragraphs("a\nb\n\n \n c \n\t\nd") == ["a\nb", "c", "d"] and paragraphs(" \n\n ") == []
