"""Low-rank adapters: against the formula in fp64 and the model whose weights they are added to, in every layout, in checkpoints, in generation."""
import json
from dataclasses import asdict, replace
from pathlib import Path

import decoders
import pytest
import torch
from lora_ranks import GPT2, JOBS, LLAMA, LORA, WORDS, Job, base_bytes, batches, build, load, save, train
from parity_ranks import weights_hash
from spawn import spawn

from megatron_ext.config.schema import Config, GenerateConfig, LoraConfig
from megatron_ext.errors import UserError
from megatron_ext.models.initialise import sharded_tensors
from megatron_ext.models.lora import PATHS, adapted, apply_lora, disabled

ONE = JOBS["one"]
SMALL = replace(ONE, model=replace(LLAMA, num_layers=2))
BASE = replace(SMALL, lora=LoraConfig())
KINDS = {"fused": {}, "plain": {"kernels": {"layers": "plain"}}, "bf16": {"dtype": "bf16"}, "fp8": {"fp8": "current"}, "delayed": {"fp8": "delayed"}}


@pytest.fixture(scope="module", autouse=True)
def connected():
    from megatron_ext.platform import connect, disconnect, install

    connect(install("cpu"), 60)
    yield
    disconnect()


def stirred(job: Job = SMALL, *, training: bool = True):
    """An engine whose adapters contribute."""
    engine = build(job, train=training)
    generator = torch.Generator().manual_seed(9)
    for linear in adapted(engine.models):
        linear.lora_b.data.copy_(0.05 * torch.randn(linear.lora_b.shape, generator=generator))
    if training:
        engine.optimizer.reload_model_params()
    return engine


def losses_of(model) -> torch.Tensor:
    """Of each token, fp32 [2, 16]; the sum has gone backward where gradients are on."""
    tokens = torch.randint(0, WORDS, (2, 17), generator=torch.Generator().manual_seed(3))
    total, losses = model(tokens[:, :-1], torch.arange(16).expand(2, 16), labels=tokens[:, 1:])
    if torch.is_grad_enabled():
        total.backward()
    return losses


# ---- the formula ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", ["fused", "plain"])
@pytest.mark.parametrize("model", [SMALL.model, GPT2], ids=["llama", "gpt2"])
def test_a_layer_is_the_formula_in_fp64(model, layers):
    """y = W x + b + alpha / r B A x, and the gradients of A, B and x that follow from it by hand."""
    layer = stirred(Job(model, kernels={"layers": layers}), training=False).models[0].decoder.layers[0]
    for path in PATHS.values():
        linear = layer.get_submodule(path)
        w, a, b = (getattr(linear, name).detach().double() for name in ("weight", "lora_a", "lora_b"))
        x = torch.randn(5, 2, w.shape[1], generator=torch.Generator().manual_seed(1)).requires_grad_()
        dy = torch.randn(5, 2, w.shape[0], generator=torch.Generator().manual_seed(2))
        y, bias = linear(x)
        added = 0 if linear.skip_bias_add or linear.bias is None else linear.bias.detach()
        assert (bias is None) == (not linear.skip_bias_add or linear.bias is None)
        y.backward(dy)
        rows, out, scale = x.detach().double().flatten(0, 1), dy.double().flatten(0, 1), LORA.alpha / LORA.rank
        expected = {
            "y": rows @ w.t() + added + scale * rows @ a.t() @ b.t(), "x": out @ w + scale * out @ b @ a,
            "a": scale * (out @ b).t() @ rows, "b": scale * out.t() @ (rows @ a.t()),
        }
        found = {"y": y.detach().flatten(0, 1), "x": x.grad.flatten(0, 1), "a": linear.lora_a.grad, "b": linear.lora_b.grad}
        for name, value in expected.items():
            assert (found[name] - value).norm() <= 1e-6 * value.norm(), (path, name)
        assert linear.weight.grad is None


