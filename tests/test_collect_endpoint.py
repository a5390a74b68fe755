"""An endpoint that is busy, broken, down or lying: what is asked again, what is left out, what ends the run, and a budget that is never gone over."""
import gzip
import json
import time

import pytest
import yaml
from collecting import FakeEndpoint, error, numbered, passages, read, write
from collecting import augmented as run

from megatron_ext.config.schema import CollectConfig
from megatron_ext.errors import RunFailed, UserError
from rlhf.collect.budget import Budget, Usage, most
from rlhf.collect.endpoint import LARGEST, _pause, _told

# ---- what goes wrong ---------------------------------------------------------------------------------------------------------------

def test_busy_and_broken_answers_are_asked_again(tmp_path):
    passages(tmp_path, 4)
    tries: dict[str, int] = {}

    def reply(body, number):
        which = body["messages"][-1]["content"].split("도서관 ")[1][0]
        tries[which] = tries.get(which, 0) + 1
        if tries[which] == 1:
            if which == "0":
                return error(429, Retry_After="0")
            if which == "1":
                return error(503, Retry_After="0")
            if which == "2":
                raise ConnectionError
        if which == "3":
            return error(400, "maximum context length")
        return numbered(body, number)

    with FakeEndpoint(reply) as endpoint:
        found = run(tmp_path, endpoint)
    assert tries == {"0": 2, "1": 2, "2": 2, "3": 1}
    assert found["left_out"] == {"refused_400": 1} and found["outputs"][0]["records"] == 3 and found["without_reply"] == 1 and not found["complete"]
    lost = [record for record in read(tmp_path / "out" / "cache.log") if record.get("lost")]
    assert len(lost) == 1 and found["spent"]["requests"] == 4  # the one that hung up may have been paid for


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"choices":[]}', b'{"choices":[{"message":{"content":null}}]}', b'{"choices":[{"message":{"content":"\\ud800"}}]}', b"[" * 99999,
                                     b'{"choices":[{"message":{"content":"x"}}],"usage":{"prompt_tokens":-5,"completion_tokens":1}}'])
def test_replies_that_are_none_are_left_out(tmp_path, content):
    passages(tmp_path, 1)
    with FakeEndpoint(lambda body, number: (200, {}, content)) as endpoint, pytest.raises(RunFailed, match="reply_is_no_chat_completion 1"):
        run(tmp_path, endpoint)


def test_an_endpoint_that_is_down_ends_the_run(tmp_path):
    passages(tmp_path, 9)
    write(tmp_path / "in" / "passages.jsonl", [{"id": f"p{number}", "passage": f"도서관 {number}"} for number in range(200)])
    with FakeEndpoint(lambda body, number: error(500, Retry_After="0")) as endpoint:
        with pytest.raises(RunFailed, match="10 requests in a row had no reply .status_500."):
            run(tmp_path, endpoint, "collect.retries=0")
        assert 10 <= len(endpoint.asked) < 20
    with pytest.raises(RunFailed, match="no_connection"):
        run(tmp_path, endpoint, "collect.retries=0")  # it is closed now


def test_waits_between_tries():
    assert _told("3") == 3 and _told("-1") == 0 and _told("99999") == 600 and _told("soon") is None and _told(None) is None and _told("nan") is None
    assert 400 < _told(time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 500))) <= 500
    waits = [_pause(attempt, "ab") for attempt in range(12)]
    assert all(0.25 * 2**attempt <= wait <= 0.75 * 2**attempt for attempt, wait in enumerate(waits[:6])) and max(waits) <= 90 and waits[3] != _pause(3, "cd")


def reply_of(text: str = "[]", **more: object) -> bytes:
    return json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop"}], **more}).encode()


def drip():
    """A byte now and then, without end: never long enough without one for a limit between two of them."""
    yield b" "
    while True:
        time.sleep(0.1)
        yield b" "


def test_a_reply_without_end_is_cut_off_in_time(tmp_path):
    passages(tmp_path, 1)
    with FakeEndpoint(lambda body, number: (200, {}, drip())) as endpoint:
        start = time.monotonic()
        with pytest.raises(RunFailed, match="no_reply_in_time 1"):
            run(tmp_path, endpoint, "collect.timeout=4", "collect.retries=0")  # in half of it the connection has to be there
        assert time.monotonic() - start < 60
    assert [record["lost"] for record in read(tmp_path / "out" / "cache.log")] == [True]  # it may be paid for


