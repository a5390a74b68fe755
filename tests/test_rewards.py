"""Reward functions of text against values computed by hand; how a configuration asks for functions, and what it is told where it asks wrongly."""
import math
import random
import sys
import unicodedata

import pytest

from megatron_ext.config import rlhf as rules
from megatron_ext.config.compose import compose
from megatron_ext.config.schema import RewardsConfig
from megatron_ext.errors import UserError
from rlhf.rewards import REWARDS, Unanswerable, check, reward, sandbox
from rlhf.rewards.code import confined
from rlhf.rewards.registry import resolve
from rlhf.rewards.text import code_of, common_subsequence, normalised, words

MINE = """
from rlhf.rewards import reward

def plain(prompt, response, *, reference, record):
    return 1.0

def typed(prompt, response, *, reference, record, share: float = 0.5, many: int = 1, on: bool = False, word: str = "a", most: int | None = None, of=2.0):
    return share

def needs(prompt, response, *, reference, record, least: float):
    return least

def anything(prompt, response, *, reference, record, **settings):
    return float(len(settings))

def narrow(response):
    return 1.0

def listed(prompt, response, *, reference, record, names: list = ()):
    return 1.0

def _verify(settings, timeout):
    if settings["share"] > 1:
        raise ValueError("share is at most 1")

@reward("my_own", verify=_verify)
def named(prompt, response, *, reference, record, share: float = 0.5):
    return share

constant = 3
"""


def value(entry: str, response: str, reference: str | None = None, record: dict | None = None) -> float:
    return resolve([entry])[0]("a prompt", response, reference=reference, record=record or {})


def said(entry: str, timeout: float = 10.0) -> str:
    with pytest.raises(UserError) as error:
        check(RewardsConfig(functions=(entry,), timeout=timeout))
    assert error.value.key == "rewards.functions" and str(error.value.value) == entry
    return error.value.reason


# ---- functions ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("entry", "response", "expected"), [
    ("length", "w " * 40, 1.0),
    ("length", "w " * 20, math.exp(-1)),  # 20 off a target of 40, scale 20
    ("length", "", math.exp(-2)),
    ("length:target=10:scale=4", "w " * 12, math.exp(-0.5)),
    ("length:at_most=10", "w " * 15, math.exp(-1)),
    ("length:at_most=10", "", 1.0),
    ("length:at_least=10:at_most=20", "w " * 12, 1.0),
    ("length:at_least=10:at_most=20", "w " * 5, math.exp(-1)),
    ("length:at_least=10", "w " * 10_000, 1.0),
    ("length:target=2:unit=characters:scale=4", "a가나d", math.exp(-0.5)),
    ("repetition", "a b c. A, B, C", -1 / 4),  # abc bca cab abc
    ("repetition:n=1", "no no no no", -3 / 4),
    ("repetition", "a b", 0.0),
    ("repetition", "", 0.0),
])  # fmt: skip
def test_length_and_repetition(entry, response, expected):
    assert value(entry, response) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("entry", "yes", "no"), [
    ("format", ["It is.", "Is it?\n", 'He said "go!"', "(It is.)", "맞아요.", "对。", "Well…"], ["", ".", "It is", "It is,", "...", '"."']),
    ("format:kind=json", ['{"a": [1, null]}', "3", ' "x" '], ["", "{a: 1}", "NaN", "[1, -Infinity]", '{"a": 1} x', "[" * 100_000]),
    ("format:kind=python", ["x = 1", "Look:\n```python\ndef f():\n    return 1\n```\nThere.", "'\\d'"],
     ["", "# nothing", "def f(:", "A sentence it is.", "x = '\0'", "(" * 5000, "```python\nx =\n```"]),
    ("format:pattern=^<think>.*</think>$", ["<think>a, b: c=d</think>"], ["<think>a</think> b", ""]),
    ("format:pattern=(?s)^A.*Z$", ["A\nZ"], ["A\nZ."]),
])  # fmt: skip
def test_format(entry, yes, no):
    assert [value(entry, text) for text in yes] == [1.0] * len(yes)
    assert [value(entry, text) for text in no] == [0.0] * len(no)


