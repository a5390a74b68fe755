"""Chat templates of real models against transformers, by text and by token; what they refuse; and what becomes of conversations that do not fit."""
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken

from megatron_ext.config.schema import ChatConfig
from megatron_ext.data.tokenizer import Tokenizer, train_tokenizer
from megatron_ext.errors import UserError
from rlhf.data.examples import Skipped, example, examples, ranked
from rlhf.data.packing import ChatSamples, best_fit, pack_by_tokens
from rlhf.data.records import Conversation, Ranking, read
from rlhf.data.template import Refused, Template

SHARED = Path(__file__).parents[2] / "shared" / "data"
CHATML = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
LLAMA3 = ("{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + "
          "'<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
          "{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}")
MISTRAL = ("{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
           "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
           "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
           "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}")
ZEPHYR = ("{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\\n' + message['content'] + eos_token }}\n"
          "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\\n'  + message['content'] + eos_token }}\n{% endif %}\n"
          "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}")
# As a training template marks the assistant's words: blocks on lines of their own, whose white space must go as transformers lets it go.
MARKED = ("{%- for message in messages %}\n    {% if message.role == 'assistant' %}\nA:{% generation %}\n{{ message.content }}{{ eos_token }}\n"
          "    {% endgeneration %}\n    {% else %}\nQ: {{ message.content }}\n    {% endif %}\n{% endfor %}\n{% if add_generation_prompt %}\nA:"
          "{% endif %}")
