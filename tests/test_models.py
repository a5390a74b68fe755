"""The decoder against transformers, and its parts against formulas written out in fp64."""
import math
from dataclasses import replace

import decoders
import pytest
import torch
import torch.nn.functional as F

from megatron_ext.config import sizes
from megatron_ext.config.compose import compose
from megatron_ext.config.schema import Config, DataConfig, ModelConfig
from megatron_ext.data.batches import Batch
from megatron_ext.models.attention import document_mask
from megatron_ext.models.initialise import initialise
from megatron_ext.models.loss import vocab_parallel_cross_entropy
from megatron_ext.parallel.layout import Layout
from megatron_ext.train.engine import Engine

WORDS, LLAMA, GPT2 = decoders.WORDS, decoders.LLAMA, decoders.VARIANTS["gpt2"]
pytestmark = [pytest.mark.both, pytest.mark.usefixtures("connected")]


def stirred(model: ModelConfig):
    return decoders.stirred(decoders.build(model))


def rows(count: int, length: int) -> torch.Tensor:
    return torch.randint(0, WORDS, (count, length), generator=torch.Generator().manual_seed(3))


def positions_of(tokens: torch.Tensor) -> torch.Tensor:
    return torch.arange(tokens.shape[1])[None].expand(tokens.shape[0], -1)


# ---- transformers --------------------------------------------------------------------------------------------------------------------


def gpt2_copy(engine):
    """transformers' `GPT2LMHeadModel` with the weights of a one-rank engine. Its `Conv1D` holds the transpose of a linear layer's weight."""
    from transformers import GPT2Config, GPT2LMHeadModel

    ours, model = engine.models[0], engine.config.model
    heads, width = model.num_attention_heads, sizes.head_dim(model)
    theirs = GPT2LMHeadModel(GPT2Config(
        vocab_size=engine.vocab_size, n_positions=model.max_sequence_length, n_embd=model.hidden_size, n_layer=model.num_layers,
        n_head=heads, n_inner=sizes.ffn_size(model), activation_function="gelu_new", layer_norm_epsilon=model.norm_eps,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )).eval()

    def copy(target, source):
        target.bias.copy_(source.bias)
        target.weight.copy_(source.weight.t() if source.weight.dim() == 2 else source.weight)

    def apart(joined: torch.Tensor) -> torch.Tensor:
        """megatron-core's rows are q, k, v of head 0, then of head 1, ...; GPT-2's are all q, all k, all v."""
        return joined.unflatten(0, (heads, 3, width)).transpose(0, 1).flatten(0, 2)

    with torch.no_grad():
        theirs.transformer.wte.weight.copy_(ours.embedding.word_embeddings.weight[: engine.vocab_size])
        theirs.transformer.wpe.weight.copy_(ours.embedding.position_embeddings.weight)
        copy(theirs.transformer.ln_f, ours.decoder.final_layernorm)
        for layer, other in zip(ours.decoder.layers, theirs.transformer.h, strict=True):
            joined = layer.self_attention.linear_qkv
            other.attn.c_attn.weight.copy_(apart(joined.weight).t())
            other.attn.c_attn.bias.copy_(apart(joined.bias))
            copy(other.attn.c_proj, layer.self_attention.linear_proj)
            copy(other.mlp.c_fc, layer.mlp.linear_fc1)
            copy(other.mlp.c_proj, layer.mlp.linear_fc2)
            copy(other.ln_1, layer.input_layernorm)
            copy(other.ln_2, layer.pre_mlp_layernorm)
    return theirs


