"""Encoder-decoders against transformers' T5 and formulas written out, and span corruption by hand. Layouts: test_families.py."""
import math
from dataclasses import replace

import decoders
import numpy as np
import pytest
import torch

from megatron_ext.config.compose import compose
from megatron_ext.config.schema import Config, DataConfig, ModelConfig
from megatron_ext.config.spans import Spans, spans_of
from megatron_ext.data.batches import Batch
from megatron_ext.data.samples import Masking, Sample
from megatron_ext.data.spans import SpanSamples
from megatron_ext.models.relative import buckets
from megatron_ext.parallel.layout import Layout
from megatron_ext.train.engine import Engine

pytestmark = [pytest.mark.both, pytest.mark.usefixtures("connected")]
WORDS, EOD, SENTINELS = 120, 3, list(range(110, 120))


def preset(name: str, **changes) -> ModelConfig:
    return replace(compose([f"model={name}"]).model, init_std=0.1, **changes)


def stirred(model: ModelConfig, device) -> Engine:
    return decoders.stirred(Engine(Config(model=model), Layout(), device, vocab_size=WORDS, train=False))


def batch_of(rows: int, length: int, said: int) -> Batch:
    generator = torch.Generator().manual_seed(3)
    tokens, target = (torch.randint(0, WORDS, (rows, size), generator=generator) for size in (length, said))
    before = torch.cat((torch.full((rows, 1), EOD), target[:, :-1]), dim=1)
    return Batch(tokens, target, torch.ones(rows, said), torch.arange(length).expand(rows, -1), None, inputs={"decoder_tokens": before})


def t5_copy(engine: Engine):
    """transformers' `T5ForConditionalGeneration` with the weights of a one-rank engine."""
    from transformers import T5Config, T5ForConditionalGeneration

    ours, model = engine.models[0], engine.config.model
    heads, width = model.num_attention_heads, model.head_dim
    theirs = T5ForConditionalGeneration(T5Config(
        vocab_size=WORDS, d_model=model.hidden_size, d_kv=width, d_ff=model.ffn_hidden_size, num_layers=model.num_layers,
        num_decoder_layers=model.decoder_layers, num_heads=heads, relative_attention_num_buckets=model.relative_buckets,
        relative_attention_max_distance=model.relative_distance, dropout_rate=0.0, layer_norm_epsilon=model.norm_eps, feed_forward_proj="relu",
        decoder_start_token_id=EOD, pad_token_id=EOD, eos_token_id=EOD, tie_word_embeddings=True,
    )).eval()

    def apart(joined, count):
        """megatron-core's rows are q, k, v (or k, v) of head 0, then of head 1, ..."""
        return joined.unflatten(0, (heads, count, width)).transpose(0, 1).flatten(1, 2)

    with torch.no_grad():
        theirs.shared.weight.copy_(ours.embedding.word_embeddings.weight[:WORDS])
        for stack, other, table in ((ours.encoder, theirs.encoder, ours.encoder_positions), (ours.decoder, theirs.decoder, ours.decoder_positions)):
            other.block[0].layer[0].SelfAttention.relative_attention_bias.weight.copy_(table.weight.t())
            other.final_layer_norm.weight.copy_(stack.final_layernorm.weight)
            for layer, block in zip(stack.layers, other.block, strict=True):
                own, attention = layer.self_attention, block.layer[0].SelfAttention
                for target, source in zip((attention.q, attention.k, attention.v), apart(own.linear_qkv.weight, 3)):
                    target.weight.copy_(source)
                attention.o.weight.copy_(own.linear_proj.weight)
                block.layer[0].layer_norm.weight.copy_(layer.input_layernorm.weight)
                if layer.crosses:
                    cross, attention = layer.cross_attention, block.layer[1].EncDecAttention
                    attention.q.weight.copy_(cross.linear_q.weight)
                    for target, source in zip((attention.k, attention.v), apart(cross.linear_kv.weight, 2)):
                        target.weight.copy_(source)
                    attention.o.weight.copy_(cross.linear_proj.weight)
                    block.layer[1].layer_norm.weight.copy_(layer.pre_cross_attn_layernorm.weight)
                feed = block.layer[-1]
                feed.layer_norm.weight.copy_(layer.pre_mlp_layernorm.weight)
                feed.DenseReluDense.wi.weight.copy_(layer.mlp.linear_fc1.weight)
                feed.DenseReluDense.wo.weight.copy_(layer.mlp.linear_fc2.weight)
    return theirs