FAMOUS = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "zephyr": ZEPHYR, "marked": MARKED}
SPECIAL = ("<s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
ASK, SAY = {"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Hi, who are you?"}
TALK = (ASK, SAY, {"role": "user", "content": "A user."}, {"role": "assistant", "content": "Fine."})


@pytest.fixture(scope="module")
def inner() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer.from_str(train_tokenizer(["Hello there, who are you? A user. Fine. Question: Answer:"] * 20, vocab_size=300).decode())
    made.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return made


@pytest.fixture(scope="module")
def tokenizer(inner) -> Tokenizer:
    return Tokenizer.from_bytes(inner.to_str().encode())


@pytest.mark.parametrize("name", FAMOUS)
def test_text_and_tokens_as_transformers_has_them(tokenizer, inner, name):
    """Ids too, but for the one border at which we cut and transformers does not: there both halves give the same text."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed here")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token=tokenizer.eod_text, chat_template=FAMOUS[name])
    template = Template(tokenizer, FAMOUS[name])
    for ends, ask in ((1, True), (3, True), (2, False), (4, False)):
        messages = list(TALK[:ends])
        assert template.render(messages, add_generation_prompt=ask) == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    prompt = theirs.apply_chat_template([ASK], tokenize=True, add_generation_prompt=True, return_dict=False)
    assert template.prompt([ASK]) == prompt
    whole = theirs.apply_chat_template(list(TALK[:2]), tokenize=True, return_dict=False)
    ours = [token for turn in template.turns(TALK[:2]) for token in turn.tokens]
    assert inner.decode(ours, skip_special_tokens=False) == inner.decode(whole, skip_special_tokens=False)
    assert ours[: len(prompt)] == prompt


def test_the_mask_of_transformers_is_ours(tokenizer, inner):
    """Where a template marks the assistant's words itself, transformers' own mask covers the same text."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed here")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token=tokenizer.eod_text, chat_template=MARKED)
    found = theirs.apply_chat_template(list(TALK), tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    marked = [token for token, mine in zip(found["input_ids"], found["assistant_masks"]) if mine]
    ours = [token for turn in Template(tokenizer, MARKED).turns(TALK) for token in turn.tokens if turn.trained]
    assert inner.decode(ours, skip_special_tokens=False) == inner.decode(marked, skip_special_tokens=False).replace("\n", "")


@pytest.mark.parametrize("name, end", [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("mistral", "<|endoftext|>"), ("zephyr", "<|endoftext|>")])
def test_a_response_ends_with_the_token_of_its_template_and_nothing_else(tokenizer, name, end):
    """ChatML writes a line break behind it, which is the next turn's."""
    template = Template(tokenizer, FAMOUS[name])
    tokens = template.response([ASK], "Fine.")
    assert tokens[-1] == template.end == tokenizer.special_tokens()[end]
    assert tokenizer.decode(tokens[:-1]).strip() == "Fine." and tokens.count(template.end) == 1
    prompt, answers = template.answers(TALK[:3], ["Fine.", "Hi"])
    assert prompt == template.prompt(TALK[:3]) and answers == [template.response(TALK[:3], text) for text in ("Fine.", "Hi")]


def test_by_hand_with_special_tokens(tokenizer):
    special, text = tokenizer.special_tokens(), tokenizer.encode
    turns = Template(tokenizer, CHATML).turns(TALK[:2])
    begin, end = special["<|im_start|>"], special["<|im_end|>"]
    assert [(turn.tokens, turn.trained) for turn in turns] == [
        ([begin, *text("user\nHello there"), end, *text("\n"), begin, *text("assistant\n")], False),
        ([*text("Hi, who are you?"), end], True), (text("\n"), False),
    ]


@pytest.mark.parametrize("source", [CHATML.partition("{% if add")[0], LLAMA3.partition("{% if add")[0]], ids=["chatml", "llama3"])
@pytest.mark.parametrize("words", ["Hi, who are you?", "a", "t"])
def test_templates_that_know_no_generation_prompt(tokenizer, source, words):
    """The model has to write its header itself, so it learns it, and all of its words: whichever letters header and words share."""
    turns = Template(tokenizer, source).turns((ASK, {"role": "assistant", "content": words}))
    trained = [tokenizer.decode(turn.tokens) for turn in turns if turn.trained]
    assert len(trained) == 1 and "assistant" in trained[0] and trained[0].rstrip().endswith((f"{words}<|im_end|>", f"{words}<|eot_id|>"))


def test_turns_that_are_written_otherwise_later_are_not_learnt(tokenizer):
    """Reasoning that a template drops from earlier answers: the last answer is learnt behind exactly what generation would see."""
    drops = ("{% for m in messages %}{{ m.role }}: {% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('|')[-1] }}{% endif %}{{ eos_token }}"
             "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
    template = Template(tokenizer, drops)
    talk = (ASK, {"role": "assistant", "content": "Hm|Fine."}, *TALK[2:])
    turns = template.turns(talk)
    assert [turn.trained for turn in turns] == [False, True] and turns[0].tokens == template.prompt(talk[:3])
    assert "Hm" not in tokenizer.decode(turns[0].tokens) and turns[1].tokens == [*tokenizer.encode("Fine."), tokenizer.eod]
    assert [turn.trained for turn in template.turns(talk[:2])] == [False, True]


def test_two_answers_in_a_row_and_a_greeting(tokenizer):
    """Both occur in real data. A greeting answers nothing, and is not learnt."""
    template = Template(tokenizer)
    assert [tokenizer.decode(turn.tokens) for turn in template.turns((ASK, SAY, SAY)) if turn.trained] == [f" {SAY['content']}<|endoftext|>"] * 2
    turns = template.turns((SAY, ASK, SAY))
    assert [turn.trained for turn in turns] == [False, True] and tokenizer.decode(turns[0].tokens).startswith("Answer: Hi")


def test_what_a_template_refuses_is_counted_and_what_breaks_it_is_an_error(tokenizer):
    records = [Conversation(TALK), Conversation((ASK, SAY, SAY))]
    found, skipped = examples(records, Template(tokenizer, MISTRAL), longest=99, truncate=False)
    assert len(found) == 1 and [(("must alternate" in reason), count) for reason, count in skipped.counts.items()] == [(True, 1)]
    assert ranked(Ranking((SAY, ASK), ("a", "b"), (0, 1)), Template(tokenizer, MISTRAL), longest=99, truncate=False, skipped=skipped) is None
    for source in ("{{ 1 / 0 }}", "{% for i in range(10 ** 9) %}{% endfor %}", "{{ messages[9].role }}", "{{ messages.append(1) }}"):
        with pytest.raises(UserError, match=r"chat\.template=.*fails on a conversation of user") as error:
            Template(tokenizer, source).turns(TALK)
        assert not isinstance(error.value, Refused)
    with pytest.raises(Refused) as error:
        Template(tokenizer, "{{ raise_exception('no: ' + messages[0].content) }}").render(TALK)
    assert "Hello" not in str(error.value)


def test_tokens_of_a_tokenizer_config(tokenizer, tmp_path):
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"chat_template": MISTRAL, "bos_token": {"content": "<s>"}, "eos_token": "<|im_end|>"}))
    template = Template.of(tokenizer, str(path))
    assert template.render(TALK[:2]) == "<s>[INST] Hello there [/INST]Hi, who are you?<|im_end|>" and template.end == tokenizer.special_tokens()["<|im_end|>"]
    (tmp_path / "chat_template.jinja").write_text(MISTRAL)
    path.write_text(json.dumps({"bos_token": None, "eos_token": "<|im_end|>"}))  # as transformers has written it since 2025
    assert Template.of(tokenizer, str(path)).render(TALK[:2]).startswith("[INST]")
    path.write_text(json.dumps({"chat_template": MISTRAL, "eos_token": "<turn_end>"}))
    with pytest.raises(UserError, match=r"<turn_end>, which is no special token of data\.tokenizer"):
        Template.of(tokenizer, str(path))