def flood():
    while True:
        yield b" " * (1 << 20)


@pytest.mark.parametrize(("headers", "content", "reason"), [
    ({}, flood, "reply_too_large"),
    ({"Content-Encoding": "gzip"}, lambda: [gzip.compress(b" " * (LARGEST + 1))], "reply_too_large"),  # 8 kB on the way
    ({"Content-Encoding": "gzip"}, lambda: [b"\x1f\x8b no gzip"], "reply_is_no_chat_completion"), ({"Content-Encoding": "br"}, lambda: [b"x"], "reply_is_no_chat_completion"),
    ({"Content-Type": "text/event-stream"}, lambda: [b'data: {"choices": [{"delta": {"content": "x"}}]}\n\ndata: [DONE]\n\n'], "reply_is_no_chat_completion"),
])
def test_replies_that_are_too_large_or_packed(tmp_path, headers, content, reason):
    passages(tmp_path, 1)
    with FakeEndpoint(lambda body, number: (200, headers, iter(content()))) as endpoint:
        with pytest.raises(RunFailed, match=f"{reason} 1"):
            run(tmp_path, endpoint)
        assert endpoint.headers[0]["accept-encoding"] == "identity"
    lost, = read(tmp_path / "out" / "cache.log")
    assert lost["lost"] and lost["reply_tokens"] == 1024  # the most that it may have cost


def test_a_packed_reply_is_read_although_nobody_asked_for_it(tmp_path):
    passages(tmp_path, 1)
    packed = gzip.compress(reply_of(json.dumps([{"question": "Q?", "answer": "An answer."}])))
    with FakeEndpoint(lambda body, number: (200, {"Content-Encoding": "gzip"}, packed)) as endpoint:
        run(tmp_path, endpoint)
    assert [row["response"] for row in read(tmp_path / "out" / "sft.jsonl")] == ["An answer."]


@pytest.mark.parametrize(("usage", "spent"), [
    ({}, None), ({"usage": None}, None), ({"usage": {}}, None), ({"usage": {"prompt_tokens": 7}}, None), ({"usage": {"prompt_tokens": "9", "completion_tokens": 3.0}}, (9, 3)),
])
def test_usage_that_is_not_told_counts_as_the_most_that_it_can_be(tmp_path, usage, spent):
    passages(tmp_path, 1)
    with FakeEndpoint(lambda body, number: (200, {}, reply_of(json.dumps([{"question": "Q?", "answer": "An answer."}]), **usage))) as endpoint:
        found = run(tmp_path, endpoint)["spent"]
    largest = most(endpoint.asked[0]["messages"], 1024)
    told = usage.get("usage") or {}
    assert (found["prompt_tokens"], found["reply_tokens"]) == (spent or (told.get("prompt_tokens", largest.prompt), largest.reply))


@pytest.mark.parametrize("usage", ['{"prompt_tokens": Infinity, "completion_tokens": 1}', '{"prompt_tokens": NaN, "completion_tokens": 1}', '{"prompt_tokens": 1, "completion_tokens": 1' + "0" * 4000 + "}",
                                   "[1]", '"much"', '{"prompt_tokens": [1], "completion_tokens": 1}', '{"prompt_tokens": 1e300, "completion_tokens": 1}'])
def test_usage_that_is_nonsense(tmp_path, usage):
    passages(tmp_path, 1)
    content = reply_of("x")[:-1] + f', "usage": {usage}}}'.encode()
    with FakeEndpoint(lambda body, number: (200, {}, content)) as endpoint, pytest.raises(RunFailed, match="reply_is_no_chat_completion 1"):
        run(tmp_path, endpoint, "collect.price_in=1", "collect.max_cost=10")


def test_an_endpoint_that_only_says_nonsense_ends_the_run(tmp_path):
    """Each such reply may be paid for: not the whole input is asked."""
    passages(tmp_path, 200)
    with FakeEndpoint(lambda body, number: (200, {}, b"<html>Log in first</html>")) as endpoint:
        with pytest.raises(RunFailed, match="10 requests in a row had no reply .reply_is_no_chat_completion."):
            run(tmp_path, endpoint)
        assert 10 <= len(endpoint.asked) < 20