@pytest.mark.parametrize("job", [SMALL, Job(GPT2), replace(SMALL, parallel={"recompute": "full"})], ids=["llama", "gpt2", "recomputed"])
def test_the_whole_model_is_the_one_with_the_sum_in_its_weights(job):
    """Loss and gradients: d loss / dB = alpha / r dW A^T, d loss / dA = alpha / r B^T dW, with dW of a model that holds W + alpha / r B A."""
    engine, merged = stirred(job, training=False).models[0], build(replace(job, lora=LoraConfig(), parallel={}), train=False).models[0]
    assert {name for name, p in engine.named_parameters() if p.requires_grad} == {name for name, _ in engine.named_parameters() if ".lora_" in name}
    state, scale = engine.state_dict(), LORA.alpha / LORA.rank
    with torch.no_grad():
        for name, weight in merged.named_parameters():
            a, b = (state.get(name.removesuffix("weight") + part) for part in ("lora_a", "lora_b"))
            weight.copy_(state[name] if a is None else (state[name].double() + scale * b.double() @ a.double()).float())
    found, expected = losses_of(engine.train()), losses_of(merged.train())
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-6)
    weights, compared = dict(merged.named_parameters()), 0
    for linear_name, linear in engine.named_modules():
        if f"{linear_name}.lora_a" in state:
            dw = weights[f"{linear_name}.weight"].grad
            for mine, truth in ((linear.lora_b.grad, scale * dw @ linear.lora_a.t()), (linear.lora_a.grad, scale * linear.lora_b.t() @ dw)):
                assert (mine - truth).norm() <= 1e-5 * truth.norm(), linear_name
                compared += 1
    assert compared == 2 * 4 * job.model.num_layers


# ---- the base model stays ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_as_the_base_model_and_disabled_it_stays_that_bit_for_bit(kind):
    base, engine = (build(replace(job, **KINDS[kind])) for job in (BASE, SMALL))
    frozen = base_bytes(engine)
    with torch.no_grad():
        expected = losses_of(base.models[0].eval())
        assert torch.equal(losses_of(engine.models[0].eval()), expected)
    engine.models[0].train()
    losses, _ = train(engine, 8)
    assert losses[-1] < losses[0] - 0.5
    with torch.no_grad():
        if kind == "delayed":  # by its own scales: training has moved them
            base.models[0].load_state_dict({name: value for name, value in engine.models[0].state_dict().items() if "lora_" not in name})
            expected = losses_of(base.models[0].eval())
        engine.models[0].eval()
        with disabled(engine.models):
            assert torch.equal(losses_of(engine.models[0]), expected)
            with disabled(engine.chunks):  # once more changes nothing
                pass
            assert torch.equal(losses_of(engine.models[0]), expected)
        assert not torch.equal(losses_of(engine.models[0]), expected)
    assert base_bytes(engine) == frozen


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gradients_and_optimizer_state_exist_for_adapters_alone(dtype):
    engine = build(replace(SMALL, dtype=dtype))
    train(engine, 1)
    own = sum(p.numel() for linear in adapted(engine.models) for p in (linear.lora_a, linear.lora_b))
    model = engine.models[0]
    assert own < 0.2 * sum(p.numel() for p in model.parameters())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == hasattr(parameter, "main_grad") == (".lora_" in name), name
        assert parameter.grad is None, name
    assert sum(p.numel() for buffer in engine.chunks[0].buffers for p in buffer.params) == own
    moments = [value for state in engine.optimizer.chained_optimizers[0].optimizer.state.values() for key, value in state.items() if key == "exp_avg"]
    assert sum(value.numel() for value in moments) == own
    assert {value.dtype for value in moments} == {torch.float32}
    mains = [p for group in engine.optimizer.param_groups for p in group["params"]]
    assert sum(p.numel() for p in mains) == own and {p.dtype for p in mains} == {torch.float32}


def test_a_scalar_head_is_trained_too():
    """No base model has one: a reward model with adapters would keep a random head."""
    engine = build(replace(SMALL, head="scalar"), train=False)
    trained = {name for name, p in engine.models[0].named_parameters() if p.requires_grad}
    assert {"value_head.weight", "value_head.bias"} == {name for name in trained if ".lora_" not in name}


