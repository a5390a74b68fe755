"""Documents and Q-A sources to records: what is made, where it came from, what is left out, and that the stages read it."""
import csv
import gzip
import json
from pathlib import Path

import pytest
import yaml
from collecting import LAW, collect, config, document, read, write

from megatron_ext.config.schema import ChatConfig
from megatron_ext.config.validate import ConfigErrors, validate
from megatron_ext.errors import UserError
from rlhf.collect import cut, tasks
from rlhf.collect.build import build
from rlhf.data import records

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
FAQ = "도서관 안내\n\nQ. 몇 권까지 빌리나요?\nA. 다섯 권까지 빌립니다.\n\nQ2: 언제 여나요?\nA2: 아홉 시에 엽니다.\n토요일은 쉽니다.\n"


def made(tmp_path: Path, source: list[dict] | str, *words: str, name: str = "in.jsonl") -> dict:
    path = tmp_path / name
    if isinstance(source, str):
        path.write_text(source, encoding="utf-8")
    else:
        write(path, source)
    return build(config(f"input={path}", f"output={tmp_path / 'out'}", *words))


# ---- cutting -----------------------------------------------------------------------------------------------------------------------

def test_articles_end_where_the_next_article_a_chapter_or_the_addenda_begin():
    found = cut.articles(LAW)
    assert [(piece.label, piece.title) for piece in found] == [("제1조", "목적"), ("제2조", "정의"), ("제3조의2", None), ("제4조", "과태료")]
    assert found[1].text.endswith("② 제1조에 따른 사항은 대통령령으로 정한다.")  # a mention is no beginning
    assert found[2].text == "시험은 매일 한다." and found[3].text == "시험을 거른 자에게는 과태료를 부과한다."
    assert all(piece.text in LAW for piece in found)
    english = "Act\n\nArticle 1. (Purpose) This is it.\n\nArticle 2 Further words.\nAs said in Article 1 above.\n"
    assert [(piece.label, piece.title, piece.text) for piece in cut.articles(english)] == [
        ("Article 1", "Purpose", "This is it."), ("Article 2", None, "Further words.\nAs said in Article 1 above.")]


def test_faq_and_sections():
    assert [(piece.label, piece.text) for piece in cut.faq(FAQ)] == [("몇 권까지 빌리나요?", "다섯 권까지 빌립니다."), ("언제 여나요?", "아홉 시에 엽니다.\n토요일은 쉽니다.")]
    assert cut.faq("Apples are red.\nQuite so.\nAll of them.") == []
    markdown = "# Guide\n\nWords.\n\n## Opening hours\nFrom nine.\n\n## Fees ##\n\n## Rules\nBe quiet.\n"
    assert [(piece.label, piece.text) for piece in cut.sections(markdown)] == [("Guide", "Words."), ("Opening hours", "From nine."), ("Rules", "Be quiet.")]
    bill = "개정법률안\n\n제안이유\n\n부모의 보살핌이 필요하다.\n\n주요내용\n\n나이를 올린다.\n\n이것은 문장이다.\n\n끝이다."
    assert [piece.label for piece in cut.sections(bill)] == ["제안이유", "주요내용"]


@pytest.mark.parametrize("longest", [1, 7, 40, 100, 10_000])
def test_passages_lose_nothing_and_are_never_too_long(longest):
    text = "  " + LAW + "\n\n" + "긴문장" * 50 + "\n\nA sentence. Another one! 셋째 문장입니다. \n\n\n끝"
    found = cut.passages(text, longest)
    assert all(0 < len(passage) <= longest and passage == passage.strip() for passage in found)
    assert "".join("".join(found).split()) == "".join(text.split())
    place = 0
    for passage in found:  # each is a part of the text, in its order
        place = text.index(passage, place) + len(passage)
    if longest == 40:
        assert any("A sentence. Another one! 셋째 문장입니다." in passage for passage in found)  # paragraphs that fit stay whole
    assert cut.passages(" \n ", 10) == []


# ---- records -----------------------------------------------------------------------------------------------------------------------