@pytest.mark.parametrize(("entry", "response", "reference", "expected"), [
    ("exact_match", "  The\n Answer!! ", "the answer", 1),
    ("exact_match", unicodedata.normalize("NFD", "파리입니다"), "파리입니다.", 1),
    ("exact_match", "STRASSE", "Straße", 1),
    ("exact_match", "1,234,567", "1234567", 1),
    ("exact_match", "-5", "5", 0),
    ("exact_match", "3.5", "35", 0),
    ("exact_match", "co-op", "co op", 1),
    ("exact_match", "", "!", 0),  # what is nothing but punctuation is compared as it is
    ("exact_match", "!", "!", 1),
    ("exact_match", "", "", 1),
    ("exact_match:case=true", "Paris", "paris", 0),
    ("exact_match:punctuation=true", "Paris.", "paris", 0),
    (r"exact_match:extract=#### *(\S+)", "1 + 1\n#### 3\nno:\n#### 2", "so #### 2", 1),
    (r"exact_match:extract=#### *(\S+)", "2", "2", 0),
    (r"exact_match:extract=\d+", "it is 2, no, 3", "3", 1),
    ("overlap", "The cat sat on the mat.", "the cat, on a mat", 8 / 11),
    ("overlap", "mat the on cat", "the cat on a mat", 8 / 9),
    ("overlap:measure=rouge_l", "mat the on cat", "the cat on a mat", 4 / 9),  # "the on"
    ("overlap:measure=rouge_l", "the cat on a mat", "The cat on a mat!", 1.0),
    ("overlap", "猫猫狗", "猫", 2 / 4),
    ("overlap", "", "a", 0.0), ("overlap", "?", "!", 1.0),
])  # fmt: skip
def test_against_the_reference(entry, response, reference, expected):
    assert value(entry, response, reference) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("entry", ["exact_match", "overlap"])
def test_no_reference_is_said(entry):
    with pytest.raises(Unanswerable, match="the record has no reference"):
        value(entry, "a")


def test_common_subsequence_is_the_table_s():
    draw = random.Random(5)
    for _ in range(60):
        a, b = ([draw.randrange(5) for _ in range(draw.randrange(1, 90))] for _ in range(2))
        row = [0] * (len(b) + 1)
        for one in a:
            row = _next(row, one, b)
        assert common_subsequence(a, b) == row[-1]


def _next(row: list[int], one: int, b: list[int]) -> list[int]:
    found = [0]
    for j, other in enumerate(b):
        found.append(row[j] + 1 if one == other else max(row[j + 1], found[j]))
    return found


def test_code_in_a_response():
    assert code_of("x = 1") == "x = 1"
    assert code_of("First:\n```\na\n```\nbetter:\n```python\nb\nc\n```\nOr in C:\n```c\nint d;\n```\n") == "b\nc\n"
    assert code_of("```py\nb\n") == "b\n"  # cut off
    assert code_of("in a list:\n  ```Python\n  b\n  ```") == "  b\n"
    assert code_of("use ```x``` so") == "use ```x``` so"


def test_words_and_normalised_text():
    assert words("Don't stop_me: 3.5 km, 안녕하세요 世界!") == ["don", "t", "stop", "me", "3", "5", "km", "안녕하세요", "世", "界"]
    assert normalised("“A”  b\tC-d; -1.5 (e)") == "a b c d -1.5 e"
    assert normalised("A, b", case=True, punctuation=True) == "A, b"


# ---- how they are asked for --------------------------------------------------------------------------------------------------------

