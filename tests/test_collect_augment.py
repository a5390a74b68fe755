"""Augmentation over an endpoint: templates, replies, resume, cache, and a key that is nowhere to be found. What goes wrong: test_collect_endpoint.py."""
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from collecting import FakeEndpoint, collect, error, numbered, passages, read, variable, write
from collecting import augmented as run
from small import ROOT, environment

from megatron_ext.config.schema import CollectConfig
from megatron_ext.errors import UserError
from rlhf.collect import replies
from rlhf.collect.endpoint import Endpoint
from rlhf.collect.templates import Template

CONF = Path(__file__).resolve().parent.parent / "conf" / "collect"
KEY = "sk-test-0123456789abcdef"
PAIRS = json.dumps([{"question": "몇 시에 여나요?", "answer": "아홉 시에 엽니다."}, {"question": "언제 쉬나요?", "answer": "토요일에 쉽니다."}], ensure_ascii=False)


# ---- the run -----------------------------------------------------------------------------------------------------------------------

def test_pairs_with_their_source_and_the_same_bytes_however_many_are_under_way(tmp_path):
    passages(tmp_path)
    texts = []
    for concurrency in (1, 6):
        with FakeEndpoint(lambda body, number: (time.sleep(0.002 * (7 * number % 5)), numbered(body, number))[1]) as endpoint:
            found = run(tmp_path, endpoint, f"collect.concurrency={concurrency}", name=f"out{concurrency}")
            assert endpoint.most <= concurrency and len(endpoint.asked) == 6
        texts.append((tmp_path / f"out{concurrency}" / "sft.jsonl").read_bytes())
    assert texts[0] == texts[1]
    rows = read(tmp_path / "out1" / "sft.jsonl")
    assert [row["source"]["id"] for row in rows] == [f"doc{number}" for number in range(6)] and rows[3]["prompt"] == "도서관 3은 몇 시에 여나요?"
    assert rows[0]["model"] == "m" and rows[0]["builder"] == "augment:qa_ko" and rows[0]["made_from"] == "p0" and rows[0]["domain"] == "library" and rows[0]["language"] == "ko"
    assert found["complete"] and found["spent"]["requests"] == 6
    asked = endpoint.asked[0]
    assert asked["model"] == "m" and asked["temperature"] == 0.7 and asked["max_tokens"] == 1024 and "stop" not in asked
    assert [message["role"] for message in asked["messages"]] == ["system", "user", "assistant", "user"]  # the template's solved example
    assert endpoint.headers[0]["path"] == "/v1/chat/completions"


def test_nothing_is_asked_twice_and_typed_sampling_goes_first(tmp_path):
    passages(tmp_path)
    with FakeEndpoint(numbered) as endpoint:
        first = run(tmp_path, endpoint)
        before = (tmp_path / "out" / "sft.jsonl").read_bytes()
        again = run(tmp_path, endpoint)
        assert len(endpoint.asked) == 6 and again["new_replies"] == 0 and again["spent"] == first["spent"] and (tmp_path / "out" / "sft.jsonl").read_bytes() == before
        passages(tmp_path, 8)
        run(tmp_path, endpoint)
        assert len(endpoint.asked) == 8
        run(tmp_path, endpoint, "generate.temperature=0.2", "generate.samples=2", "generate.stop=[끝]")
        assert len(endpoint.asked) == 8 + 16 and endpoint.asked[-1]["temperature"] == 0.2 and endpoint.asked[-1]["stop"] == ["끝"]


def test_a_run_that_is_killed_goes_on(tmp_path):
    """SIGKILL while requests are under way: what was answered is not asked again, and the end is the same."""
    passages(tmp_path, 12)
    gate = threading.Event()
    with FakeEndpoint(lambda body, number: (gate.wait(400) if number >= 5 else None, numbered(body, number))[1]) as endpoint:
        words = [f"input={tmp_path / 'in'}", f"output={tmp_path / 'out'}", f"collect.endpoint={endpoint.url}", "collect.model=m", "collect.concurrency=2"]
        process = subprocess.Popen([sys.executable, "-m", "megatron_ext", "collect", "augment", *words], cwd=ROOT, env=environment() | {"OPENAI_API_KEY": KEY})
        deadline = time.monotonic() + 240
        while len(endpoint.asked) < 7 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
        process.wait()
        gate.set()
        assert len(read(tmp_path / "out" / "cache.log")) == 5 and not (tmp_path / "out" / "sft.jsonl").exists()
        done = collect("augment", *words, OPENAI_API_KEY=KEY)
        assert len(endpoint.asked) == 7 + 7 and "12 records" in done.stdout and "new 7" in done.stdout
        run(tmp_path, endpoint, name="whole")
    assert (tmp_path / "whole" / "sft.jsonl").read_bytes() == (tmp_path / "out" / "sft.jsonl").read_bytes()


