"""Decontamination: planted passages are found whatever their spacing, others are not, and what is cut out is gone."""
import gzip
import json
import random

import pytest

from megatron_ext.curate import words
from megatron_ext.curate.quality.block import Decontaminate
from megatron_ext.curate.quality.config import DecontaminateConfig, QualityConfig
from megatron_ext.curate.quality.decontaminate import Index, IndexSettings, cut, index, strings
from megatron_ext.curate.quality.text import solid
from megatron_ext.errors import UserError

KOREAN = "다음 중 지방자치단체의 장이 직접 처리하여야 하는 사무로 보기 어려운 것은 무엇인지 고르시오."
ENGLISH = "Which of the following rivers does not flow into the sea that lies to the north of the old capital?"
FILLER = [f"{a}{b}{c}" for a in "국민법산강들집길" for b in "가나다라마바사" for c in ("은", "는", "을", "에서", "으로")]


def page(draw: random.Random, size: int = 120) -> str:
    return " ".join(draw.choice(FILLER) for _ in range(size)) + "."


class Page:
    def __init__(self, text):
        self.text, self.metadata, self.id, self.media = text, {}, "", []


@pytest.fixture
def made(tmp_path):
    """An index of records as evaluation sets have them, and the path it was written to."""
    (tmp_path / "sets").mkdir()
    with gzip.open(tmp_path / "sets" / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps({"question": KOREAN, "choices": ["사무", "예산"], "answer": 1}, ensure_ascii=False) + "\n")
    (tmp_path / "sets" / "b.json").write_text(json.dumps([{"messages": [{"role": "user", "content": ENGLISH}]}]))
    (tmp_path / "sets" / "c.csv").write_text("Q,A\n짧은 질문,짧은 답\n열다섯 글자가 조금 넘는 물음입니다만,예\n", encoding="utf-8")
    (tmp_path / "sets" / "read.me").write_text("not a set")
    index(IndexSettings((str(tmp_path / "sets"),), str(tmp_path / "out" / "index.npz")))
    return Index.load(tmp_path / "out" / "index.npz"), tmp_path / "out" / "index.npz"


def test_what_is_in_the_index(made):
    found, _ = made
    assert found.about["files"] == ["a.jsonl.gz", "b.json", "c.csv"]
    assert found.about["texts"] == 11 and found.about["too_short"] == 8  # three are long enough
    letters = {15: len(solid("열다섯 글자가 조금 넘는 물음입니다만")), 25: len(solid(KOREAN)), 50: len(solid(ENGLISH))}
    assert {size: len(one) for size, one in found.hashes.items()} == {size: count - size + 1 for size, count in letters.items()}


@pytest.mark.parametrize("planted", [
    KOREAN, KOREAN.replace(" ", ""), "\n\n".join(KOREAN.split()), KOREAN.replace("하여야", "하여\n야"), KOREAN[:40],
    ENGLISH.upper(), ENGLISH.replace(" ", "  \n"), ENGLISH[:66], "열다섯글자가 조금 넘는 물음입니다만?",
])
def test_planted_text_is_found(made, planted):
    draw = random.Random(0)
    assert len(made[0].hits(f"{page(draw)} {planted} {page(draw)}"))


def test_other_text_is_not(made):
    draw = random.Random(1)
    other = KOREAN.replace("지방", "중앙").replace("처리", "관리").replace("보기", "듣기")
    for text in (page(draw), KOREAN[:24], ENGLISH[:50], "", "---", "서울", other):
        assert not len(made[0].hits(text))


def test_documents_are_dropped_or_cut(made):
    draw = random.Random(2)
    before, after = page(draw, 150), page(draw, 150)
    document = Page(f"{before} {KOREAN} {after}")
    verdict = Decontaminate(QualityConfig(decontaminate=DecontaminateConfig(index=str(made[1])))).process(document)
    assert (verdict.action, verdict.reason, dict(verdict.counts)) == ("drop", "contaminated", {"ngrams": len(solid(KOREAN)) - 24})
    cutting = Decontaminate(QualityConfig(decontaminate=DecontaminateConfig(index=str(made[1]), action="cut", margin=50)))
    assert cutting.process(document).action == "change"
    assert not len(made[0].hits(document.text)) and "지방자치" not in document.text
    first, second = document.text.split("\n\n")
    assert before.startswith(first) and after.endswith(second) and 45 < len(before) - len(first) < 55
    everywhere = Page(" ".join(f"{page(draw, 150)} {KOREAN}" for _ in range(12)))
    assert cutting.process(everywhere).reason == "contaminated"
    assert cutting.process(Page(before)).action == "keep"
    many = QualityConfig(decontaminate=DecontaminateConfig(index=str(made[1]), min_hits=1000))
    assert Decontaminate(many).process(Page(KOREAN)).action == "keep"
    assert Decontaminate(QualityConfig()).process(Page(KOREAN)).action == "keep"


def test_cutting_counts_characters_of_the_text_not_of_its_letters():
    made = Index.of_texts([KOREAN])
    text = f"…… 앞 ½ ﬁ: {KOREAN} [뒤]"
    pieces = cut(text, made.hits(text), margin=0)
    assert [solid(piece) for piece in pieces] == [solid("앞 ½ ﬁ"), "뒤"]


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "bad.yaml").write_text("a: [")
    (tmp_path / "bad.jsonl").write_bytes(b"\xff\xfe\n")
    (tmp_path / "x.docx").write_text("")
    for name in ("bad.json", "bad.yaml", "bad.jsonl", "x.docx", "none.csv"):
        with pytest.raises(UserError, match="cannot be read"):
            list(strings(tmp_path / name))
    with pytest.raises(UserError, match="is not there"):
        index(IndexSettings((str(tmp_path / "none"),), str(tmp_path / "o.npz")))
    (tmp_path / "short.txt").write_text("yes")
    with pytest.raises(UserError, match="no text long enough"):
        index(IndexSettings((str(tmp_path / "short.txt"),), str(tmp_path / "o.npz")))
    with pytest.raises(UserError, match="is no index"):
        Index.load(tmp_path / "short.txt")


def test_words_of_the_command():
    assert words.settings(IndexSettings, ["inputs=a,b", "output=c"]) == IndexSettings(("a", "b"), "c")
    for given, message in ((["input=a"], "did you mean inputs"), (["inputs"], "key=value"), (["inputs=a"], "output=...")):
        with pytest.raises(UserError, match=message):
            words.settings(IndexSettings, given)


def test_packed_sets_are_not_passed_over_and_a_damaged_one_is_named(tmp_path):
    import zstandard

    line = json.dumps({"question": "국가는 평생교육을 진흥하여야 하며 모든 국민은 능력에 따라 균등하게 교육을 받을 권리를 가진다는 조항은 어디에 있는가"}, ensure_ascii=False)
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "d.jsonl.zst").write_bytes(zstandard.compress(line.encode()))
    index(IndexSettings(inputs=(str(tmp_path / "sets"),), output=str(tmp_path / "index.npz")))
    assert Index.load(tmp_path / "index.npz").about["files"] == ["d.jsonl.zst"]
    (tmp_path / "sets" / "d.jsonl.zst").write_bytes(zstandard.compress(line.encode())[:-4])
    with pytest.raises(UserError, match="^inputs=.*d.jsonl.zst"):
        index(IndexSettings(inputs=(str(tmp_path / "sets"),), output=str(tmp_path / "again.npz")))
