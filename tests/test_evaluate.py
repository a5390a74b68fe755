"""The loss of a split against a loop by hand: every token of every sequence once."""
import math

import decoders
import numpy as np
import pytest
import torch
from generate_ranks import LONGEST, requests

from megatron_ext import platform
from megatron_ext.data.samples import Masking, Sample
from megatron_ext.evaluate.likelihood import Continuation, Likelihood, likelihoods
from megatron_ext.evaluate.split import SplitLoss, evaluate_split

LENGTH = 12


class Fixed:
    """Seven sequences of random tokens; past the last comes an error, as no filler may be read."""

    sequence_length, eod = LENGTH, 3

    def __init__(self, masking: Masking):
        self.masking = masking
        self.rows = torch.randint(0, 40, (7, LENGTH + 1), generator=torch.Generator().manual_seed(5))
        self.documents = np.cumsum(self.rows.numpy() == self.eod, axis=1, dtype=np.int32)

    def __getitem__(self, k: int) -> Sample:
        return Sample(self.rows[k].numpy(), self.documents[k])


@pytest.fixture(scope="module")
def engine():
    platform.connect(platform.install("cpu"), 60)
    yield decoders.build(train=True)
    platform.disconnect()


def by_hand(engine, samples: Fixed, count: int) -> tuple[float, int]:
    losses = []
    for row in samples.rows[:count].tolist():
        chances = decoders.logits_of(engine, row[:-1]).double().log_softmax(-1)
        for place, label in enumerate(row[1:]):
            if not (samples.masking.mask_eod_loss and row[place] == samples.eod):
                losses.append(-float(chances[place, label]))
    return sum(losses) / len(losses), len(losses)


@pytest.mark.parametrize("masking", [Masking(), Masking(mask_eod_loss=True)], ids=["plain", "masked"])
@pytest.mark.parametrize(("count", "micro_batch"), [(7, 1), (7, 2), (7, 7), (7, 16), (5, 3), (1, 4)])
def test_every_token_counts_once(engine, masking, count, micro_batch, monkeypatch):
    monkeypatch.setattr("megatron_ext.evaluate.split.MICRO_BATCHES", 2)  # several calls of the schedule
    samples = Fixed(masking)
    found, (loss, tokens) = evaluate_split(engine, samples, count=count, micro_batch=micro_batch), by_hand(engine, samples, count)
    assert found.tokens == tokens
    assert found.loss == pytest.approx(loss, rel=1e-6)


def test_dropout_is_off_and_on_again(engine):
    from dataclasses import replace

    dropping = decoders.build(replace(decoders.LLAMA, hidden_dropout=0.5, attention_dropout=0.5), train=True)
    samples = Fixed(Masking())
    first, second = (evaluate_split(dropping, samples, count=7, micro_batch=4) for _ in range(2))
    assert first == second == evaluate_split(engine, samples, count=7, micro_batch=4)
    assert all(module.training for module in dropping.models[0].modules())


def test_what_a_loss_means():
    found = SplitLoss(math.log(8), 10)
    assert found.perplexity == pytest.approx(8)
    assert found.bits_per_byte(2.0) == pytest.approx(1.5)  # three bits a token, two bytes
    assert found.bits_per_byte(None) is None
    assert SplitLoss(1e6, 1).perplexity == math.inf and math.isnan(SplitLoss(math.nan, 1).perplexity)


# ---- likelihoods of words behind contexts ------------------------------------------------------------------------------------------------


def by_hand_likelihood(engine, request: Continuation, longest: int) -> Likelihood:
    tokens = [*request.context, *request.words][-(longest + 1) :]
    said = decoders.logits_of(engine, tokens[:-1]).double().log_softmax(-1)[-len(request.words) :]
    return Likelihood(float(said[range(len(request.words)), request.words].sum()), said.argmax(-1).tolist() == list(request.words))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_likelihoods_are_those_by_hand(engine, batch_size, monkeypatch):
    monkeypatch.setattr("megatron_ext.models.likelihood.TOKENS", 5)  # logits of some tokens at a time
    prompt = decoders.prompts((6,))[0]
    asked = [*requests(), Continuation(prompt, decoders.greedy(engine, prompt, 3)), Continuation(prompt, decoders.greedy(engine, prompt, 4)[:3] + [1])]
    found = likelihoods(engine, asked, batch_size=batch_size, max_length=LONGEST)
    expected = [by_hand_likelihood(engine, request, LONGEST) for request in asked]
    assert [one.greedy for one in found] == [one.greedy for one in expected] and found[-2].greedy and not found[-1].greedy
    assert [one.logprob for one in found] == pytest.approx([one.logprob for one in expected], abs=1e-5)
    assert any(len(request.context) + len(request.words) > LONGEST + 1 for request in asked)


@pytest.mark.parametrize("request_", [Continuation([], [1]), Continuation([1], []), Continuation([1], [2] * 17)])
def test_what_cannot_be_scored_is_refused(engine, request_):
    with pytest.raises(ValueError, match="at least one of each, and at most 16 words"):
        likelihoods(engine, [request_], batch_size=1, max_length=16)