def test_only_the_targets_are_adapted():
    engine = build(JOBS["some/one"], train=False)
    names = {name.split(".")[-1] for name, module in engine.models[0].named_modules() if hasattr(module, "lora_a")}
    assert names == {"linear_proj", "linear_fc1"}


@pytest.mark.parametrize(("targets", "words"), [(("linear_q",), "linear_q"), ((), "names no layer")])
def test_targets_that_are_none_are_refused(targets, words):
    with pytest.raises(UserError, match=f"lora.targets.*{words}"):
        build(replace(SMALL, lora=LoraConfig(rank=2, targets=targets)), train=False)


def test_layers_of_another_library_are_refused():
    model = build(BASE, train=False).models[0]
    model.decoder.layers[1].mlp.linear_fc1 = torch.nn.Linear(4, 4)
    with pytest.raises(UserError, match="lora.rank.*Linear.*te"):
        apply_lora(model, LORA)


# ---- layouts -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, dict]:
    """Facts of every job; both ranks of a layout have the same (hashes only its first)."""
    directory = tmp_path_factory.mktemp("lora")
    spawn([str(Path(__file__).with_name("lora_ranks.py")), str(directory)], 2, timeout=540)
    found: dict[str, dict] = {}
    for rank in range(2):
        for name, facts in json.loads((directory / f"rank{rank}.json").read_text()).items():
            known = found.setdefault(name, facts)
            assert known | {"initial": ""} == facts | {"initial": ""}, f"{name}: its ranks disagree"
            known["initial"] = known.get("initial") or facts.get("initial")
    return found


def difference(runs: dict, name: str, key: str, steps: int | None = None, reference: str | None = None) -> float:
    """The largest relative one, over the first `steps` steps; reference: None = one rank."""
    own = f"{name.split('/')[0]}/one"
    reference = reference or (own if own in runs else "one")
    assert runs[name]["initial"] == runs[reference]["initial"] != "", "not the same initial weights and adapters"
    return max(abs(a - b) / abs(b) for a, b in zip(runs[name][key][:steps], runs[reference][key][:steps], strict=True))


@pytest.mark.parametrize("name", [name for name, job in JOBS.items() if job.ranks == 2])
def test_every_layout_trains_as_one_rank_does(runs, name):
    loss, norm = (1e-3, 1e-2) if name.startswith(("bf16", "fp8")) else (2e-6, 5e-6)  # 8 bits and fewer: tests/test_parity.py
    # Where a number falls between two FP8 ones is a matter of the last bit of a sum, which is another one on each kind of processor: after two steps
    # (2e-3 at the third one on one without AVX-512, less than 1e-3 on one with it) two runs part, and stay nearer to one another than to fp32.
    steps = 2 if name.startswith("fp8") else None
    assert difference(runs, name, "losses", steps) <= loss
    assert difference(runs, name, "norms", steps) <= norm
    if steps:
        assert difference(runs, name, "losses") <= difference(runs, f"{name.split('/')[0]}/one", "losses", reference="one")


def test_the_reference_is_worth_comparing_with(runs):
    for name, facts in runs.items():
        if "before" in facts:
            assert facts["losses"][-1] < facts["losses"][0] - 0.5, name
            assert facts["after"] < 0.9 * facts["before"], name


def test_the_base_model_stays_in_every_layout(runs):
    for name in JOBS:
        assert runs[name]["frozen"], name
        assert runs[name]["disabled"] == runs[name]["before"], name


def test_recomputation_changes_nothing(runs):
    for name, reference in (("full/tp2sp", "tp2sp"), ("full/pp2", "pp2"), ("selective/tp2", "tp2")):
        assert runs[name]["losses"] == runs[reference]["losses"], name


def test_a_checkpoint_holds_the_same_adapters_in_every_layout(runs):
    """Weights, adapters and optimizer of two tensor-parallel ranks on one rank and back: the gate of gated units lies in halves."""
    assert runs["loaded"]["again"] == []
    assert runs["loaded"]["after"] == pytest.approx(runs["tp2sp"]["after"], rel=2e-6)
    assert runs["resumed/tp2sp"]["losses"] == pytest.approx(runs["resumed/interleaved"]["losses"], rel=2e-6)