def test_logits_loss_and_gradients_are_those_of_transformers(connected):
    pytest.importorskip("transformers", reason="transformers is not installed here")
    engine = stirred(preset("micro_t5"), connected)
    theirs, batch, ours = t5_copy(engine), batch_of(3, 40, 16), engine.models[0].train()
    truth = theirs(input_ids=batch.tokens, labels=batch.labels)
    logits = ours(batch.tokens, batch.position_ids, **batch.inputs)[..., :WORDS]
    total, losses = ours(batch.tokens, batch.position_ids, labels=batch.labels, **batch.inputs)
    assert float(truth.logits.std()) > 0.5, "weights so small that every model gives the same"
    assert float((logits - truth.logits).detach().abs().max()) < 1e-5
    assert float(losses.mean() - truth.loss.detach()) == pytest.approx(0, abs=1e-5)
    (total / losses.numel()).backward()
    truth.loss.backward()
    pairs = [
        (ours.encoder_positions.weight.grad.t(), theirs.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.grad),
        (ours.decoder_positions.weight.grad.t(), theirs.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.grad),
        (ours.decoder.layers[0].cross_attention.linear_q.weight.grad, theirs.decoder.block[0].layer[1].EncDecAttention.q.weight.grad),
        (ours.encoder.layers[0].mlp.linear_fc1.weight.grad, theirs.encoder.block[0].layer[1].DenseReluDense.wi.weight.grad),
        (ours.embedding.word_embeddings.weight.grad[:WORDS], theirs.shared.weight.grad),
    ]
    for mine, other in pairs:
        assert float(other.abs().max()) > 0 and float((mine - other).abs().max() / other.abs().max()) < 1e-4


@pytest.mark.parametrize("both_ways", [True, False])
@pytest.mark.parametrize(("count", "furthest"), [(32, 128), (16, 20), (8, 9)])
def test_buckets_are_those_of_transformers(both_ways, count, furthest):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5", reason="transformers is not installed here")
    places = torch.arange(300)
    truth = t5.T5Attention._relative_position_bucket(places[None, :] - places[:, None], bidirectional=both_ways, num_buckets=count, max_distance=furthest)
    assert torch.equal(buckets(300, count, furthest, both_ways=both_ways, device=torch.device("cpu")), truth)


def test_sinusoidal_positions_and_scaled_words_are_the_formula(connected):
    engine = stirred(preset("micro_transformer"), connected)
    embedding, tokens = engine.models[0].embedding, torch.tensor([[5, 7, 5, 9]])
    found = embedding(tokens, torch.arange(4)[None])
    for place, word in enumerate(tokens[0]):
        for i in range(0, 64, 2):
            angle = place / 10000 ** (i / 64)
            for column, wave in ((i, math.sin(angle)), (i + 1, math.cos(angle))):
                assert float(found[place, 0, column]) == pytest.approx(8 * float(embedding.word_embeddings.weight[word, column]) + wave, abs=1e-5)


def test_the_decoder_sees_all_of_the_encoder_and_nothing_of_its_own_future(connected):
    ours, batch = stirred(preset("micro_transformer"), connected).models[0].eval(), batch_of(1, 16, 8)

    def logits(tokens, before):
        with torch.no_grad():
            return ours(tokens, batch.position_ids, decoder_tokens=before)[0]

    before = batch.inputs["decoder_tokens"]
    base = logits(batch.tokens, before)
    later, other = before.clone(), batch.tokens.clone()
    later[0, 5], other[0, 15] = 1, 1
    changed = (logits(batch.tokens, later) - base).abs().amax(-1)
    assert float(changed[:5].max()) == 0 and float(changed[5:].min()) > 1e-4
    assert float((logits(other, before) - base).abs().amax(-1).min()) > 1e-4


