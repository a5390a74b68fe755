"""Generation on one rank against a full forward pass without cache, transformers, and sets and probabilities worked out by hand."""
import math

import decoders
import pytest
import torch

from kernels.rope import rope
from megatron_ext.config.schema import GenerateConfig
from megatron_ext.errors import UserError
from megatron_ext.generate import generate, packed, sampling, single
from megatron_ext.generate.checks import check_layout
from megatron_ext.generate.stage import Stage, decoding
from megatron_ext.parallel.layout import Layout

pytestmark = pytest.mark.usefixtures("connected")

COUNT = 24  # beyond the number of passes after which weights are packed
GREEDY = GenerateConfig(max_tokens=COUNT, temperature=0.0, batch_size=8)
SAMPLED = GenerateConfig(max_tokens=12, temperature=0.8, top_k=40, top_p=0.9, batch_size=8, seed=5)


@pytest.fixture(scope="module")
def engine(connected):
    return decoders.build()


def tokens(completions) -> list[list[int]]:
    return [one.tokens for one in completions]


# ---- the cache -----------------------------------------------------------------------------------------------------------------


@pytest.mark.both
@pytest.mark.parametrize("modules_only", [False, True], ids=["single", "modules"])
@pytest.mark.parametrize("name", decoders.VARIANTS)
def test_logits_with_a_cache_are_those_of_a_full_forward_pass(connected, name, modules_only):
    """Every step of a batch of unequal rows, within 1e-5 of the largest logit."""
    engine = decoders.build(decoders.VARIANTS[name])
    model, prompts = engine.models[0], decoders.prompts()
    following = decoders.prompts([COUNT] * len(prompts))
    truth = [decoders.logits_of(engine, prompt + more) for prompt, more in zip(prompts, following)]
    stage = Stage(model, connected.device, modules_only=modules_only)
    assert (stage._single is None) == modules_only, "the fast path must serve every variant"
    longest = max(map(len, prompts))
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    cache = stage.cache(len(prompts), longest + COUNT)
    worst = 0.0
    with decoding(model):
        padded = torch.tensor([prompt + [3] * (longest - len(prompt)) for prompt in prompts])
        logits = stage.prefill(padded, lengths, None, cache)
        for step in range(COUNT):
            for row, prompt in enumerate(prompts):
                expected = truth[row][len(prompt) + step - 1]
                worst = max(worst, float((logits[row, : decoders.WORDS] - expected).abs().max() / expected.abs().max()))
            new = torch.tensor([more[step] for more in following])
            logits = stage.decode(new, lengths + step, None, cache, longest=longest + step + 1, together=False)
    assert worst < 1e-5


@pytest.mark.both
@pytest.mark.parametrize("modules_only", [False, True], ids=["single", "modules"])
def test_greedy_tokens_are_those_of_a_full_forward_pass(engine, modules_only):
    prompts = decoders.prompts()
    expected = [decoders.greedy(engine, prompt, COUNT) for prompt in prompts]
    assert tokens(generate(engine, prompts, GREEDY, modules_only=modules_only)) == expected
    equal = decoders.prompts([6] * 3)  # rows that stay together take another path through the cache
    expected = [decoders.greedy(engine, prompt, COUNT) for prompt in equal]
    assert tokens(generate(engine, equal, GREEDY, modules_only=modules_only)) == expected


def test_weights_are_packed_only_when_it_pays_and_follow_the_model(connected, monkeypatch):
    """Between two calls the weights may change: nothing of the packed ones is kept."""
    built = []
    make = packed.Linear
    monkeypatch.setattr("megatron_ext.generate.single.Linear", lambda **options: built.append(make(**options)) or built[-1])
    engine = decoders.build()
    prompt = decoders.prompts([4])
    generate(engine, prompt, GenerateConfig(max_tokens=packed.PACK_AFTER, temperature=0.0))
    assert not built[-1]._packed
    before = tokens(generate(engine, prompt, GREEDY))
    weight = engine.models[0].output_layer.weight
    assert bool(built[-1]._packed) == packed.available(weight)
    generate(engine, prompt, GREEDY, pack=False)
    assert not built[-1]._packed
    with torch.no_grad():
        weight.mul_(-1)
    after = tokens(generate(engine, prompt, GREEDY))
    assert after != before and after == [decoders.greedy(engine, prompt[0], COUNT)]


