"""megatron_ext/models/fp8.py: the parallel layers against the op, micro-batches, recomputation, accumulation, checkpoints; two ranks
against one."""

import fp8_ranks
import pytest
import torch
from fp8_ranks import BLOCKS, HIDDEN, RECIPES, draw, stack, step
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from spawn import spawn

from kernels.fp8_linear import fp8_linear
from kernels.fp8_scaling import Fp8Recipe
from megatron_ext.models.fp8 import Fp8ColumnParallelLinear, Fp8RowParallelLinear, fp8_linears, is_edge, update_scales
from megatron_ext.parallel.groups import build_groups
from megatron_ext.parallel.layout import Layout
from megatron_ext.parallel.seeds import seed_ranks

pytestmark = pytest.mark.both
DELAYED = RECIPES["delayed"]
each_recipe = pytest.mark.parametrize("recipe", RECIPES)


@pytest.fixture(scope="module")
def groups(connected):
    groups = build_groups(Layout(), 60)
    seed_ranks(groups, seed=1, step=0)
    return groups


def histories(model) -> torch.Tensor:
    return torch.stack([m.fp8_history.view(torch.float32) for m in model.modules() if hasattr(m, "fp8_history")])


@each_recipe
def test_the_layers_are_the_op(groups, recipe):
    block = stack(RECIPES[recipe], groups)[0]
    assert isinstance(block.up, Fp8ColumnParallelLinear) and isinstance(block.down, Fp8RowParallelLinear)
    x = draw(5, 2, HIDDEN, seed=1).requires_grad_()
    y = block(x)
    inner = torch.nn.functional.gelu(fp8_linear(x, block.up.weight, recipe=RECIPES[recipe]) + block.up.bias)
    expected = x + (fp8_linear(inner, block.down.weight, recipe=RECIPES[recipe]) + block.down.bias)
    assert torch.equal(y, expected)
    leaves = (x, *block.parameters())
    for a, b in zip(torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(expected.sum(), leaves)):
        assert torch.equal(a, b)
    plain = stack(None, groups, linears=(ColumnParallelLinear, RowParallelLinear))[0](x)
    assert 1e-3 < float(((y - plain).norm() / plain.norm()).detach()) < 0.04


def test_edge_layers_are_megatron_cores_and_keep_the_same_tensors(groups):
    kinds = fp8_linears(DELAYED, high_precision=True), (ColumnParallelLinear, RowParallelLinear)
    ours, theirs = (stack(None, groups, linears=classes)[0] for classes in kinds)
    x = draw(5, 2, HIDDEN, seed=1)
    assert torch.equal(ours(x), theirs(x))
    assert {k for k in ours.state_dict() if "history" in k} == {"up.fp8_history", "down.fp8_history"}
    update_scales([ours], groups)
    assert not ours.up.fp8_history.any()
    assert [is_edge(i, 6, 1) for i in range(6)] == [True, False, False, False, False, True] and not is_edge(0, 6, 0)


def test_one_history_row_a_step_and_the_largest_of_its_micro_batches(groups):
    model = stack(DELAYED, groups)
    up = model[0].up
    assert up.scales is None, "nothing seen yet: the tensors at hand decide"
    for number in range(2):
        weight = up.weight.detach().clone()
        step(model, groups, number, lr=0.1)
        largest = max(float(draw(fp8_ranks.SEQUENCE, fp8_ranks.BATCH, HIDDEN, seed=1000 * number + i).abs().max()) for i in range(2))
        row = up.fp8_history.view(torch.float32)[0]
        assert float(row[0]) == largest and float(row[1]) == float(weight.abs().max()) and float(row[2]) > 0
    history = histories(model)
    assert bool((history[:, :2] > 0).all()) and not history[:, 2:].any()
    amax = up.fp8_history.view(torch.float32).amax(0)
    assert torch.allclose(up.scales, torch.tensor([448.0, 448.0, 57344.0]) / amax, rtol=1e-6)
    assert not up.fp8_record.any()


