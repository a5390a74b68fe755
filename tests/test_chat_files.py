"""Files of records as they really are: damaged, half in another encoding, with the held-out part beside them."""
import gzip
import json

import pytest

from megatron_ext.config.schema import ChatConfig
from megatron_ext.errors import UserError
from rlhf.data.records import Bad, Conversation, Prompt, Ranking, parse, read

CHAT = ChatConfig()
GOOD = b'{"prompt": "Why?", "response": "Because."}\n'
USER, BOT = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}


def places(bad) -> list[str]:
    return [place.split("/")[-1] for place in bad.places]


def test_every_kind_of_bad_line_counts_against_the_same_limit(tmp_path):
    """Also those that are no JSON at all: the limit that stops them is chat's."""
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"{\n" * 3)
    with pytest.raises(UserError, match=r"^chat\.max_bad_records=2: 3 records cannot be used, the latest .*a\.jsonl:4: is no JSON"):
        read(tmp_path / "a.jsonl", ChatConfig(max_bad_records=2), Conversation)
    assert read(tmp_path / "a.jsonl", ChatConfig(max_bad_records=3), Conversation)[1].count == 3


def test_text_that_no_tokenizer_takes_is_skipped(tmp_path):
    half = b'{"prompt": "Why?", "response": "\\ud83d"}\n'
    whole = b'{"prompt": "Why?", "response": "\\ud83d\\ude00"}\n'
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD + half + whole + b'{"prompt": "\xff", "response": "x"}\n' + b"[" * 100_000 + b"\n")
    found, bad = read(tmp_path / "a.jsonl", CHAT, Conversation)
    assert [one.messages[-1]["content"] for one in found] == ["Because.", "\U0001f600"]
    assert places(bad) == ["a.jsonl:2: is not UTF-8 text", "a.jsonl:4: is not UTF-8 text", "a.jsonl:5: is no JSON"]
    (tmp_path / "b.json").write_bytes(b"[" + half + b"," + whole + b"]")
    found, bad = read(tmp_path / "b.json", CHAT, Conversation)
    assert len(found) == 1 and places(bad) == ["b.json:1: is not UTF-8 text"]


def test_rows_of_csv_are_lost_one_at_a_time(tmp_path):
    rows = [
        b"prompt,response",
        b"one,1",
        b"two,2,and what stood behind a comma",  # would be cut short without a word
        b'three,"3"x',
        b'four,"4',
        b'and a half"',
        b"",
        b"five",
        b"\xc0\xfc,6",
        b'"seven, really",7',
    ]
    (tmp_path / "a.csv").write_bytes(b"\r\n".join(rows))
    found, bad = read(tmp_path / "a.csv", CHAT, Conversation)
    assert [tuple(message["content"] for message in one.messages) for one in found] == [("one", "1"), ("four", "4\r\nand a half"), ("seven, really", "7")]
    assert [place.split(": ")[0] for place in places(bad)] == ["a.csv:3", "a.csv:4", "a.csv:8", "a.csv:9"]
    assert "3 cells" in bad.places[0] and "not UTF-8" in bad.places[3] and "seven" not in str(bad.places)