@pytest.mark.parametrize(
    ("model", "copied"),
    [
        pytest.param(LLAMA, decoders.llama_copy, id="llama"),
        pytest.param(replace(LLAMA, rope_scaling_factor=8.0, rotary_base=500000.0, norm_eps=1e-3), decoders.llama_copy, id="llama-3.1"),
        pytest.param(replace(LLAMA, num_query_groups=1, head_dim=32, ffn_hidden_size=80), decoders.llama_copy, id="multi-query"),
        pytest.param(GPT2, gpt2_copy, id="gpt2"),
        pytest.param(replace(GPT2, norm_eps=1e-3, ffn_hidden_size=80), gpt2_copy, id="gpt2, other sizes"),
    ],
)
def test_logits_and_loss_are_those_of_transformers(model, copied):
    pytest.importorskip("transformers", reason="transformers is not installed here")
    engine = stirred(model)
    theirs, tokens = copied(engine), rows(3, model.max_sequence_length)
    decoder, inputs = engine.models[0].eval(), tokens[:, :-1]
    with torch.no_grad():
        truth = theirs(tokens, labels=tokens)  # it shifts the labels itself
        logits = decoder(inputs, positions_of(inputs))[..., :WORDS]
        _, losses = decoder(inputs, positions_of(inputs), labels=tokens[:, 1:])
    assert float(truth.logits.std()) > 0.5, "weights so small that every model gives the same"
    assert float((logits - truth.logits[:, :-1]).abs().max()) < 1e-5
    assert losses.shape == inputs.shape and losses.dtype == torch.float32
    assert float(losses.mean() - truth.loss) == pytest.approx(0, abs=1e-5)


def test_scaled_angles_at_large_positions_are_those_of_transformers():
    """To the end of Llama 3.1's context, where the scaling decides; the sizes of its heads."""
    pytest.importorskip("transformers", reason="transformers is not installed here")
    wide = replace(LLAMA, num_layers=1, head_dim=128, rotary_base=500000.0, max_sequence_length=131072)
    plain, scaled = (decoders.build(replace(wide, rope_scaling_factor=factor)) for factor in (None, 8.0))
    positions = torch.tensor([[0, 1, 4095, 8191, 8192, 65536, 131071]])
    angles = scaled.models[0].rotary_angles(positions, False)
    cos, sin = decoders.llama_copy(scaled).model.rotary_emb(torch.zeros(1), positions)
    assert angles.shape == (7, 1, 1, 128)
    # fp32: an angle of 131071 is known to 0.008, and a frequency to its last bit.
    tolerance = angles.abs().double() * 2.0**-23 + 1e-6
    for mine, truth in ((angles.cos(), cos), (angles.sin(), sin)):
        assert bool(((mine[:, 0, 0] - truth[0]).abs().double() <= tolerance[:, 0, 0]).all())
    ratio = plain.models[0].rotary.inv_freq / scaled.models[0].rotary.inv_freq
    assert [float(ratio[place]) for place in (0, -1)] == [1.0, pytest.approx(8.0)] and bool(((ratio > 1.01) & (ratio < 7.9)).any())


# ---- rotary positions ------------------------------------------------------------------------------------------------------------------


