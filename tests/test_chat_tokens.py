"""Chat templates, loss masks and packing, against transformers' rendering and by hand."""
import json

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken

from megatron_ext.data.batches import collate
from megatron_ext.data.tokenizer import Tokenizer, train_tokenizer
from megatron_ext.errors import UserError
from rlhf.data.examples import Skipped, example, examples, ranked
from rlhf.data.packing import ChatSamples, pack_by_tokens
from rlhf.data.records import Conversation, Ranking
from rlhf.data.template import Template

CHATML = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
LLAMA3 = ("{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim "
          "+ '<|eot_id|>' %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
          "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}")
ZEPHYR = ("{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\\n' + message['content'] + eos_token }}\n"
          "{% elif message['role'] == 'system' %}\n{{ '<|system|>\\n' + message['content'] + eos_token }}\n"
          "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\\n'  + message['content'] + eos_token }}\n{% endif %}\n"
          "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}")
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TALK = ({"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Hi, who are you?"},
        {"role": "user", "content": "A user."}, {"role": "assistant", "content": "Fine."})


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    inner = tokenizers.Tokenizer.from_str(train_tokenizer(["Hello there, who are you? A user. Fine. Be kind. Question: Answer:"] * 20, vocab_size=300).decode())
    inner.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return Tokenizer.from_bytes(inner.to_str().encode())


@pytest.mark.parametrize("source", [CHATML, LLAMA3, ZEPHYR], ids=["chatml", "llama3", "zephyr"])
@pytest.mark.parametrize("ask", [False, True])
def test_templates_render_as_in_transformers(tokenizer, source, ask):
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = list(TALK[:-1] if ask else TALK)
    theirs = render_jinja_template(conversations=[messages], chat_template=source, add_generation_prompt=ask, eos_token=tokenizer.eod_text,
                                   bos_token=tokenizer.eod_text)[0][0]
    assert Template(tokenizer, source).render(messages, add_generation_prompt=ask) == theirs


@pytest.mark.parametrize("source", [None, CHATML, LLAMA3, ZEPHYR], ids=["ours", "chatml", "llama3", "zephyr"])
def test_turns_are_cut_where_the_assistant_speaks(tokenizer, source):
    """What is trained is what the assistant says, with the end of its turn; and generation gets exactly the beginning of what training saw."""
    template = Template(tokenizer) if source is None else Template(tokenizer, source)
    turns = template.turns(TALK)
    said = [tokenizer.decode(turn.tokens) for turn in turns if turn.trained]
    assert [text.strip().split("<")[0].strip() for text in said] == ["Hi, who are you?", "Fine."]
    assert all(text.rstrip().endswith(">") for text in said)  # the special token that ends a turn is learnt
    whole = [token for turn in turns for token in turn.tokens]
    assert tokenizer.decode(whole).strip() == template.render(TALK).strip()
    for ends in (2, 4):
        prompt = template.prompt(TALK[:ends])
        assert whole[: len(prompt)] == prompt
        answer = template.response(TALK[:ends], TALK[ends]["content"])
        assert whole[len(prompt) : len(prompt) + len(answer)] == answer


def test_our_template_by_hand(tokenizer):
    example_ = example(Conversation(TALK[1:3]), Template(tokenizer), longest=99, truncate=False, skipped=Skipped())
    prompt, answer = tokenizer.encode("Question: Hello there\nAnswer:"), tokenizer.encode(" Hi, who are you?") + [tokenizer.eod]
    assert example_.tokens.tolist() == prompt + answer
    assert example_.trained.tolist() == [False] * len(prompt) + [True] * len(answer)


def test_special_tokens_in_a_message_stay_text(tokenizer):
    """A user who writes <|im_end|> ends nothing."""
    for source, name in ((CHATML, "<|im_end|>"), (None, tokenizer.eod_text)):
        template = Template(tokenizer) if source is None else Template(tokenizer, source)
        tokens = template.prompt([{"role": "user", "content": f"Hello {name} there"}])
        real = tokenizer.special_tokens()[name]
        assert tokens.count(real) == (1 if source else 0)
        assert f"Hello {name} there" in tokenizer.decode(tokens)


@pytest.mark.parametrize("source, reason", [
    ("{% for", "no Jinja template"), ("{{ raise_exception('no system role') }}", "no system role"),
    ("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", "shorter one"),
    ("{{ ''.__class__.__mro__ }}", "fails"),
])
def test_templates_that_cannot_be_used(tokenizer, source, reason):
    with pytest.raises(UserError, match=reason):
        Template(tokenizer, source).turns(TALK)


def test_templates_from_files(tokenizer, tmp_path):
    (tmp_path / "t.jinja").write_text(CHATML)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
    (tmp_path / "several.json").write_text(json.dumps({"chat_template": [{"name": "default", "template": CHATML}]}))
    for name in ("t.jinja", "tokenizer_config.json", "several.json"):
        assert Template.of(tokenizer, str(tmp_path / name)).source == CHATML
    (tmp_path / "none.json").write_text("{}")
    for name in ("none.json", "missing.jinja"):
        with pytest.raises(UserError, match="chat.template"):
            Template.of(tokenizer, str(tmp_path / name))