@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("name", ["micro_t5", "micro_transformer"])
def test_recomputation_gives_the_same_gradients(connected, name, recompute):
    """Those of the tables of relative positions too, which reach every layer."""
    batch, found = batch_of(2, 16, 8), []
    for words in ((), (f"parallel.recompute={recompute}", *(["parallel.recompute_layers=2"] if recompute == "full" else []))):
        config = compose([f"model={name}", *words])
        ours = Engine(config, Layout(), connected, vocab_size=WORDS, train=False).models[0].train()
        ours(batch.tokens, batch.position_ids, labels=batch.labels, **batch.inputs)[0].backward()
        found.append({key: parameter.grad for key, parameter in ours.named_parameters()})
    assert found[0].keys() == found[1].keys()
    apart = {key: float((found[1][key] - grad).abs().max() / grad.abs().max()) for key, grad in found[0].items()}
    assert max(apart.values()) < 1e-6, apart  # bits of the tables and of the encoder's output, whose gradients of several layers are added in another order


# ---- the data ----------------------------------------------------------------------------------------------------------------------


class Text:
    """Samples that count up, so that every token says where it stood."""

    sequence_length, samples_per_epoch, eod, masking, vocab_size = 34, 10, EOD, Masking(), 1000

    def __getitem__(self, k: int) -> Sample:
        return Sample(np.arange(35, dtype=np.int64) + 100 + k % 50, np.zeros(35, dtype=np.int32))


def samples(spans: Spans, **changes) -> SpanSamples:
    return SpanSamples(Text(), spans=spans, sentinels=[2000, 2001, 2002], key=(changes.get("seed", 1), changes.get("split", "train")))


def test_the_lengths_are_those_of_t5s_code():
    """T5's own: 512 tokens in, 568 of text, 114 to say (random_spans_helper); ours padded to 120."""
    assert spans_of(512, 0.15, 3.0) == Spans(568, 85, 28, 512, 120)
    assert spans_of(32, 0.15, 3.0) == Spans(34, 5, 2, 32, 8)


def test_text_can_be_put_together_again_from_what_is_read_and_what_is_said():
    spans = spans_of(32, 0.15, 3.0)
    for k in range(20):
        sample = samples(spans)[k]
        assert len(sample.tokens) == 32 and len(sample.labels) == 8
        said, pieces = sample.labels[sample.loss_mask > 0].tolist(), {}
        assert said[-1] == EOD and sample.inputs["decoder_tokens"].tolist() == [EOD, *sample.labels[:-1]]
        for token in said[:-1]:
            if token >= 2000:
                pieces[token] = []
            else:
                pieces[max(pieces)].append(token)
        assert list(pieces) == [2000, 2001] and sum(map(len, pieces.values())) == 5 and all(pieces.values())
        read = sample.tokens.tolist()
        assert read[-1] == EOD
        assert [token for word in read[:-1] for token in pieces.get(word, [word])] == (np.arange(34) + 100 + k).tolist()


def test_cuts_depend_on_seed_split_and_number_alone_and_all_are_as_likely():
    spans = spans_of(32, 0.15, 3.0)
    whole = samples(spans)
    assert all(np.array_equal(whole[k].tokens, samples(spans)[k].tokens) for k in (7, 3, 0))

    def shape(part, k):
        return tuple(np.flatnonzero(part[k].tokens >= 2000))

    assert [shape(whole, k) for k in range(8)] != [shape(samples(spans, seed=2), k) for k in range(8)]
    assert [shape(whole, k) for k in range(8)] != [shape(samples(spans, split="validation"), k) for k in range(8)]
    # 5 tokens in 2 spans: the first has 1 to 4 of them, each in a quarter of 2,000 samples; 5 standard errors are 97.
    firsts = np.bincount([int(np.flatnonzero(whole[k].labels == 2001)[0]) - 1 for k in range(2000)], minlength=5)
    assert firsts[0] == 0 and all(abs(count - 500) < 97 for count in firsts[1:5])


def test_data_of_the_engine_is_that_of_the_configuration(small_data):
    from megatron_ext.data.objective import pretraining_samples

    config = compose(["model=micro_t5", f"data.path={small_data}", "data.sequence_length=64"])
    found = pretraining_samples(config, ("train",))["train"]
    assert found.vocab_size == 600 and found.sequence_length == 64 and isinstance(config.data, DataConfig)
    assert {int(word) for word in found[0].tokens if word >= 500} == {500, 501, 502}