def test_a_quotation_mark_that_is_never_closed_swallows_no_records_in_silence(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,response\na,b\nc,"d\n' + "e,f\n" * 50, encoding="utf-8")
    with pytest.raises(UserError, match="what begins in line 3"):
        read(tmp_path / "a.csv", CHAT, Conversation)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz", "a.json.gz"])
def test_a_cut_off_archive_is_refused_under_the_key_that_named_it(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(GOOD * 50)[:-9])
    with pytest.raises(UserError, match=r"^chat\.validation=.*truncated"):
        read(tmp_path / name, CHAT, Conversation, key="chat.validation")


def test_held_out_files_are_not_trained_on(tmp_path):
    """chat.validation may lie in the directory that chat.path names."""
    for name in ("train.jsonl", "held.jsonl", ".hidden.jsonl"):
        (tmp_path / name).write_text(json.dumps({"prompt": name, "response": "x"}) + "\n", encoding="utf-8")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "held.jsonl").write_bytes(GOOD)
    chat = ChatConfig(path=str(tmp_path), validation=str(tmp_path / "held.jsonl"))
    assert {one.messages[0]["content"] for one in read(tmp_path, chat, Conversation)[0]} == {"train.jsonl", "Why?"}
    assert [one.messages[0]["content"] for one in read(tmp_path / "held.jsonl", chat, Conversation, key="chat.validation")[0]] == ["held.jsonl"]
    beside = ChatConfig(path=str(tmp_path), validation=str(tmp_path / "more"))
    assert {one.messages[0]["content"] for one in read(tmp_path, beside, Conversation)[0]} == {"train.jsonl", "held.jsonl"}


@pytest.mark.parametrize("kind, value, reason", [
    (Ranking, {"prompt": "Why?", "responses": ["a", "b"], "ranking": [0, 1], "demonstrations": [[0]]}, "demonstration"),
    (Ranking, {"prompt": "Why?", "responses": ["a", "b"], "ranking": [0, 1], "demonstration": 2}, "demonstration"),
    (Ranking, {"prompt": "Why?", "responses": ["a", "b"], "ranking": [True, False]}, "not there"),
    (Ranking, {"prompt": "Why?", "responses": ["a", "b"], "ranking": [0, [[1]]]}, "not there"),
    (Ranking, {"prompt": "Why?", "responses": ["a", "b"], "ranking": [0, 1], "margin": float("nan")}, "margin"),
    (Ranking, {"prompt": [USER, BOT], "chosen": "a", "rejected": "b"}, "ends with a response"),
    (Ranking, {"chosen": [USER, BOT, USER], "rejected": [USER, BOT]}, "does not end with a response"),
    (Ranking, {"chosen": [USER, BOT], "rejected": "b"}, "no list of messages"),
    (Prompt, {"prompt": [USER, BOT]}, "ends with a response"),
    (Prompt, {"messages": [{"role": "system", "content": "Be kind."}, BOT]}, "empty prompt"),
    (Conversation, {"messages": [BOT]}, "empty prompt"),
    (Conversation, {"messages": [USER, {"role": "assistant", "content": " "}, USER, BOT]}, "empty response"),
    (Conversation, {"messages": [{"role": "narrator", "content": "x"}, BOT]}, "unknown role"),
])
def test_broken_records_never_crash(kind, value, reason):
    with pytest.raises(Bad, match=reason) as found:
        parse(value, CHAT, kind)
    assert "narrator" not in str(found.value)


def test_the_assistant_may_speak_twice():
    assert parse({"messages": [USER, BOT, BOT]}, CHAT, Conversation).messages == (USER, BOT, BOT)


def test_a_system_message_by_config_is_no_shared_prompt():
    apart = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"}
    with pytest.raises(Bad, match="same prompt"):
        parse(apart, ChatConfig(system="Be kind."), Ranking)


@pytest.mark.parametrize("shown, places_of", [(True, (0, 2)), (False, ()), (1, (1,)), ([0, 1], (0, 1))])
def test_demonstrations(shown, places_of):
    value = {"prompt": "Why?", "responses": ["a", "b", "c"], "ranking": [[0, 2], 1], "demonstration": shown}
    assert parse(value, CHAT, Ranking).demonstrations == places_of
    assert parse({"prompt": "Why?", "chosen": "a", "rejected": "b", "demonstration": True}, CHAT, Ranking).demonstrations == (0,)


def test_references_that_are_numbers():
    assert parse({"prompt": "6 x 7?", "reference": 42}, CHAT, Prompt).reference == "42"
    assert parse({"prompt": "6 x 7?", "reference": True}, CHAT, Prompt).reference is None
