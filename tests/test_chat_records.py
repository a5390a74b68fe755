"""Records of every format that people have, and every way in which one can be broken."""
import gzip
import json
from pathlib import Path

import pytest

from megatron_ext.config.schema import ChatConfig
from megatron_ext.errors import UserError
from rlhf.data.records import Bad, Conversation, Prompt, Ranking, parse, read

SHARED = Path(__file__).parents[2] / "shared" / "data"
CHAT = ChatConfig()
USER, BOT = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}


@pytest.mark.parametrize("value", [
    {"prompt": "Why?", "response": "Because."},
    {"messages": [USER, BOT]},
    {"instruction": "Why?", "input": "", "output": "Because."},
    {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]},
])
def test_the_same_conversation_in_every_format(value):
    assert parse(value, CHAT, Conversation) == Conversation((USER, BOT))


def test_alpaca_input_system_message_and_other_columns():
    assert parse({"instruction": "Add.", "input": "1 2", "output": "3"}, CHAT, Conversation).messages[0]["content"] == "Add.\n\n1 2"
    with_system = parse({"prompt": "Why?", "response": "Because."}, ChatConfig(system="Be brief."), Conversation)
    assert with_system.messages == ({"role": "system", "content": "Be brief."}, USER, BOT)
    columns = ChatConfig(prompt_key="Q", response_key="A")
    assert parse({"Q": "Why?", "A": "Because.", "label": "0"}, columns, Conversation) == Conversation((USER, BOT))


@pytest.mark.parametrize("value, ranks", [
    ({"prompt": "Why?", "responses": ["a", "b", "c"], "ranking": [2, 0, 1]}, (1, 2, 0)),
    ({"prompt": "Why?", "responses": ["a", "b", "c"], "ranking": [1, [0, 2]]}, (1, 0, 1)),
    ({"prompt": "Why?", "responses": [{"id": "x", "text": "a"}, {"id": "y", "text": "b"}, {"id": "z", "text": "c"}], "ranking": ["z", "y", "x"]}, (2, 1, 0)),
    ({"prompt": "Why?", "responses": ["a", "b", "c"]}, (0, 1, 2)),  # in the order given
])
def test_rankings(value, ranks):
    found = parse(value, CHAT, Ranking)
    assert found.messages == (USER,) and found.responses == ("a", "b", "c") and found.ranks == ranks


def test_rankings_say_more():
    found = parse({"prompt": "Why?", "responses": ["a", "b", "c"], "ranking": [2, 0], "margin": 0.5, "demonstration": 2}, CHAT, Ranking)
    assert found.responses == ("a", "c") and found.ranks == (1, 0) and found.margin == 0.5 and found.demonstrations == (1,)


def test_preferences_of_anthropic_with_a_prompt_and_as_messages():
    hh = {"chosen": "\n\nHuman: Why?\n\nAssistant: Because.", "rejected": "\n\nHuman: Why?\n\nAssistant: No."}
    plain = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}
    messages = {"chosen": [USER, BOT], "rejected": [USER, {"role": "assistant", "content": "No."}]}
    for value in (hh, plain, messages):
        assert parse(value, CHAT, Ranking) == Ranking((USER,), ("Because.", "No."), (0, 1))
    longer = {"chosen": hh["chosen"] + "\n\nHuman: So?\n\nAssistant: Yes.", "rejected": hh["chosen"] + "\n\nHuman: So?\n\nAssistant: No."}
    assert parse(longer, CHAT, Ranking).messages == (USER, BOT, {"role": "user", "content": "So?"})
    parted = {"chosen": hh["chosen"] + "\n\nHuman: So?\n\nAssistant: Yes.", "rejected": "\n\nHuman: Why?\n\nAssistant: No."}
    assert parse(parted, CHAT, Ranking) == Ranking((USER,), ("Because.\n\nHuman: So?\n\nAssistant: Yes.", "No."), (0, 1))


def test_prompts_come_from_every_format_and_keep_what_reward_functions_read():
    found = parse({"prompt": "Why?", "reference": "Because.", "tests": "assert 1"}, CHAT, Prompt)
    assert found.messages == (USER,) and found.reference == "Because." and found.record["tests"] == "assert 1"
    for value in ({"prompt": "Why?", "response": "Because."}, {"messages": [USER, BOT]},
                  {"chosen": [USER, BOT], "rejected": [USER, {"role": "assistant", "content": "No."}]}):
        assert parse(value, CHAT, Prompt).messages == (USER,) and parse(value, CHAT, Prompt).reference == "Because."