@pytest.mark.parametrize("name", ["merged/one", "merged/pp2"])
def test_a_run_starts_from_the_sum_in_every_layout(runs, name):
    """Without adapters, and with new ones of another rank."""
    assert runs[name]["after"] == pytest.approx(runs["tp2sp"]["after"], rel=2e-6)


@pytest.mark.parametrize("name", ["tp2", "tp2sp", "pp2"])
def test_every_layout_generates_the_same(runs, name):
    """On the fast path and through the modules, both of which `generated` holds."""
    found, expected = runs[name]["generated"], runs["loaded"]["generated"]
    assert [one["tokens"] for one in found] == [one["tokens"] for one in expected]
    assert [one["tokens"] for one in found[:3]] == [one["tokens"] for one in found[3:]]
    for one, other in zip(found, expected):
        assert one["raw_logprobs"] == pytest.approx(other["raw_logprobs"], abs=2e-5)


# ---- generation ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "bound"), [("fused", 2e-5), ("bf16", 0.1), ("fp8", 0.3)])
def test_generation_says_what_the_full_forward_pass_says(kind, bound):
    from megatron_ext.generate import generate, single

    engine = stirred(replace(SMALL, **KINDS[kind]), training=False)
    assert single.knows(engine.models[0]) == (kind != "fp8")
    settings = GenerateConfig(max_tokens=24, temperature=1.0, batch_size=4, seed=3)
    prompts = [[1, 5, 3], [2, 7, 11, 4, 9], [6]]
    found = generate(engine, prompts, settings)
    for one in found:
        logprobs = decoders.logits_of(engine, one.prompt + one.tokens).log_softmax(-1)[len(one.prompt) - 1 : -1]
        truth = logprobs.gather(1, torch.tensor(one.tokens)[:, None])[:, 0]
        assert (truth - torch.tensor(one.raw_logprobs)).abs().max() <= bound
    with disabled(engine.models):
        base = generate(engine, prompts, settings)
    expected = generate(build(replace(BASE, **KINDS[kind]), train=False), prompts, settings)
    assert [one.raw_logprobs for one in base] == [one.raw_logprobs for one in expected] != [one.raw_logprobs for one in found]


# ---- checkpoints ---------------------------------------------------------------------------------------------------------------