def test_busy_without_a_time_is_asked_again_later(tmp_path):
    passages(tmp_path, 1)
    at = []
    with FakeEndpoint(lambda body, number: (at.append(time.monotonic()), error(429) if number == 0 else numbered(body, number))[1]) as endpoint:
        run(tmp_path, endpoint)
    assert 0.2 < at[1] - at[0] < 20


def test_what_an_endpoint_says_cannot_work_a_terminal(tmp_path):
    passages(tmp_path, 1)
    with FakeEndpoint(lambda body, number: error(418, "\x1b]0;owned\x07\x1b[2J\r\nerror: all is well\u202e" + "x" * 10_000)) as endpoint, pytest.raises(UserError) as caught:
        run(tmp_path, endpoint)
    said = str(caught.value)
    assert "answers 418: ]0;owned [2J error: all is well" in said and said.isprintable() and len(said) < 400


@pytest.mark.parametrize("spoilt", [{"text": "x"}, {"key": "zz", "text": "x", "stop": "stop", "prompt_tokens": 1, "reply_tokens": 1, "requests": 1},
                                    {"key": "00", "text": "x", "stop": None, "prompt_tokens": 1, "reply_tokens": 1, "requests": 1}, {"key": "00", "lost": True, "prompt_tokens": None}])
def test_a_cache_with_a_line_that_is_none_is_told_by_its_number(tmp_path, spoilt):
    passages(tmp_path, 1)
    with FakeEndpoint(numbered) as endpoint:
        run(tmp_path, endpoint)
        with (tmp_path / "out" / "cache.log").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(spoilt) + "\n")
        with pytest.raises(UserError, match=r"cache.log:2: is no reply that was kept"):
            run(tmp_path, endpoint)
        assert len(endpoint.asked) == 1


# ---- budget ------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("words", "key"), [(["collect.max_requests=4"], "collect.max_requests"), (["collect.max_tokens=8000"], "collect.max_tokens"),
                                            (["collect.max_cost=0.01", "collect.price_in=1", "collect.price_out=2"], "collect.max_cost")])
def test_a_budget_is_never_gone_over_and_a_larger_one_goes_on(tmp_path, words, key):
    write(tmp_path / "in" / "passages.jsonl", [{"id": f"p{number}", "passage": f"도서관 {number % 10} {number}" + "글" * 300} for number in range(16)])

    def reply(body, number):
        text = json.dumps([{"question": f"질문 {body['messages'][-1]['content'][-60:-40]} {number}?", "answer": "답입니다."}], ensure_ascii=False)
        content = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 800, "completion_tokens": 200}}
        return 200, {}, json.dumps(content).encode()

    with FakeEndpoint(reply) as endpoint:
        for _ in range(2):  # also not by starting again
            with pytest.raises(RunFailed, match=f"{key}="):
                run(tmp_path, endpoint, *words)
        asked = len(endpoint.asked)
        spent = yaml.safe_load((tmp_path / "out" / "augment.yaml").read_text())["spent"]
        assert 0 < asked < 16 and spent["requests"] == asked
        assert {"collect.max_requests": asked <= 4, "collect.max_tokens": asked * 1000 <= 8000, "collect.max_cost": asked * (800 + 400) / 1e6 <= 0.01}[key]
        assert len(read(tmp_path / "out" / "sft.jsonl")) == asked
        run(tmp_path, endpoint, "collect.max_requests=400")
        assert len(endpoint.asked) == 16


def test_what_a_request_can_cost_at_most():
    assert most([{"role": "user", "content": "가나"}], 10) == Usage(6 + 32, 10)
    budget = Budget(CollectConfig(max_tokens=100))
    one = Usage(20, 20)
    assert budget.over(one) is None
    budget.set_aside(one)
    budget.set_aside(one)
    assert budget.over(one) == "collect.max_tokens" and budget.over(one, alone=True) is None
    budget.give_back(one)
    budget.spend(Usage(5, 5))
    assert budget.over(one) is None and budget.facts() == {"requests": 1, "prompt_tokens": 5, "reply_tokens": 5}