def test_evaluation_and_failed_steps_leave_no_trace(groups):
    model = stack(DELAYED, groups)
    step(model, groups, 0)
    before = histories(model)
    with torch.no_grad():
        model(draw(4, 1, HIDDEN, seed=3) * 100)
    model.eval()
    model(draw(4, 1, HIDDEN, seed=3) * 100).sum().backward()
    assert not model[0].up.fp8_record.any()
    model.train()
    model(draw(4, 1, HIDDEN, seed=3) * 100).sum().backward()
    assert model[0].up.fp8_record.any()
    update_scales([model], groups, applied=False)
    assert not model[0].up.fp8_record.any() and torch.equal(histories(model), before)
    model(draw(4, 1, HIDDEN, seed=3) * torch.nan).sum().backward()
    update_scales([model], groups)
    assert torch.equal(histories(model)[:, 0, 0], before[:, 0, 0]) and bool(histories(model).isfinite().all())
    assert all(bool(block.up.scales.isfinite().all()) for block in model)


@each_recipe
def test_recomputation_changes_nothing(groups, recipe):
    """The losses, the gradients and what is recorded, to the bit."""
    def recomputed(model, x):
        for block in model:
            x = tensor_parallel.checkpoint(block, False, x)
        return x

    models = [stack(RECIPES[recipe], groups) for _ in range(2)]
    for number in range(3):
        assert step(models[0], groups, number) == step(models[1], groups, number, run=recomputed)
    assert all(torch.equal(a, b) for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values()) if a is not None)


@each_recipe
def test_a_resumed_run_goes_on_to_the_bit(groups, recipe):
    model = stack(RECIPES[recipe], groups)
    for number in range(2):
        step(model, groups, number)
    state = {name: None if value is None else value.clone() for name, value in model.state_dict().items()}
    resumed = stack(RECIPES[recipe], groups)
    resumed.load_state_dict(state)
    for number in range(2, 4):
        assert step(model, groups, number) == step(resumed, groups, number)


def test_the_history_is_a_replicated_tensor_of_the_checkpoint_and_keeps_its_bits(groups):
    model = stack(DELAYED, groups)
    step(model, groups, 0)
    before = histories(model)
    state = model[0].up.sharded_state_dict("layers.up.", ((0, 1, BLOCKS),), {"dp_cp_group": groups.dp_cp})
    entry = state["layers.up.fp8_history"]
    assert isinstance(entry, ShardedTensor) and entry.global_shape == (BLOCKS, 3, 3) and entry.global_offset == (1, 0, 0)
    assert not any("record" in key for key in state)
    scales = model[0].up.scales.clone()
    model.bfloat16()
    assert torch.equal(histories(model), before) and torch.equal(model[0].up.scales, scales)


@each_recipe
def test_gradients_go_straight_into_main_gradients(groups, recipe):
    """megatron-core's agreement with its gradient buffers, without Apex's extension; micro-batches add up in fp32."""
    plain = stack(RECIPES[recipe], groups)
    fused = stack(RECIPES[recipe], groups, gradient_accumulation_fusion=True)
    for name, parameter in fused.named_parameters():
        if name.endswith("weight"):
            parameter.main_grad, parameter.grad_added_to_main_grad = torch.zeros(parameter.shape), False
    for index in range(2):
        x = draw(8, 2, HIDDEN, seed=index)
        plain(x).square().sum().backward(), fused(x).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), fused.parameters()):
        if name.endswith("weight"):
            assert b.grad_added_to_main_grad is True
            torch.testing.assert_close(b.main_grad, a.grad, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(a.grad, b.grad)


@each_recipe
def test_bf16_learns(groups, recipe):
    model = stack(RECIPES[recipe], groups, dtype=torch.bfloat16)
    losses = [step(model, groups, 0, lr=0.1)[0] for _ in range(4)]
    assert losses[-1] < 0.95 * losses[0]


def test_experts_are_refused(groups):
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=HIDDEN, num_attention_heads=4, use_cpu_initialization=True,
                               perform_initialization=False)
    with pytest.raises(ValueError, match="experts"):
        fp8_linears(Fp8Recipe())[0](HIDDEN, HIDDEN, config=config, init_method=None, tp_group=groups.tp, is_expert=True)


