"""Encoders against transformers' BERT, and the choice of masked words by hand. Layouts: test_families.py."""
from dataclasses import replace

import decoders
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_ext.config.compose import compose
from megatron_ext.config.schema import Config, KernelsConfig, ModelConfig
from megatron_ext.data.batches import collate
from megatron_ext.data.masked import MaskedSamples
from megatron_ext.data.samples import Masking, Sample
from megatron_ext.parallel.layout import Layout
from megatron_ext.train.engine import Engine

pytestmark = [pytest.mark.both, pytest.mark.usefixtures("connected")]
WORDS, EOD, MASK = 120, 3, 119


class Text:
    """Random words; a document ends after every 16th."""

    sequence_length, samples_per_epoch, eod, masking, vocab_size = 64, 10, EOD, Masking(), MASK

    def __getitem__(self, k: int) -> Sample:
        tokens = np.random.default_rng(k % 50).integers(4, MASK, 65)
        tokens[15::16] = EOD
        return Sample(tokens, (np.arange(65) // 16).astype(np.int32))


def samples(share: float = 0.15, seed: int = 1, split: str = "train", types: int = 2) -> MaskedSamples:
    return MaskedSamples(Text(), mask=MASK, words=MASK, share=share, token_types=types, key=(seed, split))


def engine_of(device, model: ModelConfig | None = None, layers: str = "auto") -> Engine:
    """Gains are not 1 and biases are not 0: a copy that forgets one must show."""
    model = model or replace(compose(["model=micro_bert"]).model, init_std=0.1)
    engine = decoders.stirred(Engine(Config(model=model, kernels=KernelsConfig(layers=layers)), Layout(), device, vocab_size=WORDS, train=False))
    if engine.models[0].output_layer.bias is not None:
        engine.models[0].output_layer.bias.data[WORDS:] = 0
    return engine


def bert_copy(engine: Engine):
    """transformers' `BertForMaskedLM` with the weights of a one-rank engine."""
    from transformers import BertConfig, BertForMaskedLM

    ours, model = engine.models[0], engine.config.model
    heads, hidden = model.num_attention_heads, model.hidden_size
    theirs = BertForMaskedLM(BertConfig(
        vocab_size=WORDS, hidden_size=hidden, num_hidden_layers=model.num_layers, num_attention_heads=heads, intermediate_size=4 * hidden,
        hidden_act="gelu", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=model.max_sequence_length,
        type_vocab_size=model.token_types, layer_norm_eps=model.norm_eps,
    )).eval()

    def copy(target, source):
        target.weight.copy_(source.weight)
        target.bias.copy_(source.bias)

    with torch.no_grad():
        table, bert, head = ours.embedding, theirs.bert, theirs.cls.predictions
        bert.embeddings.word_embeddings.weight.copy_(table.word_embeddings.weight[:WORDS])
        bert.embeddings.position_embeddings.weight.copy_(table.position_embeddings.weight)
        bert.embeddings.token_type_embeddings.weight.copy_(table.tokentype_embeddings.weight)
        copy(bert.embeddings.LayerNorm, table.norm)
        for layer, other in zip(ours.decoder.layers, bert.encoder.layer, strict=True):
            joined, attention = layer.self_attention.linear_qkv, other.attention.self
            for number, target in enumerate((attention.query, attention.key, attention.value)):
                target.weight.copy_(joined.weight.unflatten(0, (heads, 3, -1))[:, number].flatten(0, 1))
                target.bias.copy_(joined.bias.unflatten(0, (heads, 3, -1))[:, number].flatten())
            copy(other.attention.output.dense, layer.self_attention.linear_proj)
            copy(other.attention.output.LayerNorm, layer.input_layernorm)
            copy(other.intermediate.dense, layer.mlp.linear_fc1)
            copy(other.output.dense, layer.mlp.linear_fc2)
            copy(other.output.LayerNorm, layer.pre_mlp_layernorm)
        copy(head.transform.dense, ours.transform)
        copy(head.transform.LayerNorm, ours.transform.norm)
        head.bias.copy_(ours.output_layer.bias[:WORDS])
    return theirs


@pytest.mark.parametrize("layers", ["fused", "plain"])
def test_loss_and_gradients_are_those_of_transformers(connected, layers):
    pytest.importorskip("transformers", reason="transformers is not installed here")
    engine = engine_of(connected, layers=layers)
    theirs, ours = bert_copy(engine), engine.models[0].train()
    batch = collate([samples()[k] for k in range(3)], eod=EOD, masking=Masking())
    targets = batch.labels.masked_fill(batch.loss_mask == 0, -100)
    truth = theirs(input_ids=batch.tokens, token_type_ids=batch.inputs["token_types"], labels=targets)
    needed = engine.objective.needed(batch)
    for which in (None, needed):  # the last layer finishes all tokens, or those that are asked for alone
        ours.zero_grad()
        total, losses = ours(batch.tokens, batch.position_ids, labels=batch.labels, loss_mask=batch.loss_mask, needed=which, **batch.inputs)
        assert float(total.detach() / batch.loss_mask.sum()) == pytest.approx(float(truth.loss.detach()), abs=1e-5)
        each = F.cross_entropy(truth.logits.detach().flatten(0, 1), targets.flatten(), reduction="none").view_as(losses)
        assert float((losses - each).abs().max()) < 3e-5
        (total / batch.loss_mask.sum()).backward()
    truth.loss.backward()
    bert, head = theirs.bert, theirs.cls.predictions
    pairs = [
        (ours.embedding.word_embeddings.weight.grad[:WORDS], bert.embeddings.word_embeddings.weight.grad),
        (ours.embedding.tokentype_embeddings.weight.grad, bert.embeddings.token_type_embeddings.weight.grad),
        (ours.embedding.norm.weight.grad, bert.embeddings.LayerNorm.weight.grad),
        (ours.decoder.layers[0].mlp.linear_fc1.weight.grad, bert.encoder.layer[0].intermediate.dense.weight.grad),
        (ours.transform.weight.grad, head.transform.dense.weight.grad), (ours.transform.norm.bias.grad, head.transform.LayerNorm.bias.grad),
        (ours.output_layer.bias.grad[:WORDS], head.bias.grad),
    ]
    for mine, other in pairs:
        assert float(other.abs().max()) > 0 and float((mine - other).abs().max() / other.abs().max()) < 1e-4
    assert not ours.output_layer.bias.grad[WORDS:].any(), "padding is never said"


def test_documents_that_are_kept_apart_do_not_see_one_another(connected):
    """In both kinds of layers; and a token sees what comes after it."""
    masking = Masking(reset_positions=True, reset_attention=True)
    batch = collate([samples()[0]], eod=EOD, masking=masking)
    other = batch.tokens.clone()
    other[0, 20] = 4 + (other[0, 20] - 3) % 100
    found = {}
    for layers in ("fused", "plain"):
        engine, seen = engine_of(connected, layers=layers), []
        for tokens in (batch.tokens, other):
            with torch.no_grad():
                changed = replace(batch, tokens=tokens)
                engine.collect([changed], Hidden(seen))
        apart = (seen[1] - seen[0])[:, 0].abs().amax(-1)
        assert float(apart[:16].max()) == 0 == float(apart[32:].max()) and float(apart[16:32].min()) > 1e-5
        found[layers] = seen[0]
    assert float((found["fused"] - found["plain"]).abs().max()) < 1e-5


class Hidden:
    """An objective that keeps the last norm's output."""

    names = ()

    def __init__(self, kept: list):
        self.kept = kept

    def needed(self, batch):
        return None

    def score(self, model, hidden, batch):
        self.kept.append(hidden.clone())
        return hidden


# ---- which words ---------------------------------------------------------------------------------------------------------------------


def test_one_sample_is_masked_as_the_paper_says():
    text, sample = Text()[5], samples()[5]
    assert np.array_equal(sample.labels, text.tokens[:-1]) and sample.tokens.shape == sample.labels.shape == sample.loss_mask.shape == (64,)
    chosen = np.flatnonzero(sample.loss_mask)
    assert len(chosen) == 9 == round(0.15 * 60) and not (sample.labels[chosen] == EOD).any()  # 4 of 64 are ends of documents
    assert np.array_equal(np.delete(sample.tokens, chosen), np.delete(sample.labels, chosen))
    assert np.array_equal(sample.inputs["token_types"], (np.arange(64) // 16) % 2)
    assert samples(types=0)[5].inputs == {}


def test_shares_over_many_samples():
    """80 % masks, 10 % random, 10 % as they were: each within 5 standard errors; every place as often as any other."""
    whole = samples()
    fates, places, drawn = np.zeros(3), np.zeros(64), []
    for k in range(1500):
        sample = whole[k]
        chosen = np.flatnonzero(sample.loss_mask)
        tokens, labels = sample.tokens[chosen], sample.labels[chosen]
        fates += [(tokens == MASK).sum(), ((tokens != MASK) & (tokens != labels)).sum(), (tokens == labels).sum()]
        places[chosen] += 1
        drawn += tokens[(tokens != MASK) & (tokens != labels)].tolist()
    count = fates.sum()
    assert count == 1500 * 9
    same = 0.1 / MASK  # a random word may be the word itself
    for share, expected in zip(fates / count, (0.8, 0.1 - same, 0.1 + same)):
        assert abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / count)
    assert places[15::16].sum() == 0
    inner = np.delete(places, np.arange(15, 64, 16))
    assert np.abs(inner - 1500 * 0.15).max() < 5 * np.sqrt(1500 * 0.15 * 0.85)
    assert min(drawn) < 10 and max(drawn) > MASK - 10 and MASK not in drawn


def test_the_choice_depends_on_seed_split_and_number_alone():
    whole = samples()
    alone = {k: samples()[k] for k in (9, 2, 0)}
    assert all(np.array_equal(whole[k].tokens, sample.tokens) for k, sample in alone.items())
    for other in (samples(seed=2), samples(split="validation")):
        assert not np.array_equal(other[2].loss_mask, whole[2].loss_mask)
    assert not np.array_equal(whole[2].loss_mask, whole[52].loss_mask), "the same text in a later epoch is masked anew"