def test_documents_become_questions_and_passages_with_their_source(tmp_path):
    law = document(LAW, title="시험법", domain="law", licence="public", source="moleg", sha256="f" * 64, language="ko")
    found = made(tmp_path, [law, document(FAQ, "faq/1"), {"text": " ", "id": "x"}], "collect.passage_chars=20", "collect.domain=library")
    sft, passages = read(tmp_path / "out" / "sft.jsonl"), read(tmp_path / "out" / "passages.jsonl")
    article = sft[0]
    assert article["builder"] == "articles" and article["response"] == "이 법은 시험에 관한 사항을 정함을 목적으로 한다." and "시험법" in article["prompt"]
    assert article["source"] == {"id": "law/1", "file": "in.jsonl", "line": 1, "sha256": "f" * 64, "part": "제1조", "licence": "public", "collection": "moleg"}
    assert article["domain"] == "law" and article["language"] == "ko"
    assert [record["builder"] for record in sft] == ["articles"] * 4 + ["faq"] * 2
    assert sft[4]["prompt"] == "몇 권까지 빌리나요?" and sft[4]["domain"] == "library" and sft[4]["source"]["line"] == 2
    assert [(record["title"], record["source"]["part"]) for record in passages] == [("시험법", "passage:0"), ("도서관 안내", "passage:0")]
    assert len({record["id"] for record in (*sft, *passages)}) == 8
    manifest = yaml.safe_load((tmp_path / "out" / "build.yaml").read_text())
    assert manifest == found and manifest["left_out"] == {"unreadable": 1} and manifest["outputs"][0]["domains"] == {"law": 4, "library": 2}
    # The stages read it as it is.
    kept, bad = records.read(tmp_path / "out" / "sft.jsonl", ChatConfig(), records.Conversation)
    assert len(kept) == 6 and bad.count == 0


def test_the_same_input_makes_the_same_bytes_wherever_it_lies(tmp_path):
    texts = {}
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        made(tmp_path / place, [document(LAW, title="시험법"), document(FAQ, "faq/1")], "collect.passage_chars=20")
        texts[place] = [(tmp_path / place / "out" / name).read_bytes() for name in ("sft.jsonl", "passages.jsonl")]
    assert texts["a"] == texts["b"]


def test_pairs_of_any_format_and_compressed(tmp_path):
    rows = [{"Q": "하나?", "A": "둘."}, {"Q": "하나?", "A": "둘."}, {"Q": "", "A": "x"}, {"Q": "긴 것?", "A": "가" * 30}, {"Q": "짧은?", "A": "네"}]
    path = tmp_path / "in.csv.gz"
    with gzip.open(path, "wt", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, ["Q", "A"])
        writer.writeheader()
        writer.writerows(rows)
    found = build(config(f"input={path}", f"output={tmp_path / 'out'}", "chat.prompt_key=Q", "chat.response_key=A", "collect.max_chars=20", "collect.source=daily",
                         "collect.domain=chat", "collect.licence=MIT"))
    only, = read(tmp_path / "out" / "sft.jsonl")
    assert (only["prompt"], only["response"], only["domain"], only["source"]["id"], only["source"]["licence"]) == ("하나?", "둘.", "chat", "daily:2", "MIT")
    assert found["left_out"] == {"repeated": 1, "too_long": 1, "too_short": 1, "unreadable": 1}
    assert "하나" not in json.dumps(found, ensure_ascii=False)  # manifests name places, not texts
    talk = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "answer"}], "id": 7}
    made(tmp_path, [talk])
    only, = read(tmp_path / "out" / "sft.jsonl")
    assert only["prompt"] == [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}] and only["source"]["id"] == "7"
    assert not (tmp_path / "out" / "passages.jsonl").exists()


def test_rows_that_were_cleaned_as_documents_are_pairs_again(tmp_path):
    """`prepare curate=...` writes a row of a table out, `field: value` a line: questions with answers can have personal data taken out first."""
    rows = [document("Q: 몇 시에 여나요?\nA: 아홉 시: 정각에 엽니다.\nlabel: 0", "r/1", source="talk", licence="MIT", sha256="e" * 64, text_sha256="d" * 64),
            document("Q: 누가?\nA:", "r/2"), document("Q: 하나?\nA: 둘.\n셋이라고도 합니다", "r/3"), document("A: 먼저 답.\nQ: 나중 물음?", "r/4", licence="unknown")]
    found = made(tmp_path, rows, "collect.licence=CC0", "chat.prompt_key=Q", "chat.response_key=A", "collect.builder=qa")
    assert [(row["prompt"], row["response"]) for row in read(tmp_path / "out" / "sft.jsonl")] == [("몇 시에 여나요?", "아홉 시: 정각에 엽니다."), ("나중 물음?", "먼저 답.")]
    first, last = (row["source"] for row in read(tmp_path / "out" / "sft.jsonl"))
    assert last["licence"] == "CC0"
    assert (first["id"], first["sha256"], first["text_sha256"], first["licence"], first["collection"]) == ("r/1", "e" * 64, "d" * 64, "MIT", "talk")
    assert found["left_out"] == {"no_pair": 2}
    made(tmp_path, rows[:1], "collect.passage_chars=5")  # without the names of its fields it is a document
    assert not (tmp_path / "out" / "sft.jsonl").exists() and len(read(tmp_path / "out" / "passages.jsonl")) == 1