# ---- two ranks -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    directory = tmp_path_factory.mktemp("fp8")
    spawn([fp8_ranks.__file__, str(directory)], 2, timeout=200)
    return [torch.load(directory / f"rank{rank}.pt") for rank in range(2)]


each_layout = pytest.mark.parametrize("layout", ["tp2", "sp"])


@each_recipe
@each_layout
def test_a_block_on_two_ranks_is_the_block_on_one(ranks, recipe, layout):
    """Scales are those of the whole tensors, so operands have the same bits: only sums over ranks differ, in their order."""
    one, (first, second) = ranks[0][recipe]["once"]["one"], (rank[recipe]["once"][layout] for rank in ranks)
    for name in ("y", "dx"):
        whole = torch.cat((first[name], second[name])) if layout == "sp" else first[name]
        assert layout == "sp" or torch.equal(first[name], second[name])
        assert float((whole - one[name]).abs().max() / one[name].abs().max()) < 1e-6
    tokens = fp8_ranks.SEQUENCE * fp8_ranks.BATCH
    assert one["kept"] == tokens * HIDDEN, "bytes of the input, for backward"
    assert first["kept"] == one["kept"] // (2 if layout == "sp" else 1)
    for name, axis in (("up", 0), ("down", 1)):
        whole = torch.cat((first[name], second[name]), axis)
        assert float((whole - one[name]).abs().max() / one[name].abs().max()) < 1e-6


@each_recipe
@each_layout
def test_training_on_two_ranks_is_training_on_one(ranks, recipe, layout):
    """A sum that differs in its last bit may round to the other neighbour on the FP8 grid, a quarter away in e5m2: of 4,096 elements one
    such is 1e-4 of a gradient's norm here, and the steps after it feel it. The first loss feels nothing."""
    one, two = (ranks[0][recipe][name] for name in ("one", layout))
    assert all(ranks[0][recipe][layout][key] == ranks[1][recipe][layout][key] for key in ("losses", "norms"))
    assert two["losses"][0] == pytest.approx(one["losses"][0], rel=1e-6)
    assert two["losses"] == pytest.approx(one["losses"], rel=2e-3)
    for a, b in zip(one["norms"], two["norms"]):
        assert b == pytest.approx(a, rel=1e-2)


def test_histories_agree_between_ranks_and_layouts(ranks):
    for layout in ("tp2", "sp"):
        for name, history in ranks[0]["delayed"][layout]["histories"].items():
            assert torch.equal(history, ranks[1]["delayed"][layout]["histories"][name]), "ranks"
            torch.testing.assert_close(history, ranks[0]["delayed"]["one"]["histories"][name], rtol=1e-2, atol=0)
    for rank in ranks:
        assert torch.equal(rank["dp"]["together"], torch.maximum(ranks[0]["dp"]["alone"], ranks[1]["dp"]["alone"]))
    assert not torch.equal(ranks[0]["dp"]["alone"], ranks[1]["dp"]["alone"])


def test_a_checkpoint_of_two_ranks_resumes_on_two_to_the_bit_and_on_one(ranks):
    for rank in ranks:
        saved, again, single = rank["moved"]["histories"]
        for a, b, c in zip(saved, again, single):
            assert bool(a[0].any()) and torch.equal(a, b) and torch.equal(a, c)
        third = rank["moved"]["third"]
        assert third[1] == third[0] and third[2] == pytest.approx(third[0], rel=1e-4)