@pytest.mark.parametrize("name", ["llama", "multi-head, partial and interleaved rotary"])
def test_a_token_is_turned_by_the_angles_of_training(connected, name):
    """To the last bit, also far from the start: position x frequency in fp32 would be off by 1e-3 at 10,000."""
    model = decoders.build(decoders.VARIANTS[name]).models[0]
    positions, interleaved = torch.tensor([[0], [321], [10_000]]), model.config.rotary_interleaved
    step = single.SingleToken(model)
    cos, sin = step._rotation(positions, torch.bfloat16)
    angle = positions.double() * model.rotary.inv_freq.double()
    pairs = cos.unflatten(-1, (-1, 2)).transpose(-1, -2) if interleaved else cos.unflatten(-1, (2, -1))
    assert torch.equal(sin[:, 0, 0], angle.sin().float())
    assert torch.equal(pairs[:, 0, 0], angle.cos().float()[:, None].expand(-1, 2, -1))
    x = torch.randn(3, 2, 4, model.config.kv_channels, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected, _ = rope(x.flatten(1, 2), None, angle.cos().float(), angle.sin().float(), interleaved=interleaved)
    assert torch.equal(step._rotate(x, cos, sin).flatten(1, 2), expected)


def test_a_layer_of_other_modules_goes_through_its_own_forward_pass(connected):
    """What the fast path does not know it must not compute."""

    class Doubled(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    engine = decoders.build()
    layer = engine.models[0].decoder.layers[1]
    layer.input_layernorm = Doubled(layer.input_layernorm)
    prompts = decoders.prompts()
    assert tokens(generate(engine, prompts, GREEDY)) == [decoders.greedy(engine, prompt, COUNT) for prompt in prompts]


def test_bf16_follows_its_own_full_forward_pass(connected):
    """8 bits: the log-probabilities of what was drawn, not the tokens, which turn on the last of them."""
    engine = decoders.build(dtype="bf16")
    for one in generate(engine, decoders.prompts(), SAMPLED):
        logits = decoders.logits_of(engine, one.prompt + one.tokens)[len(one.prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(one.tokens)[:, None])[:, 0]
        # The head's own rounding alone is 2^-8 of a logit of about 4.
        assert float((torch.tensor(one.raw_logprobs) - expected).abs().max()) < 0.15


# ---- transformers --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def copied(engine):
    pytest.importorskip("transformers", reason="transformers is not installed here")
    return decoders.llama_copy(engine)


@pytest.mark.both
def test_tokens_and_log_probabilities_are_those_of_transformers(engine, copied):
    for one in generate(engine, decoders.prompts(), GREEDY):
        prompt = torch.tensor([one.prompt])
        out = copied.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=COUNT, do_sample=False, pad_token_id=0)
        assert out[0, len(one.prompt):].tolist() == one.tokens
        with torch.no_grad():
            logits = copied(out).logits[0, len(one.prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(one.tokens)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(one.raw_logprobs), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("settings", [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.6), (0.9, 30, 0.5), (1.0, 0, 0.999)])
def test_what_is_cut_is_what_transformers_cuts(settings):
    warpers = pytest.importorskip("transformers", reason="transformers is not installed here")
    temperature, top_k, top_p = settings
    logits = torch.randn(6, 700, generator=torch.Generator().manual_seed(1))
    expected = warpers.TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = warpers.TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = warpers.TopPLogitsWarper(top_p)(None, expected)
    kept = sampling.truncate(logits / temperature, top_k=top_k, top_p=top_p)
    assert torch.equal(kept.isinf(), expected.isinf())
    assert torch.allclose(kept.softmax(-1), expected.softmax(-1), atol=1e-6)


# ---- sampling ------------------------------------------------------------------------------------------------------------------

PROBABILITIES = (0.05, 0.4, 0.1, 0.25, 0.2)  # of five words


@pytest.mark.parametrize(
    ("top_k", "top_p", "expected"),
    [
        (0, 1.0, {0: 0.05, 1: 0.4, 2: 0.1, 3: 0.25, 4: 0.2}),
        (1, 1.0, {1: 1.0}),
        (2, 1.0, {1: 0.4 / 0.65, 3: 0.25 / 0.65}),
        (9, 1.0, {0: 0.05, 1: 0.4, 2: 0.1, 3: 0.25, 4: 0.2}),
        (0, 0.39, {1: 1.0}),
        (0, 0.5, {1: 0.4 / 0.65, 3: 0.25 / 0.65}),
        (0, 0.7, {1: 0.4 / 0.85, 3: 0.25 / 0.85, 4: 0.2 / 0.85}),
        (3, 0.6, {1: 0.4 / 0.65, 3: 0.25 / 0.65}),  # of the three kept, 0.85 in all, 0.65 are 76 %, 0.4 only 47 %
        (2, 0.6, {1: 1.0}),  # 0.4 of 0.65 are 62 %
    ],
)
def test_sets_and_probabilities_by_hand(top_k, top_p, expected):
    """4,000 numbers spread evenly over [0, 1) draw each word in proportion, and nothing else."""
    draws = 4000
    u = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    logits = torch.tensor(PROBABILITIES).log()[None].expand(draws, -1) + 3.0  # any constant: probabilities do not see it
    drawn, logprobs, raw, words = sampling.sample(logits, u, temperature=1.0, top_k=top_k, top_p=top_p)
    assert set(drawn.tolist()) == set(expected) and set(words.tolist()) == {len(expected)}
    for word, probability in expected.items():
        here = drawn == word
        assert abs(int(here.sum()) - probability * draws) <= 1
        assert torch.allclose(logprobs[here].exp(), torch.tensor(probability), atol=1e-6)
        assert torch.allclose(raw[here].exp(), torch.tensor(PROBABILITIES[word]), atol=1e-6)


def test_each_row_is_cut_by_itself():
    """A row that is sure of itself beside one that is not: 0.9 of 700 equal words are more than are sorted at first."""
    sure = torch.zeros(700).index_fill(0, torch.tensor([3]), 20.0)
    kept = sampling.truncate(torch.stack((sure, torch.arange(700) * 1e-4)), top_k=0, top_p=0.9)
    assert kept.isfinite().sum(-1).tolist()[0] == 1
    probabilities = (torch.arange(700) * 1e-4).double().softmax(-1).flip(0)
    assert int(kept[1].isfinite().sum()) == int((probabilities.cumsum(0) - probabilities < 0.9).sum()) > sampling.CANDIDATES


def test_the_ends_of_the_interval_draw_words_that_were_kept():
    logits = torch.tensor([[-9.0, 2.0, 1.0, -9.0]]).expand(2, -1)
    ends = torch.tensor([0.0, 1 - 2.0**-32], dtype=torch.float64)
    drawn, logprobs, _, words = sampling.sample(logits, ends, temperature=1.0, top_k=2, top_p=1.0)
    assert drawn.tolist() == [1, 2] and logprobs.isfinite().all() and words.tolist() == [2, 2]


def test_temperature_by_hand():
    logits = torch.tensor([[math.log(0.8), math.log(0.2)]]).expand(2, -1)
    drawn, logprobs, *_ = sampling.sample(logits, torch.tensor([0.0, 0.99], dtype=torch.float64), temperature=0.5, top_k=0, top_p=1.0)
    assert drawn.tolist() == [0, 1]  # 0.64 : 0.04
    assert torch.allclose(logprobs.exp(), torch.tensor([0.64 / 0.68, 0.04 / 0.68]))


def test_tied_words_stay_in_together():
    logits = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    assert sampling.truncate(logits, top_k=2, top_p=1.0).isinf().tolist() == [[False, False, False, True]]
    assert sampling.truncate(logits, top_k=0, top_p=0.1).isinf().tolist() == [[False, False, False, True]]


def test_extreme_temperatures_and_logits_stay_finite():
    logits = torch.tensor([[100.0, 0.0, -100.0], [-3e38, 3e38, 0.0]])
    u = torch.full((2,), 1 - 2.0**-32, dtype=torch.float64)
    for temperature in (1e-30, 1e-3, 1.0):
        drawn, logprobs, *_ = sampling.sample(logits, u, temperature=temperature, top_k=0, top_p=1.0)
        assert drawn.tolist() == [0, 1] and logprobs.tolist() == [0.0, 0.0]


def test_the_numbers_of_a_sample_do_not_depend_on_how_many_are_drawn():
    long = sampling.uniforms(5, 17, 1000)
    for count in (1, 7, 16, 500):
        assert torch.equal(sampling.uniforms(5, 17, count), long[:count])
    assert not torch.equal(sampling.uniforms(5, 18, 9), long[:9]) and not torch.equal(sampling.uniforms(6, 17, 9), long[:9])
    assert 0 <= float(long.min()) < 0.01 and 0.99 < float(long.max()) < 1


def test_log_probabilities_are_those_of_both_distributions(engine):
    """From a full forward pass over the whole completion: raw ones, and those of the distribution that was cut."""
    for one in generate(engine, decoders.prompts(), SAMPLED):
        logits = decoders.logits_of(engine, one.prompt + one.tokens)[len(one.prompt) - 1 : -1]
        chosen = torch.tensor(one.tokens)[:, None]
        raw = logits.log_softmax(-1).gather(1, chosen)[:, 0]
        assert torch.allclose(torch.tensor(one.raw_logprobs), raw, atol=2e-5, rtol=0)
        for step, (token, logprob) in enumerate(zip(one.tokens, one.logprobs)):
            probabilities = (logits[step] / SAMPLED.temperature).double().softmax(-1)
            order = probabilities.argsort(descending=True)[: SAMPLED.top_k]
            probabilities = probabilities[order] / probabilities[order].sum()
            size = int((probabilities.cumsum(0) - probabilities < SAMPLED.top_p).sum())
            place = order[:size].tolist().index(token)  # ValueError: a word that was cut has been drawn
            assert logprob == pytest.approx(float((probabilities[place] / probabilities[:size].sum()).log()), abs=5e-5)


def test_greedy_draws_from_a_distribution_of_one_word(engine):
    assert all(logprob == 0.0 for one in generate(engine, decoders.prompts(), GREEDY) for logprob in one.logprobs)


# ---- independence ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.both
def test_a_sample_does_not_depend_on_the_rows_beside_it(engine):
    prompts = decoders.prompts()
    settings = {size: GenerateConfig(max_tokens=12, top_k=40, samples=2, seed=5, batch_size=size) for size in (1, 3, 8, 64)}
    found = {size: tokens(generate(engine, prompts, setting)) for size, setting in settings.items()}
    assert found[1] == found[3] == found[8] == found[64]
    assert len(set(map(tuple, found[1]))) == 2 * len(prompts), "every sample has numbers of its own"
    alone = generate(engine, [prompts[4]], settings[1], sample_ids=[8, 9])
    assert tokens(alone) == found[1][8:10] and [one.sample for one in alone] == [8, 9]
    assert tokens(generate(engine, prompts, GenerateConfig(max_tokens=12, top_k=40, samples=2, seed=6))) != found[1]


def test_rows_that_are_done_leave_the_others_as_they_were(engine):
    """An end-of-document token that many rows meet early: compared with rows that go on alone to the end."""
    prompts = decoders.prompts([3, 5, 8, 13] * 4)
    settings = GenerateConfig(max_tokens=30, top_k=8, seed=2, batch_size=16)
    free = generate(engine, prompts, settings)
    common = torch.tensor(tokens(free)).flatten().bincount().argmax().item()
    ended = generate(engine, prompts, settings, eod=common)
    for whole, cut in zip(free, ended):
        length = whole.tokens.index(common) + 1 if common in whole.tokens else len(whole.tokens)
        assert cut.tokens == whole.tokens[:length]
        assert cut.stop == ("eod" if common in whole.tokens else "max_tokens")
    lengths = {len(one.tokens) for one in ended}
    assert len(lengths) > 4, "rows must leave at different times"


def test_training_goes_on_as_if_nothing_had_been_generated(connected):
    """The same weights, no copy: dropout, gradients and the optimizer are as before."""
    from megatron_ext.data.batches import Batch

    def batch():
        rows = torch.randint(0, decoders.WORDS, (4, 17), generator=torch.Generator().manual_seed(3))
        made = Batch(tokens=rows[:, :-1], labels=rows[:, 1:], loss_mask=torch.ones(4, 16), documents=None,
                     position_ids=torch.arange(16)[None].expand(4, -1))
        return made

    losses = []
    for between in (False, True):
        engine = decoders.build(train=True)
        engine.step([batch()], lr=1e-2, step=0)
        if between:
            drawn = generate(engine, decoders.prompts(), GREEDY)
            assert tokens(drawn)[0] == decoders.greedy(engine, drawn[0].prompt, COUNT)  # weights of after the step
            engine.models[0].train()
            generate(engine, decoders.prompts(), GREEDY)
            assert all(module.training for module in engine.models[0].modules())
        losses.append([engine.step([batch()], lr=1e-2, step=step).loss for step in (1, 2)])
    assert losses[0] == losses[1]


# ---- limits and mistakes ----------------------------------------------------------------------------------------------------------------


def test_a_completion_ends_at_the_longest_sequence(engine):
    longest = engine.config.model.max_sequence_length
    prompts = decoders.prompts([longest - 5, longest - 1, 4])
    found = generate(engine, prompts, GenerateConfig(max_tokens=20, temperature=0.0))
    assert [(len(one.tokens), one.stop) for one in found] == [(5, "max_sequence_length"), (1, "max_sequence_length"), (20, "max_tokens")]
    assert found[0].tokens == decoders.greedy(engine, prompts[0], 5)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([[1], []], "prompt=1: is empty"), ([[1] * 64], "prompt=0: has 64 tokens; .*at most 63"), ([[1, 120]], "outside the vocabulary")],
)
def test_prompts_that_cannot_be_continued(engine, prompts, message):
    with pytest.raises(UserError, match=message):
        generate(engine, prompts, GREEDY)


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1.0}, {"temperature": math.inf}, {"temperature": math.nan}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1},
     {"max_tokens": 0}, {"samples": 0}, {"batch_size": 0}, {"stop": ("",)}],
)
def test_settings_that_mean_nothing(engine, wrong):
    with pytest.raises(UserError, match=f"generate.{next(iter(wrong))}="):
        generate(engine, [[1]], GenerateConfig(**wrong))