def test_few_shot_prompts(tmp_path):
    rows = [{"prompt": f"Question {number}?", "response": f"Answer {number}.", "domain": ("a", "b")[number % 2], "id": f"s{number}"} for number in range(40)]
    made(tmp_path, rows, "collect.builder=few_shot", "collect.shots=2")
    pool, prompts = read(tmp_path / "out" / "examples.jsonl"), read(tmp_path / "out" / "few_shot.jsonl")
    assert len(pool) == 20 and len(prompts) == 20
    by_id = {record["id"]: record for record in pool}
    for record in prompts:
        shown = [by_id[one] for one in record["shots"]]
        assert len(shown) == 2 and {one["domain"] for one in shown} == {record["domain"]} and record["source"]["id"] not in {one["source"]["id"] for one in shown}
        assert [message["role"] for message in record["prompt"]] == ["user", "assistant"] * 2 + ["user"]
        assert record["prompt"][0]["content"] == shown[0]["prompt"] and record["prompt"][-1]["content"] not in {one["prompt"] for one in pool}
    kept, _ = records.read(tmp_path / "out" / "few_shot.jsonl", ChatConfig(), records.Prompt)
    assert kept[0].reference == prompts[0]["reference"] and len(kept[0].messages) == 5
    with pytest.raises(UserError, match="collect.shots=0"):
        made(tmp_path, rows, "collect.builder=few_shot")


def test_tasks_are_the_answers_to_one_prompt(tmp_path):
    folder = tmp_path / "in"
    write(folder / "sft.jsonl", [{"prompt": "Q1?", "response": "from the source", "domain": "law", "source": {"id": "d1"}, "language": "en"},
                                 {"prompt": "Q2?", "response": "alone"}])
    for model in ("m1", "m2"):
        write(folder / model / "answers.jsonl", [{"prompt": "Q1?", "response": f"by {model} {draw}", "model": model} for draw in range(3)]
              + [{"prompt": "Q1?", "response": "from the source", "model": model}])
    write(folder / "more.jsonl", [{"prompt": "Q3?", "responses": ["x", {"id": "b", "text": "y"}]}, {"prompt": "Q4?", "responses": ["x", " "]}])
    found = build(config(f"input={folder}", f"output={tmp_path / 'out'}", "collect.builder=tasks", "collect.max_answers=4"))
    first, second = tasks.load(tmp_path / "out" / "tasks.jsonl").values()
    origins = {answer.text: answer.origin for answer in first.answers}
    assert len(origins) == 4 and origins["from the source"] == "demonstration" and first.domain == "law" and first.source == {"id": "d1"}
    assert [answer.id for answer in first.answers] == ["a0", "a1", "a2", "a3"] and len(second.answers) == 2
    assert found["left_out"] == {"answer_beyond_max_answers": 3, "one_answer_only": 1, "repeated_answer": 2, "unreadable": 1}


def test_damaged_tasks_are_refused_by_line(tmp_path):
    good = {"id": "t", "prompt": "Q?", "answers": [{"id": "a", "text": "x"}, {"id": "b", "text": "y"}]}
    for spoilt in ({**good, "answers": good["answers"][:1]}, {**good, "id": ""}, {"id": "t"}, {**good, "answers": [{"id": "a", "text": "x"}] * 2}, {**good, "answers": 3}):
        with pytest.raises(UserError, match=r"tasks.jsonl:2: is no task"):
            tasks.load(write(tmp_path / "tasks.jsonl", [good | {"id": "first"}, spoilt]))
    with pytest.raises(UserError, match="has the id of an earlier task"):
        tasks.load(write(tmp_path / "tasks.jsonl", [good, good]))
    with pytest.raises(UserError, match="is not there"):
        tasks.load(tmp_path / "none.jsonl")


