"""The last layer finishes only the tokens that a head reads: the same scores and gradients as when it finishes all, and less work."""
from dataclasses import replace

import decoders
import pytest
import torch

from megatron_ext.config.schema import Config, KernelsConfig, OptimConfig, ParallelConfig
from megatron_ext.data.batches import Batch
from megatron_ext.parallel.layout import Layout
from megatron_ext.train.engine import Engine

pytestmark = [pytest.mark.both, pytest.mark.usefixtures("connected")]
LENGTHS = (5, 9, 2)
SELECT = torch.tensor([1, 2, 3, 7, 11, 15])  # of 16 tokens


class Picked:
    """The logprobs (or a scalar head's numbers) of some tokens, summed with weights. `spare`: says so, or lets the last layer finish all."""

    names = ()

    def __init__(self, spare: bool):
        self.spare = spare

    def needed(self, batch):
        return batch.fields["select"] if self.spare else None

    def score(self, model, hidden, batch):
        self.seen = hidden.shape[0] * hidden.shape[1]
        select = batch.fields["select"]
        return model.values(hidden, select=select) if model.scalar else model.token_scores(hidden, batch.labels, select=select).logprob

    def loss(self, scores, batch):
        return (scores * torch.arange(1.0, len(scores) + 1)).sum(), len(scores), {}


def batch_of(packed: bool, select: torch.Tensor = SELECT) -> Batch:
    tokens = torch.randint(0, decoders.WORDS, (16,), generator=torch.Generator().manual_seed(5))
    documents = torch.repeat_interleave(torch.arange(3, dtype=torch.int32), torch.tensor(LENGTHS))
    positions = torch.cat([torch.arange(length) for length in LENGTHS]) if packed else torch.arange(8).repeat(2)
    shape = (1, 16) if packed else (2, 8)
    return Batch(tokens.view(shape), tokens.roll(-1).view(shape), torch.ones(shape), positions.view(shape), documents[None] if packed else None,
                 {"select": select})


def engine_of(device, *, head: str = "vocabulary", **changes) -> Engine:
    config = replace(Config(model=decoders.VARIANTS["gpt2"], optim=OptimConfig(clip=0.0)), **changes)
    return Engine(config, Layout(), device, vocab_size=decoders.WORDS, head=head)


def found(engine: Engine, batch: Batch, spare: bool):
    """(scores, gradients, tokens that the head was given)."""
    objective = Picked(spare)
    scores = engine.collect([batch], objective)[0].clone()
    engine.step([batch], lr=0.0, step=0, objective=objective)
    return scores, {name: weight.main_grad.clone() for name, weight in engine.models[0].named_parameters()}, objective.seen


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "rows"])
@pytest.mark.parametrize("head", ["vocabulary", "scalar"])
def test_scores_and_gradients_are_those_of_all_tokens(connected, head, packed):
    engine, batch = engine_of(connected, head=head), batch_of(packed)
    (few, fewer, seen), (all_, grads, whole) = found(engine, batch, True), found(engine, batch, False)
    assert (seen, whole) == (len(SELECT), 16)
    torch.testing.assert_close(few, all_, rtol=0, atol=2e-6)
    for name, grad in grads.items():
        assert (fewer[name] - grad).norm() <= 2e-6 * grad.norm().clamp_min(1.0), name
    assert engine.models[0].decoder.layers[-1].needed is None  # generation and evaluation get every token again


@pytest.mark.parametrize("changes", [
    {"kernels": KernelsConfig(layers="plain")},
    {"parallel": ParallelConfig(recompute="full")},  # its backward pass runs the layer again
], ids=["plain", "recompute"])
def test_where_the_layer_finishes_all(connected, changes):
    engine, batch = engine_of(connected, **changes), batch_of(False)
    (few, fewer, seen), (all_, grads, _) = found(engine, batch, True), found(engine, batch, False)
    assert seen == 16 and torch.equal(few, all_) and all(torch.equal(fewer[name], grad) for name, grad in grads.items())


def test_nothing_and_everything_needed(connected):
    engine = engine_of(connected)
    for select in (torch.zeros(0, dtype=torch.int64), torch.arange(16)):
        few, all_ = found(engine, batch_of(True, select), True), found(engine, batch_of(True, select), False)
        assert few[2] == 16 and torch.equal(few[0], all_[0])