def test_stop_strings_need_a_tokenizer(engine):
    with pytest.raises(UserError, match="a tokenizer is needed"):
        generate(engine, [[1]], GenerateConfig(stop=("a",)))


@pytest.mark.parametrize(("layout", "key"), [({"pp": 2, "vpp": 2}, "vpp"), ({"cp": 2}, "cp")])
def test_layouts_that_cannot_generate(layout, key):
    with pytest.raises(UserError, match=f"parallel.{key}=2: generation runs without"):
        check_layout(Layout(**layout, ranks=(0, 1)))


def test_no_prompts_give_no_completions(engine):
    assert generate(engine, [], GREEDY) == []


# ---- the device ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modules_only", [False, True], ids=["single", "modules"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_nothing_is_left_on_the_cpu(connected, name, modules_only):
    """On the meta device, whose tensors meet no others: one that is made on the CPU by oversight is an error, as it is on a GPU."""
    device = torch.device("meta")
    model = decoders.build(decoders.VARIANTS[name]).models[0].to(device)
    stage, rows = Stage(model, device, modules_only=modules_only), 3
    cache = stage.cache(rows, 16)
    with decoding(model):
        lengths = torch.tensor([4, 2, 3], device=device)
        logits = stage.prefill(torch.zeros(rows, 4, dtype=torch.int64, device=device), lengths, None, cache)
        for together in (False, True):
            logits = stage.decode(lengths, lengths, None, cache, longest=5, together=together)
            assert logits.device == device and logits.shape == (rows, 128)
        drawn = sampling.sample(logits.float(), torch.zeros(rows, dtype=torch.float64, device=device), temperature=0.7, top_k=9, top_p=0.9)
        assert all(part.device == device and part.shape == (rows,) for part in drawn)
        if not modules_only:
            with pytest.raises((RuntimeError, NotImplementedError)):
                stage.decode(lengths, torch.tensor([4, 2, 3]), None, cache, longest=5, together=False)
