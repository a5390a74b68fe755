"""Byte-level BPE gives every text back byte for byte; foreign tokenizers are taken as they are, or refused with a way out."""
import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from megatron_ext.data.tokenizer import EOD, Tokenizer, train_tokenizer
from megatron_ext.errors import UserError

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
TEXTS = ["the quick brown fox jumps over the lazy dog " * 5, "대한민국은 민주공화국이다. 대한민국의 주권은 국민에게 있고 ", "def f(x):\n    return x\n"] * 3


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_bytes(train_tokenizer(TEXTS, vocab_size=300))


def random_text(seed: int) -> str:
    draw = random.Random(seed)
    ranges = [(0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF), (0x300, 0x36F), (0x1100, 0x11FF), (0xAC00, 0xD7A3)]
    return "".join(chr(draw.randint(*draw.choice(ranges))) for _ in range(2000))


@pytest.mark.parametrize("seed", range(5))
def test_any_unicode_comes_back_byte_for_byte(tokenizer, seed):
    text = random_text(seed)
    assert tokenizer.decode(tokenizer.encode(text)).encode() == text.encode()


def test_korean_constitution_comes_back_byte_for_byte(tokenizer):
    path = SHARED / "ko_public" / "constitution.txt"
    if not path.exists():
        pytest.skip(f"real Korean data not found at {path}")
    content = path.read_bytes()
    assert tokenizer.decode(tokenizer.encode(content.decode())).encode() == content


def test_corners_come_back(tokenizer):
    for text in ("", " ", "  \n\n\t ", "\ufeff", "\0", "\r\n\r", "가", "e\u0301", "\u0301", "👩‍👩‍👧", EOD):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_is_deterministic_and_fills_the_vocabulary(tokenizer):
    assert train_tokenizer(iter(TEXTS), vocab_size=300) == train_tokenizer(TEXTS, vocab_size=300)
    assert tokenizer.vocab_size == 300 and tokenizer.eod == 0
    assert Tokenizer.from_bytes(train_tokenizer(["a"], vocab_size=4096)).vocab_size == 257


def test_special_text_in_a_document_is_plain_text(tokenizer):
    assert tokenizer.eod not in tokenizer.encode(f"a{EOD}b") and tokenizer.eod not in tokenizer.encode_batch([EOD])[0]
    assert tokenizer.decode([tokenizer.eod]) == EOD and tokenizer.decode([tokenizer.eod], skip_special_tokens=True) == ""


def test_other_special_tokens_of_a_foreign_tokenizer_are_plain_text_too():
    inner = tokenizers.Tokenizer.from_str(train_tokenizer(TEXTS, vocab_size=300).decode())
    inner.add_special_tokens(["<|user|>"])
    tokenizer = Tokenizer.from_bytes(inner.to_str().encode())
    special = inner.token_to_id("<|user|>")
    assert special == 300 and special not in tokenizer.encode("<|user|>hello") + tokenizer.encode_batch(["a<|user|>"])[0]


def test_special_text_is_plain_for_a_unigram_model_too():
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -2.0) for letter in "abs</> ")]
    inner = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    inner.add_special_tokens(["</s>"])
    tokenizer = Tokenizer.from_bytes(inner.to_str().encode())
    assert tokenizer.eod == 1
    ids = tokenizer.encode("a</s>b</s></s>")
    assert 1 not in ids and "".join(inner.id_to_token(token) for token in ids) == "a</s>b</s></s>"
    assert tokenizer.encode_batch(["a</s>", "b"]) == [tokenizer.encode("a</s>"), tokenizer.encode("b")]


def test_foreign_tokenizer_adds_nothing_and_cuts_nothing(tmp_path):
    inner = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "[SEP]": 2, "b": 9}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="[SEP] $A [SEP]", special_tokens=[("[SEP]", 2)])
    inner.enable_truncation(2)
    inner.enable_padding(length=8)
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(tmp_path)
    assert tokenizer.encode("a b a") == [1, 9, 1]
    assert (tokenizer.eod, tokenizer.eod_text, tokenizer.vocab_size) == (2, "[SEP]", 10)
    assert not tokenizer.lossless(["a  b"])


def test_refusals(tmp_path):
    with pytest.raises(UserError, match="data.vocab_size=256: at least 257"):
        train_tokenizer(TEXTS, vocab_size=256)
    with pytest.raises(UserError, match="cannot be read"):
        Tokenizer.from_file(tmp_path / "gone.json")
    (tmp_path / "bad.json").write_text('{"version": "1.0"}')
    with pytest.raises(UserError, match="not a Hugging Face tokenizer.json"):
        Tokenizer.from_file(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_bytes(b"\xff\x00")
    with pytest.raises(UserError, match="not a Hugging Face tokenizer.json"):
        Tokenizer.from_file(tmp_path / "bad.json")
    tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "none.json"))
    with pytest.raises(UserError, match=r"has no end-of-document token; add one of <\|endoftext\|>"):
        Tokenizer.from_file(tmp_path / "none.json")