def rotated(x: torch.Tensor, positions: torch.Tensor, *, percent: float, interleaved: bool, base: float) -> torch.Tensor:
    """x [seq, batch, heads, d], positions [batch, seq] -> the same in fp64.

    Pair i of the first r = percent * d coordinates, (i, i + r/2), or (2i, 2i + 1) interleaved, is a complex number that turns by
    position * base^(-2i/r) (Su et al. 2021, arXiv:2104.09864); the other coordinates stay.
    """
    out, width = x.double().clone(), int(x.shape[-1] * percent)
    for i in range(width // 2):
        one, two = (2 * i, 2 * i + 1) if interleaved else (i, i + width // 2)
        angle = positions.t().double()[:, :, None] * base ** (-2 * i / width)
        turned = torch.complex(out[..., one], out[..., two]) * torch.polar(torch.ones_like(angle), angle)
        out[..., one], out[..., two] = turned.real, turned.imag
    return out


@pytest.mark.parametrize("rows_differ", [False, True], ids=["same positions", "own positions"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("percent", [1.0, 0.5, 0.25])
def test_queries_and_keys_turn_by_the_formula(percent, interleaved, rows_differ):
    model = replace(LLAMA, num_layers=1, head_dim=32, rotary_percent=percent, rotary_interleaved=interleaved, rotary_base=500.0)
    decoder, tokens = decoders.build(model).models[0].eval(), rows(2, 12)
    positions = torch.stack((torch.arange(12), torch.arange(12) % 5 + 40)) if rows_differ else positions_of(tokens) + 17
    attention, seen = decoder.decoder.layers[0].self_attention, {}
    attention.linear_qkv.register_forward_hook(lambda module, given, out: seen.update(joined=out[0]))
    attention.core_attention.register_forward_pre_hook(lambda module, given: seen.update(turned=given[:3]))
    with torch.no_grad():
        decoder(tokens, positions, rows_differ=rows_differ)
    joined = seen["joined"].view(12, 2, 2, 4, 32)  # [seq, batch, groups, two queries + key + value, d]
    q, k, v = (part.flatten(2, 3) for part in joined.split([2, 1, 1], dim=3))
    settings = {"percent": percent, "interleaved": interleaved, "base": 500.0}
    for mine, truth in zip(seen["turned"], (rotated(q, positions, **settings), rotated(k, positions, **settings), v.double()), strict=True):
        assert mine.shape == truth.shape
        assert float((mine.double() - truth).abs().max() / truth.abs().max()) < 1e-5
    assert float((rotated(k, positions, **settings) - k).abs().max()) > 0.1 * float(k.abs().max())


# ---- feed-forward ----------------------------------------------------------------------------------------------------------------------


def _gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


HAND = {
    "gelu": _gelu,
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: x.clamp(min=0),
    "swiglu": lambda x: x * torch.sigmoid(x),
    "geglu": _gelu,
    "geglu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


@pytest.mark.parametrize("activation", HAND)
def test_the_feed_forward_layer_is_the_formula(activation):
    mlp = stirred(replace(LLAMA, num_layers=1, activation=activation, bias=True)).models[0].decoder.layers[0].mlp
    x = torch.randn(5, 2, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        out, bias = mlp(x)
    first, second = ({name: value.detach().double() for name, value in part.named_parameters()} for part in (mlp.linear_fc1, mlp.linear_fc2))
    inner = x.double() @ first["weight"].t() + first["bias"]
    if activation in sizes.GATED:
        gate, up = inner.chunk(2, dim=-1)
        inner = HAND[activation](gate) * up
    else:
        inner = HAND[activation](inner)
    truth = inner @ second["weight"].t() + second["bias"]
    assert float((out + bias - truth).abs().max() / truth.abs().max()) < 1e-6


# ---- cross-entropy ---------------------------------------------------------------------------------------------------------------------


class OneRank:
    """Of a process group: all that the loss asks on one rank, where it must not talk to anyone."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


@pytest.mark.parametrize("scale", [1.0, 300.0], ids=["usual", "large"])
@pytest.mark.parametrize("padding", [0, 1, 28])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_cross_entropy_and_its_gradient_are_those_of_torch_in_fp64(dtype, padding, scale):
    generator = torch.Generator().manual_seed(5)
    logits = (scale * torch.randn(7, 3, 100 + padding, generator=generator)).to(dtype)
    logits[..., 100:] = 2 * scale + 9  # padding that would win if it were asked
    target = torch.randint(0, 100, (7, 3), generator=generator)
    target[0] = torch.tensor([0, 99, 50])
    weight = torch.randn(7, 3, generator=generator)
    weight[1] = 0  # tokens whose loss does not count
    mine, truth = logits.clone().requires_grad_(), logits[..., :100].double().requires_grad_()
    loss = vocab_parallel_cross_entropy(mine, target, vocab_size=100, group=OneRank())
    expected = F.cross_entropy(truth.flatten(0, 1), target.flatten(), reduction="none").view(7, 3)
    assert loss.dtype == torch.float32
    assert torch.allclose(loss.double(), expected, rtol=2e-6, atol=2e-6)
    (loss * weight).sum().backward()
    (expected * weight).sum().backward()
    assert torch.equal(mine.detach(), logits), "the logits are not the loss's to change"
    assert mine.grad.dtype == dtype and not mine.grad[..., 100:].any() and not mine.grad[1].any()
    last_bit = 2.0**-8 if dtype == torch.bfloat16 else 1e-5  # the gradient is rounded to the logits' dtype, once
    assert torch.allclose(mine.grad[..., :100].double(), truth.grad, rtol=last_bit, atol=1e-6)


# ---- initial weights -------------------------------------------------------------------------------------------------------------------


def _drawn(model: ModelConfig, seed: int = 1234) -> dict[str, torch.Tensor]:
    """Parameters after a drawing into memory full of NaN: what is not drawn stays NaN."""
    decoder = decoders.build(model).models[0]
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.fill_(math.nan)
    initialise(decoder, model, vocab_size=WORDS, seed=seed)
    return {name: parameter.detach().clone() for name, parameter in decoder.named_parameters()}


def _constant(name: str) -> float | None:
    """What gains and biases begin with; None for what is drawn."""
    if name.endswith("bias"):
        return 0.0
    return 1.0 if "norm" in name else None


INITIAL = {
    "llama": replace(LLAMA, num_layers=2, init_std=0.02),
    "gpt2": replace(GPT2, num_layers=2, init_std=0.05),
    "untied, biases": replace(LLAMA, num_layers=2, bias=True, norm="layernorm", activation="geglu"),
}


@pytest.mark.parametrize("name", INITIAL)
def test_initial_weights_have_the_distribution_that_is_promised(name):
    """Mean, standard deviation and the share within one deviation (0.6827), each within 5 of its own standard errors."""
    model = INITIAL[name]
    parts = {}
    for key, whole in _drawn(model).items():
        if _constant(key) is not None:
            assert bool((whole == _constant(key)).all()), key
            continue
        if whole.shape[0] == 128 and ("word_embeddings" in key or "output_layer" in key):
            assert not whole[WORDS:].any(), key
            whole = whole[:WORDS]
        if "linear_qkv" in key:  # queries, keys and values each
            split = whole.view(sizes.query_groups(model), -1, sizes.head_dim(model), model.hidden_size)
            parts |= {f"{key} q": split[:, :-2], f"{key} k": split[:, -2], f"{key} v": split[:, -1]}
        elif "linear_fc1" in key and model.activation in sizes.GATED:
            parts |= dict(zip((f"{key} gate", f"{key} up"), whole.chunk(2), strict=True))
        else:
            parts[key] = whole
    for key, part in parts.items():
        residual = "linear_proj" in key or "linear_fc2" in key
        std, x, count = model.init_std / (math.sqrt(2 * model.num_layers) if residual else 1), part.double().flatten(), part.numel()
        assert abs(float(x.mean())) < 5 * std / math.sqrt(count), key
        assert float(x.std()) / std == pytest.approx(1, abs=5 / math.sqrt(2 * count)), key
        assert float((x.abs() < std).double().mean()) == pytest.approx(0.6827, abs=5 * math.sqrt(0.6827 * 0.3173 / count)), key
    heads = {key: tuple(part.flatten()[:32].tolist()) for key, part in parts.items()}
    assert len(set(heads.values())) == len(heads), "no two tensors, layers or halves hold the same numbers"


@pytest.mark.parametrize("name", INITIAL)
def test_initial_weights_depend_on_the_seed_and_not_on_the_padding(name):
    model = INITIAL[name]
    base, other = _drawn(model), _drawn(model, seed=1235)
    for multiple in (8, 100):  # 120 rows, 200 rows
        drawn = _drawn(replace(model, vocab_multiple=multiple))
        assert drawn.keys() == base.keys()
        for key, part in drawn.items():
            table = "word_embeddings" in key or "output_layer" in key
            assert torch.equal(part[:WORDS], base[key][:WORDS]) if table else torch.equal(part, base[key]), key
            assert not (table and part[WORDS:].any())
    for key, part in base.items():
        assert torch.equal(part, other[key]) == (_constant(key) is not None), key


# ---- documents -------------------------------------------------------------------------------------------------------------------------

CUTS = ((9, 7), (1, 15))  # the lengths of the documents in each of two samples


def _packed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens with one more for the labels [2, 17], positions that restart [2, 16], documents [2, 16]."""
    positions = torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in CUTS])
    documents = torch.stack([torch.repeat_interleave(torch.arange(2), torch.tensor(lengths)) for lengths in CUTS])
    return rows(2, 17), positions, documents.int()


@pytest.mark.parametrize("name", decoders.VARIANTS)
def test_documents_packed_in_a_sample_are_as_each_alone(name):
    engine = stirred(decoders.VARIANTS[name])
    tokens, positions, documents = _packed()
    inputs = tokens[:, :-1]
    decoder = engine.models[0].eval()
    with torch.no_grad():
        packed = decoder(inputs, positions, document_mask(documents), rows_differ=True)[..., :WORDS]
        leaking = decoder(inputs, positions, rows_differ=True)[..., :WORDS]
    for row, (first, _) in enumerate(CUTS):
        for part in (slice(0, first), slice(first, 16)):
            alone = decoders.logits_of(engine, inputs[row, part].tolist())
            assert float((packed[row, part] - alone).abs().max()) < 1e-5
        assert torch.allclose(leaking[row, :first], packed[row, :first], atol=1e-5)
        assert float((leaking[row, first:] - packed[row, first:]).abs().max()) > 0.1, "without the mask it must matter"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_engine_evaluates_packed_documents_as_each_alone(connected, name):
    settings = DataConfig(reset_positions=True, reset_attention=True)
    engine = Engine(Config(model=decoders.VARIANTS[name], data=settings), Layout(), connected, vocab_size=WORDS, train=False)
    tokens, positions, documents = _packed()
    batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(2, 16), positions, documents)
    expected = 0.0
    for row, (first, _) in enumerate(CUTS):
        for part in (slice(0, first), slice(first, 16)):
            logits = decoders.logits_of(engine, batch.tokens[row, part].tolist())
            expected += float(F.cross_entropy(logits.double(), batch.labels[row, part], reduction="sum"))
    total, count = engine.evaluate([batch])
    assert count == 32 and total == pytest.approx(expected, abs=1e-4)


# ---- sizes -----------------------------------------------------------------------------------------------------------------------------

SMALL = replace(LLAMA, num_layers=3)
COUNTED = {
    "multi-head": replace(SMALL, num_query_groups=None),
    "grouped": SMALL,
    "multi-query": replace(SMALL, num_query_groups=1),
    "wide heads": replace(SMALL, head_dim=24),
    "bias": replace(SMALL, bias=True),
    "qkv_bias": replace(SMALL, qkv_bias=True),
    "bias and qkv_bias": replace(SMALL, bias=True, qkv_bias=True),
    "tied": replace(SMALL, tied_embeddings=True),
    "layernorm": replace(SMALL, norm="layernorm"),
    "learned": replace(SMALL, position_embedding="learned", max_sequence_length=50),
    "geglu": replace(SMALL, activation="geglu", bias=True),
    "gelu": replace(SMALL, activation="gelu", bias=True),
    "relu": replace(SMALL, activation="relu", ffn_hidden_size=100),
    "untied gpt2": replace(GPT2, tied_embeddings=False),
    "parallel": replace(SMALL, block="parallel", norm="layernorm"),
    "one norm, biases apart": replace(SMALL, block="parallel_one_norm", qkv_bias=True, mlp_bias=True, head_bias=True),
    "attention's biases": replace(SMALL, qkv_bias=True, proj_bias=True, qk_norm=True),
    "post-norm, narrow words": replace(GPT2, block="post_norm", embedding_size=24, position_offset=2, tied_embeddings=False),
}


@pytest.mark.parametrize("name", ["micro_llama", "micro_gpt2", *COUNTED])
def test_a_built_model_has_as_many_parameters_as_its_sizes_say(name):
    model = COUNTED[name] if name in COUNTED else compose([f"model={name}"]).model
    built = decoders.build(model).models[0]
    table = sizes.padded_vocabulary(WORDS, model.vocab_multiple, 1)
    assert table == 128
    assert sum(parameter.numel() for parameter in built.parameters()) == sizes.parameters(model, table)