@pytest.mark.parametrize("kind, value, reason", [
    (Conversation, {"prompt": "Why?", "response": " "}, "empty response"),
    (Conversation, {"prompt": " ", "response": "a"}, "empty prompt"),
    (Conversation, {"prompt": 3, "response": "a"}, "prompt is no text"),
    (Conversation, {"question": "Why?"}, "known fields"),
    (Conversation, {"messages": [BOT, USER]}, "does not end with a response"),
    (Conversation, {"messages": []}, "no list of messages"),
    (Conversation, {"messages": [{"role": "user"}]}, "no role or no text"),
    (Conversation, [1], "no object"),
    (Conversation, {"chosen": "a", "rejected": "b"}, "has no prompt and response"),
    (Ranking, {"prompt": "Why?", "response": "a"}, "has no chosen"),
    (Ranking, {"prompt": "Why?", "responses": ["a"], "ranking": [0]}, "only one response"),
    (Ranking, {"prompt": "Why?", "responses": ["a", "b"], "ranking": [0, 7]}, "not there"),
    (Ranking, {"prompt": "Why?", "responses": ["a", "b"], "ranking": [0, 0]}, "twice"),
    (Ranking, {"prompt": "Why?", "responses": ["a", "b"], "ranking": [0]}, "fewer than two"),
    (Ranking, {"prompt": "Why?", "responses": ["a", ""], "ranking": [0, 1]}, "response 1 is empty"),
    (Ranking, {"prompt": "Why?", "responses": ["a", "b"], "ranking": [0, 1], "margin": -1}, "margin"),
    (Ranking, {"prompt": "Why?", "chosen": "a", "rejected": ""}, "empty response"),
    (Ranking, {"prompt": "Why?", "chosen": "a", "rejected": "a"}, "the same"),
    (Ranking, {"chosen": "a", "rejected": "b"}, "no dialogue"),
])
def test_broken_records_say_what_is_wrong(kind, value, reason):
    with pytest.raises(Bad, match=reason):
        parse(value, CHAT, kind)


def test_files_of_each_kind(tmp_path):
    rows = [{"prompt": "Why?", "response": "Because."}, {"prompt": "왜?", "response": "그냥."}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "c.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "d.csv").write_text('prompt,response\nWhy?,Because.\n왜?,"그냥."\n', encoding="utf-8-sig")
    expected = [parse(row, CHAT, Conversation) for row in rows]
    for name in ("a.jsonl", "b.jsonl.gz", "c.json", "d.csv"):
        found, bad = read(tmp_path / name, CHAT, Conversation)
        assert found == expected and bad.count == 0, name
    assert len(read(tmp_path, CHAT, Conversation)[0]) == 8


def test_bad_records_are_named_by_place_counted_and_limited(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "secret", "response": "a"}\n{broken\n\n{"prompt": "secret", "response": ""}\n[]\n', encoding="utf-8")
    found, bad = read(file, CHAT, Conversation)
    assert len(found) == 1 and bad.count == 3
    assert [place.split(".jsonl:")[1] for place in bad.places] == ["2: is no JSON", "4: has an empty response", "5: is no object with fields"]
    with pytest.raises(UserError, match="chat.max_bad_records=1") as refused:
        read(file, ChatConfig(max_bad_records=1), Conversation)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("name, content, reason", [
    ("a.jsonl", "", "holds no record"), ("a.txt", "x", "unknown kind"), ("a.json", "{}", "no JSON list"), ("a.json", "[", "no JSON"),
    ("a.jsonl", '{"text": "x"}\n', "1 records were unusable"),
])
def test_files_that_hold_nothing(tmp_path, name, content, reason):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=reason):
        read(tmp_path / name, CHAT, Conversation)


def test_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match="chat.path"):
        read(tmp_path / "nothing", CHAT, Conversation)
    with pytest.raises(UserError, match="no readable file"):
        read(tmp_path, CHAT, Conversation)
    (tmp_path / "a.csv").write_bytes(b"prompt,response\n\xff,b\n")
    with pytest.raises(UserError, match="not UTF-8"):
        read(tmp_path / "a.csv", CHAT, Conversation)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real files lie in ../shared/data")
def test_real_files_are_taken_whole():
    """2,312 dialogues of Anthropic HH, of which four have an empty response; 11,823 Korean pairs."""
    found, bad = read(SHARED / "hh_harmless_test.jsonl.gz", CHAT, Ranking)
    assert len(found) + bad.count == 2312 and bad.count == 4 and all("empty response" in place for place in bad.places)
    assert all(one.messages[-1]["role"] == "user" for one in found)
    found, bad = read(SHARED / "chatbot_ko.csv", ChatConfig(prompt_key="Q", response_key="A"), Conversation)
    assert len(found) == 11823 and bad.count == 0