def test_truncation_leaves_something_to_learn(tokenizer):
    template, talk = Template(tokenizer), Conversation(TALK[:2])
    whole = example(talk, template, longest=99, truncate=False, skipped=Skipped())
    for longest in range(2, len(whole.tokens)):
        skipped = Skipped()
        cut = example(talk, template, longest=longest, truncate=True, skipped=skipped)
        assert len(cut.tokens) == longest and cut.trained[1:].any() and not cut.trained[0] and sum(skipped.counts.values()) == 1
        pieces = [(whole.tokens[b : b + longest].tolist(), whole.trained[b : b + longest].tolist()) for b in range(len(whole.tokens))]
        assert (cut.tokens.tolist(), cut.trained.tolist()) in pieces
        assert (~cut.trained).sum() >= min(int((~whole.trained).sum()), max(longest // 4, 1))
    skipped = Skipped()
    assert example(talk, template, longest=1, truncate=True, skipped=skipped) is None and "nothing of its response" in next(iter(skipped.counts))


def test_responses_that_are_compared_see_the_same_prompt(tokenizer):
    template = Template(tokenizer)
    record = Ranking(({"role": "user", "content": "Hello there, who are you? " * 6},), ("Fine.", "Hi, who are you? A user."), (1, 0))
    full, answers = template.answers(record.messages, record.responses)
    longest = len(full) + len(answers[0])  # the short one would fit whole
    pairs, kept = ranked(record, template, longest=longest, truncate=True, skipped=Skipped())
    assert pairs[0][0] == pairs[1][0] == full[len(full) - (longest - len(answers[1])) :] and [one for _, one in pairs] == answers and kept.ranks == (1, 0)
    cut, _ = ranked(record, template, longest=8, truncate=True, skipped=Skipped())
    assert cut[0][0] == cut[1][0] == full[-2:] and cut[1][1] == answers[1][:6]
    assert ranked(record, template, longest=1, truncate=True, skipped=Skipped()) is None


def test_reasons_are_counted_and_not_listed(tokenizer):
    """A reason is an event: it must not differ from record to record."""
    template, skipped = Template(tokenizer), Skipped()
    for words in range(1, 30):
        record = Ranking(({"role": "user", "content": "Hello " * words},), ("Fine. " * 25, "Fine. " * words), (0, 1))
        ranked(record, template, longest=40, truncate=True, skipped=skipped)
    assert len(skipped.counts) <= 3 and sum(skipped.counts.values()) > 30


def test_micro_batches_are_few_and_of_like_size():
    draw = np.random.default_rng(1)
    for _ in range(50):
        lengths = draw.integers(1, 60, size=int(draw.integers(1, 40))).tolist()
        groups = draw.integers(0, 12, size=len(lengths)).tolist()
        for given in (None, groups):
            bins = pack_by_tokens(lengths, 100, given)
            assert sorted(item for one in bins for item in one) == list(range(len(lengths))) and bins == sorted(bins)
            for one in bins:
                assert sum(lengths[item] for item in one) <= 100 or len({given[item] if given else item for item in one}) == 1
            for group in set(given or ()):
                assert sum(any(given[item] == group for item in one) for one in bins) == 1
        assert len(pack_by_tokens(lengths, 100)) == len(best_fit(lengths, 100))
    assert [len(one) for one in pack_by_tokens([5] * 8, 30)] == [4, 4]  # best fit alone would give 6 and 2
    assert pack_by_tokens([], 10) == [] and pack_by_tokens([20, 3, 4], 10) == [[0], [1, 2]]
    with pytest.raises(ValueError, match="groups"):
        pack_by_tokens([1, 2], 10, [0])


def test_an_example_that_does_not_fit_is_refused(tokenizer):
    found, _ = examples([Conversation(TALK)], Template(tokenizer), longest=99, truncate=False)
    with pytest.raises(ValueError, match="does not fit"):
        ChatSamples(found, sequence_length=8, packing=True, seed=3, reshuffle=True, vocab_size=tokenizer.vocab_size, eod=tokenizer.eod, name="x")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real files lie in ../shared/data")
def test_all_dialogues_of_anthropic_go_through_our_template(tokenizer):
    found, bad = read(SHARED / "hh_harmless_test.jsonl.gz", ChatConfig(), Ranking)
    # Those in which the assistant speaks twice in a row, and a share of the others.
    twice = [one for one in found if any(a["role"] == b["role"] for a, b in zip(one.messages, one.messages[1:]))]
    assert len(found) + bad.count == 2312 and twice
    template, skipped = Template(tokenizer), Skipped()
    for one in twice + found[::20]:
        pairs, kept = ranked(one, template, longest=100_000, truncate=False, skipped=skipped)
        assert len(pairs) == 2 and kept.ranks == (0, 1) and all(answer[-1] == tokenizer.eod for _, answer in pairs)
    assert not skipped.counts


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real files lie in ../shared/data")
def test_no_held_out_dialogue_begins_as_one_that_is_trained_on():
    from rlhf.prompts import _held_out

    found, _ = read(SHARED / "hh_harmless_test.jsonl.gz", ChatConfig(), Ranking)
    sides = {True: set(), False: set()}
    for one in found:
        sides[_held_out(one.messages, 0.2)].add(one.messages[0]["content"])
    assert not sides[True] & sides[False] and 0.17 < len(sides[True]) / sum(map(len, sides.values())) < 0.23
    system = ({"role": "system", "content": "Be kind."},)
    assert all(_held_out(one.messages, 0.2) == _held_out(system + one.messages, 0.2) for one in found[:200])