@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints of a model without adapters, and of one with."""
    directory = tmp_path_factory.mktemp("stored")
    engine = build(BASE)
    train(engine, 1)
    adapted_engine = build(SMALL)
    load(adapted_engine, base := save(engine, directory / "base"), weights_only=True)
    train(adapted_engine, 4)
    return {"base": base, "lora": save(adapted_engine, directory / "lora")}


def test_a_run_with_adapters_begins_from_a_checkpoint_without(stored):
    """They stay as they were drawn, which depends on neither the layout nor the checkpoint."""
    drawn, engine = ({}, {}), build(SMALL)
    load(engine, stored["base"], weights_only=True)
    for found, which in zip(drawn, (engine, build(SMALL))):
        for tensor in sharded_tensors(which.models[0].sharded_state_dict(metadata={"dp_cp_group": which.groups.dp_cp})):
            if ".lora_" in tensor.key:
                found[tensor.key, tensor.global_offset] = tensor.data.detach()
    assert len(drawn[0]) == 2 * (4 * 2 + 1) and all(torch.equal(value, drawn[1][key]) for key, value in drawn[0].items())
    for (key, _), value in drawn[0].items():
        assert bool(value.any()) == key.endswith("lora_a"), key
        if key.endswith("lora_a"):
            assert value.std() == pytest.approx((3 * value.shape[-1]) ** -0.5, rel=0.25)


def refused(job: Job, path: Path, words: str, **settings) -> None:
    engine = build(job)
    before = weights_hash(engine)
    with pytest.raises(UserError, match=words):
        load(engine, path, **settings)
    assert weights_hash(engine) == before, "it was refused after something had changed"


def test_adapters_are_not_dropped_without_a_word(stored):
    for weights_only in (True, False):
        refused(BASE, stored["lora"], "holds adapters.*lora.alpha=8.0.*lora.rank=4.*checkpoint.start", weights_only=weights_only)
    refused(replace(SMALL, lora=replace(LORA, targets=("linear_qkv",))), stored["lora"], "holds adapters", weights_only=True)


def test_a_resume_asks_for_the_adapters_that_there_are(stored):
    hint = "Set lora.rank and lora.targets.*checkpoint.start"
    refused(SMALL, stored["base"], f"optimizer.state.*is not in it.*{hint}")
    refused(replace(SMALL, lora=replace(LORA, rank=3)), stored["lora"], f"has shape.*{hint}")
    other = replace(LORA, alpha=16.0)
    refused(replace(SMALL, lora=other), stored["lora"], "lora.alpha.*lora.alpha=8.0", expect={"lora": asdict(other)})
    engine = build(SMALL)
    load(engine, stored["lora"], expect={"lora": asdict(LORA)})


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_merged_weights_are_the_sum_in_fp64(stored, dtype):
    from megatron_ext.checkpoint.read import Stored
    from megatron_ext.train.weights import load_weights

    engine = build(replace(SMALL, dtype=dtype, lora=replace(LORA, rank=2)))
    drawn = [linear.lora_a.clone() for linear in adapted(engine.models)]
    load_weights(engine, stored["lora"])
    with Stored(stored["lora"]) as there:
        for number, layer in enumerate(engine.models[0].decoder.layers):
            for path in PATHS.values():
                w, a, b = (there.whole(f"decoder.layers.{path}.{name}")[number].double() for name in ("weight", "lora_a", "lora_b"))
                truth = w + LORA.alpha / LORA.rank * b @ a
                assert bool((truth - w).any())
                rounding = {"fp32": 1e-6, "bf16": 2**-8}[dtype]
                assert ((layer.get_submodule(path).weight.double() - truth).abs() <= rounding * truth.abs() + 1e-7).all(), path
    for linear, a in zip(adapted(engine.models), drawn, strict=True):
        assert torch.equal(linear.lora_a, a) and not linear.lora_b.any()


def test_a_damaged_pair_is_refused(stored, tmp_path):
    """Adapters that do not fit their weight, and a record that does not say by what they are scaled."""
    from megatron_ext.checkpoint import adapters
    from megatron_ext.checkpoint.read import Stored

    with Stored(stored["lora"]) as there:
        key = "decoder.layers.mlp.linear_fc2.weight"
        tensor = next(t for t in sharded_tensors(build(BASE).sharded_state(loading=True, weights_only=True)["model"]) if t.key == key)
        region = (tensor.global_offset, (1, *tensor.local_shape))
        assert adapters.product(there, tensor, *region) is not None
        for record in ({}, {"config": {"lora": {"alpha": "much"}}}, {"config": {"lora": {"alpha": float("inf")}}}):
            there.record = record
            with pytest.raises(UserError, match="lora.alpha"):
                adapters.product(there, tensor, *region)
        there.tensors["decoder.layers.mlp.linear_fc2.lora_b"] = there.tensors["decoder.layers.mlp.linear_fc1.lora_b"]
        with pytest.raises(UserError, match="do not fit"):
            adapters.product(there, tensor, *region)


def test_generate_and_evaluate_take_the_adapters_that_the_record_says(stored):
    from megatron_ext.platform import install
    from megatron_ext.train.restored import restored_engine, source

    words = [f"checkpoint.load={stored['lora']}"]
    config = replace(Config(), checkpoint=replace(Config().checkpoint, load=str(stored["lora"])))
    found = source(config, words)
    assert found.config.lora == LORA
    engine, trained = restored_engine(found, install("cpu")), build(SMALL)
    load(trained, stored["lora"])
    assert engine.evaluate(batches(engine, 7)) == trained.evaluate(batches(trained, 7))
    without = source(config, [*words, "lora.rank=0"])
    with pytest.raises(UserError, match="holds adapters"):
        restored_engine(without, install("cpu"))