# ---- refusals ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("action", "words", "message"), [
    ("build", ["output=/tmp/x"], "input=null: name what is read"),
    ("build", ["input=/no/such", "output=/tmp/x"], "input=/no/such: is not there"),
    ("augment", ["input=/tmp", "output=/tmp/x"], "collect.endpoint=null: name who replies"),
    ("augment", ["input=/tmp", "output=/tmp/x", "collect.endpoint=localhost:8000", "collect.model=m"], "must be the address before /chat/completions"),
    ("augment", ["input=/tmp", "output=/tmp/x", "collect.endpoint=https://bob:s3cret@host/v1", "collect.model=m"], "collect.endpoint=***: holds a user or a password"),
    ("augment", ["input=/tmp", "output=/tmp/x", "collect.endpoint=https://host/v1"], "collect.model=null"),
    ("augment", ["input=/tmp", "output=/tmp/x", "collect.endpoint=https://host/v1", "collect.model=m", "collect.max_cost=5"], "collect.max_cost=5.0: needs the prices"),
    ("serve", ["input=/tmp"], "collect.annotators=[]: name who orders answers"),
    ("serve", ["input=/tmp", "collect.annotators=[a,<b>]"], "collect.annotators=<b>: is no name"),
    ("serve", ["input=/tmp", "collect.annotators=[a,a]"], "names somebody twice"),
    ("serve", ["input=/tmp", "collect.annotators=[a]", "collect.votes=2"], "collect.votes=2: asks for more people"),
    ("serve", ["input=/tmp", "collect.annotators=[a]", "collect.renew=[b]"], "collect.renew=b: is not among"),
    ("status", ["input=/tmp", "collect.targets=[law]"], "collect.targets=law: must be DOMAIN:NUMBER"),
    ("build", ["input=/tmp", "output=/tmp/x", "collect.builder=qas"], "collect.builder=qas: did you mean qa?"),
    ("build", ["input=/tmp", "output=/tmp/x", "collect.max_answers=10"], "collect.max_answers=10"),
])
def test_what_cannot_work_is_refused(action, words, message):
    with pytest.raises((UserError, ConfigErrors)) as caught:
        validate(config(*words), f"collect {action}")
    assert message in str(caught.value) and "s3cret" not in str(caught.value)


def test_nothing_to_build_is_told(tmp_path):
    with pytest.raises(UserError, match="gives nothing with collect.builder=qa: no_pair 1"):
        made(tmp_path, [document(LAW)], "collect.builder=qa")
    (tmp_path / "phrases.yaml").write_text("ko: {article: [x]}")
    with pytest.raises(UserError, match="collect.phrases="):
        made(tmp_path, [document(LAW)], f"collect.phrases={tmp_path / 'phrases.yaml'}")


def test_the_command_line(tmp_path):
    path = write(tmp_path / "in.jsonl", [document(LAW, title="시험법", domain="law")])
    done = collect("build", f"input={path}", f"output={tmp_path / 'out'}", "collect.passage_chars=20")
    assert f"{tmp_path / 'out' / 'sft.jsonl'}: 4 records" in done.stdout
    found = json.loads(collect("status", f"input={tmp_path / 'out'}", "collect.targets=[law:8,health:5]", "--json").stdout)
    assert found["sft"]["domains"] == [{"domain": "health", "done": 0, "there": 0, "target": 5}, {"domain": "law", "done": 4, "there": 4, "target": 8}]
    assert collect("serv", code=2).stderr.startswith("error: collect=serv: unknown; did you mean serve?")
    assert "an action comes first: build, augment, serve, export, status" in collect(code=2).stderr
    assert "collect.annotators=[]" in collect("--help").stdout


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")
def test_real_questions_and_a_real_statute(tmp_path):
    found = build(config(f"input={SHARED / 'chatbot_ko.csv'}", f"output={tmp_path / 'qa'}", "chat.prompt_key=Q", "chat.response_key=A", "collect.licence=MIT"))
    assert found["outputs"][0]["records"] + found["left_out"].get("repeated", 0) + found["left_out"].get("too_short", 0) == 11_823 and "unreadable" not in found["left_out"]
    text = (SHARED / "ko_public" / "constitution.txt").read_text(encoding="utf-8")
    assert len(cut.articles(text)) == 130  # the Constitution of the Republic of Korea has 130 articles before its addenda
    made(tmp_path, [document(text, "constitution")])
    asked = {record["source"]["part"]: record for record in read(tmp_path / "out" / "sft.jsonl")}
    assert asked["제3조"]["response"].startswith("대한민국의 영토는 한반도와 그 부속도서로 한다.") and "대한민국헌법" in asked["제3조"]["prompt"]