@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine_of_rewards.py").write_text(MINE)
    (tmp_path / "breaks_of_rewards.py").write_text("import no_such_module_at_all\n")
    (tmp_path / "raises_of_rewards.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("rlhf.rewards.registry.REWARDS", dict(REWARDS))
    yield "mine_of_rewards"
    sys.modules.pop("mine_of_rewards", None)


def test_settings_have_types(mine):
    asked = check(RewardsConfig(functions=(
        "length", "length:at_most=7", f"{mine}:typed:share=2:many=-3:on=True:word=x:y, z:most=null:of=1e-2", f"{mine}:plain", "format:pattern=(?:a|b): c",
        f"{mine}:anything:a=1:b=1.5:c=true:d=text", f"{mine}:named:share=1",
    )))  # fmt: skip
    assert [one.name for one in asked] == ["length", "length_2", "typed", "plain", "format", "anything", "named"]
    typed = asked[2].settings
    assert typed == {"share": 2.0, "many": -3, "on": True, "word": "x:y, z", "most": None, "of": 0.01} and type(typed["share"]) is float
    assert asked[4].settings == {"pattern": "(?:a|b): c"} and asked[5].settings == {"a": 1, "b": 1.5, "c": True, "d": "text"}
    assert asked[0].settings == {}


@pytest.mark.parametrize(("entry", "reason"), [
    ("lenght", "did you mean length"), ("length:", "is no NAME"), ("length:40", "is no NAME"), ("a b", "is no NAME"), ("", "is no NAME"),
    ("length:targt=40", "did you mean target"), ("length:target=4.5", "target=4.5 must be a whole number"), ("length:target=4:target=5", "given twice"),
    ("length:target=0", "at least 1"), ("length:target=4:at_most=3", "not both"), ("length:at_least=4:at_most=3", "more than at_most"),
    ("length:scale=0", "greater than 0"), ("length:scale=inf", "must be a number"), ("length:unit=tokens", "words or characters"),
    ("length:record=1", "unknown"), ("format:kind=poem", "kind must be one of"), ("format:pattern=(", "no regular expression"),
    ("exact_match:extract=[", "no regular expression"), ("exact_match:case=maybe", "must be true or false"), ("overlap:measure=bleu", "f1 or rouge_l"),
    ("repetition:n=0", "at least 1"), ("code:seconds=9", "at most 8"), ("code:seconds=0", "greater than 0"), ("code:memory=8", "an interpreter needs"),
    ("no_such_module:fn", "module no_such_module is not there"), ("os.no_such:fn", "module os.no_such is not there"),
    ("breaks_of_rewards:fn", "needs module no_such_module_at_all"), ("raises_of_rewards:fn", "cannot be imported: ZeroDivisionError"),
    ("mine_of_rewards:plan", "did you mean plain"), ("mine_of_rewards:constant", "no function but a int"), ("mine_of_rewards:narrow", "cannot be called as"),
    ("mine_of_rewards:needs", "missing a required"), ("mine_of_rewards:plain:a=1", "there are none"), ("mine_of_rewards:listed:names=a", "cannot be given"),
    ("mine_of_rewards:anything:prompt=a", "cannot be called as"), ("mine_of_rewards:anything:record=a", "unknown"),
    ("mine_of_rewards:named:share=2", "share is at most 1"),
])  # fmt: skip
def test_what_cannot_be_asked_for(mine, entry, reason):
    assert reason in said(entry)


def test_code_is_refused_where_nothing_confines_it(monkeypatch):
    for held, enough in (((), False), (("namespaces",), False), (("landlock",), False), (("mounts", "landlock"), False), (("namespaces", "mounts"), True),
                         (("seccomp", "landlock"), True)):  # fmt: skip
        assert confined(held) == enough
        monkeypatch.setattr(sandbox, "available", lambda held=held: held)
        if enough:
            check(RewardsConfig(functions=("code",)))
        else:
            assert "too little to confine" in said("code")
        check(RewardsConfig(functions=("code:unconfined=true",)))


def test_entries_survive_the_command_line():
    entries = ("length:target=40:unit=words", r"format:pattern=^\d{3} it's: x=\"$", "exact_match:extract=정답: (.*)", "my.module:fn:least=0.3")
    assert compose(["stage=ppo", f"rewards.functions=[{','.join(entries)}]"]).rewards.functions == entries
    config = compose(["stage=ppo", "rewards.functions=['format:pattern=a, b',length]", "rewards.weights=[1,-0.5]"])
    assert config.rewards.functions == ("format:pattern=a, b", "length")


def test_the_front_door_knows_the_names():
    assert set(rules.REWARD_FUNCTIONS) == set(REWARDS)
    assert len({id(one.function) for one in REWARDS.values()}) == len(REWARDS)
    with pytest.raises(ValueError, match="twice"):
        reward("length")(lambda: None)