def test_the_key_is_sent_and_stands_nowhere(tmp_path):
    passages(tmp_path, 2)
    words = (f"input={tmp_path / 'in'}", f"output={tmp_path / 'out'}", "collect.model=m", "collect.key_env=MY_ENDPOINT")
    with FakeEndpoint(numbered) as endpoint:
        done = collect("augment", *words, f"collect.endpoint={endpoint.url}", MY_ENDPOINT=KEY)
        assert {one["authorization"] for one in endpoint.headers} == {f"Bearer {KEY}"}
    said = [done.stdout, done.stderr]
    with FakeEndpoint(lambda body, number: error(401, f"Incorrect API key provided: {KEY}. Find yours at ...")) as endpoint:
        (tmp_path / "out" / "cache.log").unlink()
        done = collect("augment", *words, f"collect.endpoint={endpoint.url}", code=2, MY_ENDPOINT=KEY)
        assert done.stderr.startswith("error: collect.key_env=MY_ENDPOINT: the endpoint answers 401: Incorrect API key provided: ***") and len(endpoint.asked) <= 8
    said += [done.stdout, done.stderr, *(path.read_text(encoding="utf-8") for path in tmp_path.rglob("*") if path.is_file())]
    assert not any(KEY in text for text in said)
    with variable("MY_ENDPOINT", None), pytest.raises(UserError, match="collect.key_env=MY_ENDPOINT: is not set"):
        Endpoint(CollectConfig(endpoint="https://host.example/v1", model="m", key_env="MY_ENDPOINT"))
    with variable("MY_ENDPOINT", "a b"), pytest.raises(UserError, match="does not hold a key"):
        Endpoint(CollectConfig(endpoint="https://host.example/v1", model="m", key_env="MY_ENDPOINT"))
    with variable("MY_ENDPOINT", KEY):
        assert "not encrypted" in Endpoint(CollectConfig(endpoint="http://host.example/v1", model="m", key_env="MY_ENDPOINT")).note


def test_redirects_are_not_followed(tmp_path):
    passages(tmp_path, 1)
    with FakeEndpoint(numbered) as other, FakeEndpoint(lambda body, number: (307, {"Location": f"{other.url}/chat/completions"}, b"")) as endpoint:
        with variable("OPENAI_API_KEY", KEY), pytest.raises(UserError, match="answers 307: .*it redirects"):
            run(tmp_path, endpoint)
        assert other.asked == []


# ---- templates and replies ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", sorted(file.stem for file in CONF.glob("*.yaml") if file.stem != "phrases"))
def test_the_templates_that_are_shipped(name):
    template = Template.load(name)
    item = {"id": "x", "passage": "글 {{ 7*7 }}", "prompt": "물음 {% raw %}?", "title": None, "response": "답", "source": {"id": "d"}}
    found = template.render(item, template.choose(template.examples, item))
    assert found[-1]["role"] == "user" and ("글 {{ 7*7 }}" if template.makes == "pairs" else "물음 {% raw %}?") in found[-1]["content"]  # data is not run
    assert len(template.examples) >= template.shots
    for example in template.examples:  # a reply like the template's own can be used
        kept = list(replies.records(template.makes, example["response"], example, longest=2000, shortest=2, grounded=0.5))
        assert len(kept) == template.count and all(isinstance(one, dict) for one in kept)


@pytest.mark.parametrize(("found", "message"), [
    ([], "holds no mapping"), ({"name": "x"}, "its language is missing"), ({"name": "x", "language": "ko", "makes": "money"}, "its makes is money"),
    ({"name": "x", "language": "ko", "makes": "pairs", "colour": 1}, "its colour is unknown"), ({"name": "x", "language": "ko", "makes": "pairs"}, "must end with one of the user"),
    ({"name": "x", "language": "ko", "makes": "pairs", "messages": [{"role": "user", "content": "{{ pasage }}"}]}, "'pasage' is undefined"),
    ({"name": "x", "language": "ko", "makes": "pairs", "messages": [{"role": "user", "content": "{% for %}"}]}, "cannot be filled in"),
    ({"name": "x", "language": "ko", "makes": "pairs", "messages": [{"role": "user", "content": "{{ ().__class__.__mro__ }}"}]}, "cannot be filled in"),
    ({"name": "x", "language": "ko", "makes": "answer", "sampling": {"temperature": "hot"}}, "its sampling knows"), ({"name": "x", "language": "ko", "makes": "answer", "count": True}, "its count must be a whole number"),
])
def test_templates_that_are_none(found, message):
    with pytest.raises(UserError, match=message):
        Template.of(found, "t.yaml")


