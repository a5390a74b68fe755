"""Layers on our kernels against the plain ones of megatron-core and torch: the same parameters, losses and gradients."""
from dataclasses import replace

import pytest
import torch
from decoders import VARIANTS, WORDS
from kernel_truth import each_backend

from megatron_ext import platform
from megatron_ext.config.schema import Config, DataConfig, KernelsConfig, ModelConfig, OptimConfig, PrecisionConfig, TrainConfig
from megatron_ext.errors import UserError
from megatron_ext.parallel.layout import Layout
from megatron_ext.train.engine import Engine

SMALL = ModelConfig(num_layers=4, hidden_size=256, num_attention_heads=8, num_query_groups=4)
OPS = ("rms_norm", "layer_norm", "swiglu", "geglu", "bias_gelu", "rope", "linear_cross_entropy")


@pytest.fixture(scope="module", autouse=True)
def connected():
    from megatron_ext.platform import connect, disconnect

    here = platform.install("cpu")
    connect(here, 60)
    yield
    disconnect()


def engine(model: ModelConfig, *, layers: str, dtype: str = "fp32", train: bool = True, words: int = WORDS, data: DataConfig | None = None, **ops) -> Engine:
    config = Config(model=model, kernels=KernelsConfig(layers=layers, **ops), precision=PrecisionConfig(dtype=dtype), data=data or DataConfig(),
                    optim=OptimConfig(lr=2e-3, min_lr=2e-4, warmup_steps=10), train=TrainConfig(steps=50, global_batch_size=4, micro_batch_size=2))
    return Engine(config, Layout(), platform.install("cpu"), vocab_size=words, train=train)


def loss_and_gradients(model, *, rows_differ: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, WORDS, (2, 17), generator=generator)
    mask = (torch.rand(2, 16, generator=generator) < 0.8).float()
    positions = torch.arange(16).expand(2, 16) + (torch.tensor([[0], [5]]) if rows_differ else 0)
    total, losses = model(tokens[:, :-1], positions, labels=tokens[:, 1:], loss_mask=mask, rows_differ=rows_differ)
    total.backward()
    torch.testing.assert_close(total.detach(), (losses * mask).sum())
    return {"loss": losses, **{name: p.grad for name, p in model.named_parameters()}}


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_parameters_losses_and_gradients(variant):
    model = VARIANTS[variant]
    plain, fused = (engine(model, layers=kind, train=False).models[0].train() for kind in ("plain", "fused"))
    assert {k: v.shape for k, v in plain.state_dict().items() if v is not None} == {k: v.shape for k, v in fused.state_dict().items() if v is not None}
    expected, found = loss_and_gradients(plain, rows_differ=True), loss_and_gradients(fused, rows_differ=True)
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 2e-6 * max(1.0, value.abs().max()), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_on_interpreted_triton_kernels(variant):
    """The whole model on the Triton kernels: what a GPU would run, in the interpreter."""
    model = replace(VARIANTS[variant], num_layers=1)
    plain = engine(model, layers="plain", train=False).models[0].train()
    triton = engine(model, layers="fused", train=False, **dict.fromkeys(OPS, "triton")).models[0].train()
    expected, found = loss_and_gradients(plain), loss_and_gradients(triton)
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 4e-6 * max(1.0, value.abs().max()), name


def test_fifty_steps_of_the_small_model(small_data):
    from megatron_ext.data.batches import micro_batches
    from megatron_ext.data.build import build_datasets
    from megatron_ext.train.schedule import lr_at

    data = DataConfig(path=str(small_data), sequence_length=32)
    samples = build_datasets(data, ("train",))["train"]
    engines = [engine(SMALL, layers=kind, words=samples.vocab_size, data=data) for kind in ("plain", "fused")]
    worst = []
    for step in range(50):
        batches = micro_batches(samples, step * 4, global_batch=4, micro_batch=2, dp_rank=0, dp_size=1)
        plain, fused = (e.step(batches, lr=lr_at(step, e.config.optim, 50), step=step).loss for e in engines)
        worst.append(abs(plain - fused) / plain)
    print("relative difference of the losses over 20 and 50 steps:", max(worst[:20]), max(worst))
    assert max(worst) <= 2e-6  # the band of tests/test_parity.py, which compares layouts


def test_dropout_and_recomputation_draw_as_the_plain_layers_do():
    model = replace(SMALL, hidden_dropout=0.1, num_layers=2)
    plain, fused = (engine(model, layers=kind, train=False).models[0].train() for kind in ("plain", "fused"))
    results = []
    for chunk in (plain, fused):
        torch.manual_seed(5)
        results.append(loss_and_gradients(chunk)["loss"])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_attention_dropout_draws_from_the_stream_that_differs_between_tensor_parallel_ranks():
    """Each rank holds other heads, and must drop other weights of them; what the ranks share is drawn from the default stream."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    chunk = engine(replace(SMALL, attention_dropout=0.5, num_layers=1), layers="fused", train=False).models[0].train()
    core = chunk.decoder.layers[0].self_attention.core_attention
    q, k = torch.randn(16, 1, 8, 32), torch.randn(16, 1, 4, 32)
    shared, own = torch.get_rng_state(), {name: state.clone() for name, state in get_cuda_rng_tracker().get_states().items()}
    first, second = core(q, k, k), core(q, k, k)
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), shared)
    assert any(not torch.equal(state, own[name]) for name, state in get_cuda_rng_tracker().get_states().items())


@pytest.mark.parametrize(("ops", "words"), [
    ({"rms_norm": "cudnn"}, "kernels.rms_norm=cudnn"), ({"attention": "flash-attn-2"}, "kernels.attention=flash-attn-2"),
])
def test_a_backend_that_cannot_serve_is_refused_by_its_key(ops, words):
    with pytest.raises(UserError) as error:
        engine(SMALL, layers="fused", train=False, **ops)
    assert words in str(error.value)


def test_transformer_engine_is_refused_with_the_line_that_installs_it():
    with pytest.raises(UserError, match="kernels.layers=te.*pip install"):
        engine(SMALL, layers="te", train=False)


@each_backend
def test_losses_without_gradient_are_those_with(backend):
    chunk = engine(replace(SMALL, num_layers=1), layers="fused", train=False, linear_cross_entropy=backend).models[0]
    tokens = torch.randint(0, WORDS, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        _, quiet = chunk(tokens[:, :-1], torch.arange(8).expand(2, 8), labels=tokens[:, 1:])
    _, loud = chunk(tokens[:, :-1], torch.arange(8).expand(2, 8), labels=tokens[:, 1:])
    torch.testing.assert_close(quiet, loud, atol=2e-6, rtol=2e-6)