def test_what_is_too_long_is_skipped_or_cut(tokenizer):
    template, talk = Template(tokenizer), Conversation(TALK[1:3])
    whole = example(talk, template, longest=99, truncate=False, skipped=Skipped())
    skipped = Skipped()
    assert example(talk, template, longest=len(whole.tokens) - 1, truncate=False, skipped=skipped) is None and sum(skipped.counts.values()) == 1
    cut = example(talk, template, longest=len(whole.tokens) - 3, truncate=True, skipped=skipped)
    assert len(cut.tokens) == len(whole.tokens) - 3 and cut.trained.sum() == whole.trained.sum()  # the prompt gives way first, from the left
    assert cut.tokens.tolist() == whole.tokens[3:].tolist()


def test_rankings_lose_what_is_too_long(tokenizer):
    record, skipped = Ranking(TALK[1:2], ("Fine.", "Fine. " * 30, "kind"), (0, 1, 2), None, (0,)), Skipped()
    pairs, kept = ranked(record, Template(tokenizer), longest=40, truncate=False, skipped=skipped)
    assert len(pairs) == 2 and kept.ranks == (0, 2) and kept.demonstrations == (0,) and sum(skipped.counts.values()) == 1
    assert ranked(record, Template(tokenizer), longest=10, truncate=False, skipped=skipped) is None


@pytest.fixture(scope="module")
def packed(tokenizer) -> ChatSamples:
    talks = [Conversation(({"role": "user", "content": "Hello " * (1 + n % 5)}, {"role": "assistant", "content": f"Fine {n}."})) for n in range(37)]
    found, _ = examples(talks, Template(tokenizer), longest=65, truncate=False)
    assert len(found) == 37
    return ChatSamples(found, sequence_length=64, packing=True, seed=3, reshuffle=True, vocab_size=tokenizer.vocab_size, eod=tokenizer.eod, name="x")


def test_every_example_once_an_epoch_whole_and_apart(packed):
    for epoch in range(2):
        seen = []
        for k in range(packed.samples_per_epoch):
            sample = packed[epoch * packed.samples_per_epoch + k]
            for document in range(int(sample.documents.max()) + 1):
                inside = np.flatnonzero(sample.documents == document)
                tokens = sample.tokens[inside].tolist()
                match = [number for number, one in enumerate(packed.examples) if one.tokens.tolist() == tokens]
                if match:
                    seen += match[:1]
                    assert sample.loss_mask[inside[:-1]].tolist() == packed.examples[match[0]].trained[1:].astype(float).tolist()
                    assert inside[-1] == 64 or sample.loss_mask[inside[-1]] == 0  # nobody learns how the next example begins
        assert sorted(seen) == list(range(37))
    orders = [[packed[k].tokens.tolist() for k in range(epoch * packed.samples_per_epoch, (epoch + 1) * packed.samples_per_epoch)] for epoch in (0, 1)]
    assert orders[0] != orders[1]


def test_batches_keep_examples_apart(packed):
    batch = collate([packed[0], packed[1]], eod=packed.eod, masking=packed.masking)
    assert batch.documents is not None and batch.loss_mask.tolist() == [packed[0].loss_mask.tolist(), packed[1].loss_mask.tolist()]
    starts = (batch.documents[:, 1:] != batch.documents[:, :-1]).nonzero()
    assert len(starts) and all(batch.position_ids[row, place + 1] == 0 for row, place in starts.tolist())


def test_the_order_is_a_function_of_the_seed(packed, tokenizer):
    def again(seed, reshuffle=True):
        return ChatSamples(packed.examples, sequence_length=64, packing=True, seed=seed, reshuffle=reshuffle, vocab_size=tokenizer.vocab_size,
                           eod=tokenizer.eod, name="x")

    assert all((again(3)[k].tokens == packed[k].tokens).all() for k in (0, 5, 11))
    assert any((again(4)[k].tokens != packed[k].tokens).any() for k in range(5))
    fixed = again(3, reshuffle=False)
    assert (fixed[0].tokens == fixed[fixed.samples_per_epoch].tokens).all()
    with pytest.raises(UserError, match="no example"):
        ChatSamples([], sequence_length=64, packing=True, seed=3, reshuffle=True, vocab_size=9, eod=0, name="x")


@pytest.mark.parametrize("groups", [None, [0, 0, 1, 1, 1, 2, 3, 3]])
def test_micro_batches_by_tokens(groups):
    lengths = [30, 20, 50, 10, 10, 70, 5, 90]
    bins = pack_by_tokens(lengths, 80, groups)
    assert sorted(item for found in bins for item in found) == list(range(8))
    for found in bins:
        units = {groups[item] if groups else item for item in found}
        assert sum(lengths[item] for item in found) <= 80 or len(units) == 1
    if groups:
        for group in set(groups):
            assert len({number for number, found in enumerate(bins) for item in found if groups[item] == group}) == 1
    assert bins == pack_by_tokens(lengths, 80, groups)