def test_a_template_that_is_not_there():
    with pytest.raises(UserError, match="conf/collect has answer, answer_en"):
        Template.load("qa_kr")


def kept(makes: str, text: str, **item: object) -> tuple[list, list]:
    found = list(replies.records(makes, text, {"id": "x", **item}, longest=50, shortest=2, grounded=item.pop("grounded", 0.0)))
    return [one for one in found if isinstance(one, dict)], [str(one) for one in found if isinstance(one, replies.Unusable)]


@pytest.mark.parametrize("text", [PAIRS, f"```json\n{PAIRS}\n```", f"Here you are:\n{PAIRS}\nGood luck!", json.dumps({"pairs": json.loads(PAIRS)}), "Q: 몇 시에 여나요?\nA: 아홉 시에 엽니다.\nQ: 언제 쉬나요?\nA: 토요일에 쉽니다."])
def test_pairs_in_the_forms_that_models_write(text):
    records, reasons = kept("pairs", text)
    assert records == [{"prompt": "몇 시에 여나요?", "response": "아홉 시에 엽니다."}, {"prompt": "언제 쉬나요?", "response": "토요일에 쉽니다."}] and not reasons


@pytest.mark.parametrize(("makes", "text", "reason"), [
    ("pairs", "I cannot do that.", "not_json"), ("pairs", "[1, 2]", "no_pair"), ("pairs", "[]", "no_list"), ("pairs", '[{"question": "a"}]', "no_pair"), ("pairs", '[{"question": "a", "answer": "x"}]', "too_short"),
    ("pairs", json.dumps([{"question": "a", "answer": "x" * 51}]), "too_long"), ("pairs", json.dumps([{"question": "a" * 51, "answer": "xy"}]), "too_long"), ("pairs", "[" * 100_000, "not_json"),
    ("prompts", '["", 3]', "no_prompt"), ("answer", "  ", "empty"), ("answer", "x", "too_short"),
])
def test_replies_that_cannot_be_used(makes, text, reason):
    records, reasons = kept(makes, text, prompt="p")
    assert records == [] and set(reasons) == {reason}


def test_other_wordings_keep_the_answer_and_repeat_nothing():
    assert kept("prompts", '["one", "two", "one", "p", {"question": "three"}]', prompt="p", response="Right") == (
        [{"prompt": word, "response": "Right"} for word in ("one", "two", "three")], ["repeated", "repeated"])
    assert kept("prompts", '["one"]', prompt="p")[0] == [{"prompt": "one"}]


def test_answers_that_the_passage_does_not_hold():
    passage = "도서관은 아홉 시에 엽니다. The fee is 3,000 won."
    assert kept("pairs", '[{"question": "q", "answer": "아홉 시에 연다"}]', passage=passage, grounded=0.6)[0]
    assert kept("pairs", '[{"question": "q", "answer": "대통령이 서울에서 정한다"}]', passage=passage, grounded=0.6) == ([], ["not_grounded"])
    assert replies.overlap("The FEE", passage) == 1.0 and replies.overlap("...", passage) == 0.0


def test_answers_to_be_ranked_and_examples_of_ones_own(tmp_path):
    write(tmp_path / "in" / "sft.jsonl", [{"id": f"s{number}", "prompt": f"Q{number}?", "response": "known", "source": {"id": f"d{number}"}} for number in range(3)])
    examples = write(tmp_path / "examples.jsonl", [{"id": f"e{number}", "prompt": f"E{number}?", "response": f"shown {number}", "source": {"id": f"d{number}"}} for number in range(4)])
    with FakeEndpoint(lambda body, number: f"drawn {number}") as endpoint:
        run(tmp_path, endpoint, "collect.template=answer", "generate.samples=4", "collect.shots=2", f"collect.examples={examples}")
        asked = endpoint.asked[0]["messages"]
    assert len(asked) == 5 and asked[0]["content"].startswith("E") and asked[1]["content"].startswith("shown") and asked[-1]["content"].startswith("Q")
    for body in endpoint.asked:  # no example has the source of what is asked
        number = body["messages"][-1]["content"][1]
        assert f"E{number}?" not in [message["content"] for message in body["messages"]]
    rows = read(tmp_path / "out" / "answers.jsonl")
    assert len(rows) == 12 and {row["prompt"] for row in rows} == {"Q0?", "Q1?", "Q2?"} and rows[0]["model"] == "m"
    with FakeEndpoint(numbered) as endpoint, pytest.raises(UserError, match="holds 0 examples, 3 are to stand"):
        run(tmp_path, endpoint, "collect.template=answer", "collect.shots=3")
