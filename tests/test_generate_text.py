"""From tokens back to text: characters and stop strings that lie across tokens. The model's draws are scripted here."""
import decoders
import pytest
import torch

from megatron_ext import platform
from megatron_ext.config.schema import GenerateConfig
from megatron_ext.data.tokenizer import Tokenizer, train_tokenizer
from megatron_ext.generate import generate, sampling, text

KOREAN = "대한민국은 민주공화국이다."


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Bytes and a few merges of English: a Korean syllable is three tokens."""
    found = Tokenizer.from_bytes(train_tokenizer(["the cat and the hat and the bat"] * 3, vocab_size=270))
    assert len(found.encode("대")) == 3
    return found


@pytest.fixture(scope="module")
def engine(tokenizer):
    platform.connect(platform.install("cpu"), 60)
    yield decoders.build(words=tokenizer.vocab_size)
    platform.disconnect()


@pytest.fixture
def say(engine, tokenizer, monkeypatch):
    """say(prompts, answers, **settings): completions of a model that answers so; the fixture's own sampler replaces the drawing alone."""

    def run(prompts: list[str], answers: list[list[int]], **settings):
        step = iter(range(1000))
        width = max(map(len, answers))
        script = torch.tensor([answer + [0] * (width - len(answer)) for answer in answers])

        def sample(logits, u, **_):
            drawn = script[:, next(step)]  # a group of rows that are of one length and stay until all are done
            assert len(logits) == len(drawn)
            return drawn, torch.zeros(len(drawn)), torch.zeros(len(drawn)), torch.ones_like(drawn)

        monkeypatch.setattr(sampling, "sample", sample)
        monkeypatch.setattr("megatron_ext.generate.decode.LEAVING", 0)
        return generate(engine, [tokenizer.encode(prompt) for prompt in prompts], GenerateConfig(**settings), tokenizer=tokenizer)

    return run


def test_a_cut_character_is_left_out_and_a_whole_one_is_kept(say, tokenizer):
    ids = tokenizer.encode(KOREAN)
    for length in range(1, len(ids) + 1):
        [one] = say(["the"], [ids], max_tokens=length)
        assert one.tokens == ids[:length] and one.stop == "max_tokens"
        assert KOREAN.startswith(one.text) and "\ufffd" not in one.text
        whole = bytes(KOREAN, "utf-8")[: len(bytes(tokenizer.decode(ids[:length]).rstrip("\ufffd"), "utf-8"))]
        assert one.text == whole.decode("utf-8")
    assert one.text == KOREAN


def test_a_character_that_begins_in_the_prompt_is_finished_by_the_completion(tokenizer):
    ids = tokenizer.encode("a대b")
    for cut in range(1, len(ids)):
        added = text.continuation(tokenizer, ids[:cut], ids[cut:])
        assert added == {1: "대b", 2: "대b", 3: "대b", 4: "b"}[cut]


@pytest.mark.parametrize("stop", ["공화", "국", "다.", "민국은 민주"])
def test_a_korean_stop_string_is_found_across_tokens(say, tokenizer, stop):
    ids = tokenizer.encode(KOREAN)
    [one] = say(["the"], [ids], max_tokens=len(ids), stop=(stop,))
    assert one.stop == "stop_string"
    assert one.text == KOREAN[: KOREAN.index(stop)]
    assert one.tokens == tokenizer.encode(KOREAN[: KOREAN.index(stop) + len(stop)]), "it ends with the token that completed it"


def test_a_stop_string_ends_inside_a_token(say, tokenizer):
    ids = tokenizer.encode(" the cat and the bat")
    assert any(len(tokenizer.decode([token])) > 3 for token in ids)
    [one] = say(["a"], [ids], max_tokens=len(ids), stop=("he c", "zzz"))
    assert (one.text, one.stop) == (" t", "stop_string")


def test_the_first_of_several_stop_strings_counts(say, tokenizer):
    [one] = say(["a"], [tokenizer.encode("xyz.")], max_tokens=4, stop=("z", "yz"))
    assert one.text == "x"


def test_a_stop_string_in_the_prompt_does_not_count(say, tokenizer):
    ids = tokenizer.encode("bc")
    [one] = say(["ab"], [ids], max_tokens=2, stop=("ab", "abb"))
    assert (one.text, one.stop) == ("bc", "max_tokens")


def test_a_stop_string_longer_than_any_window_of_tokens(say, tokenizer):
    words = "x" * 50 + "yz"
    [one] = say(["a"], [tokenizer.encode(words + "w")], max_tokens=60, stop=("x" * 40 + "yz",))
    assert one.text == "x" * 10 and one.stop == "stop_string"


def test_end_of_document_is_a_token_and_no_text(say, tokenizer):
    found = say(["a", "b"], [[*tokenizer.encode("hi"), tokenizer.eod, 65], tokenizer.encode("long")], max_tokens=4)
    assert [(one.text, one.stop, len(one.tokens)) for one in found] == [("hi", "eod", 3), ("long", "max_tokens", 4)]
    assert found[0].tokens[-1] == tokenizer.eod
    [empty] = say(["a"], [[tokenizer.eod]], max_tokens=4)
    assert (empty.text, empty.stop) == ("", "eod")


def test_a_decoder_that_looks_to_the_left():
    """SentencePiece style: the first word loses its space when it is decoded alone."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<s>": 0, "</s>": 1, "▁a": 2, "▁cat": 3, "s": 4, "▁": 5}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(words, []))
    inner.decoder = tokenizers.decoders.Metaspace()
    tokenizer = Tokenizer.from_bytes(inner.to_str().encode())
    assert tokenizer.decode([3, 4]) == "cats"
    assert text.continuation(tokenizer, [2], [3, 4]) == " cats"
    stop = text.StopStrings(tokenizer, (" cat",))
    assert stop.found([2], [3]) and stop.cut(" cats") == ""
    assert stop.found([2], [4] * 40 + [3])


def test_bytes_that_are_no_text_inside_are_shown_as_such(tokenizer):
    broken = tokenizer.encode("대")[:2] + tokenizer.encode("a")
    assert text.continuation(tokenizer, tokenizer.encode("x"), broken) == "\ufffda"
