"""The planner's formulas against hand-computed values, published figures, and what the configuration already knew."""
import itertools
import json
import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_ext.config import sizes
from megatron_ext.config.compose import compose
from megatron_ext.config.geometry import Grid
from megatron_ext.config.overrides import options_of
from megatron_ext.config.schema import Config, HardwareConfig, ModelConfig, ParallelConfig
from megatron_ext.observe.flops import peak_flops
from megatron_ext.plan import fit, hardware, published
from megatron_ext.plan.activations import activations
from megatron_ext.plan.buffers import SMALLEST_BUCKET, buffer, state
from megatron_ext.plan.calibration import FITTED, SHIPPED, load
from megatron_ext.plan.memory import fits, fullest, limit
from megatron_ext.plan.shapes import Tensor, chunks, tensors
from megatron_ext.plan.timing import step_time

TABLE = published.megatron_table()


def test_the_planner_runs_without_torch():
    code = ("import sys; from megatron_ext.config.compose import compose; from megatron_ext.plan import text, search, calibration, acquisition, fit; "
            "c = compose(['model=llama3_8b', 'hardware=h100_sxm', 'train.micro_batch_size=1', 'train.global_batch_size=8']); "
            "text.page(text.make(c, calibration.load(), 128256)); search.search(c, calibration.load(), 128256); assert 'torch' not in sys.modules")
    assert subprocess.run([sys.executable, "-c", code], timeout=300, check=False).returncode == 0


@pytest.mark.parametrize("name", options_of("model"))
def test_the_tensors_of_every_preset_are_its_parameters(name):
    config = compose([f"model={name}"])
    vocab = sizes.vocab_size(config)
    padded = sizes.padded_vocabulary(vocab, config.model.vocab_multiple, 1)
    assert sum(t.numel for chunk in chunks(config, 0) for t in tensors(config, chunk, vocab)) == sizes.parameters(config.model, padded)


def test_tensor_parallel_ranks_hold_the_model_once_and_stages_share_a_tied_table():
    model = ModelConfig(num_layers=4, hidden_size=64, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=192, vocab_size=256)
    whole = sizes.parameters(model, 256)
    config = Config(model=model, parallel=ParallelConfig(tp=2, pp=2))
    norms = 9 * 64  # whole on both tensor-parallel ranks
    assert sum(2 * sum(t.numel for c in chunks(config, r) for t in tensors(config, c, 256)) for r in (0, 1)) == whole + norms
    tied = replace(config, model=replace(model, tied_embeddings=True))
    held = [t for r in (0, 1) for c in chunks(tied, r) for t in tensors(tied, c, 256) if t.alone]
    assert [t.name for t in held] == ["embedding.word_embeddings.weight", "output_layer.weight"] and {t.shape for t in held} == {(128, 64)}


def test_buckets_by_hand():
    """Elements 100, 70 and 30 in reverse order: 30 at 0, 70 at 64, 100 at 192 (64 + 70 rounded up); the end 292 rounds up to 384 = 3 x 128 = lcm(3, 128)."""
    found = buffer([Tensor("a", (100,)), Tensor("b", (70,)), Tensor("c", (30,))], ranks=3, bucket=None, distributed=True)
    assert found.places == ((0, 30), (64, 134), (192, 292)) and found.buckets == ((0, 384),)
    # Shards of 128: [0, 128) has 30 + 64, [128, 256) 6 + 64, [256, 384) 36.
    assert [found.owned(rank, 3) for rank in range(3)] == [94, 70, 36]
    whole = buffer([Tensor("a", (100,)), Tensor("b", (70,))], ranks=3, bucket=None, distributed=False)
    assert whole.numel == 170 and whole.places == ((0, 70), (70, 170))
    alone = buffer([Tensor("table", (64,), alone=True), Tensor("b", (70,))], ranks=1, bucket=None, distributed=True)
    assert alone.buckets == ((0, 128), (128, 256)) and alone.places == ((0, 70), (128, 192))
    cut = buffer([Tensor("a", (SMALLEST_BUCKET,)), Tensor("b", (SMALLEST_BUCKET,))], ranks=2, bucket=SMALLEST_BUCKET, distributed=True)
    assert len(cut.buckets) == 2


def test_bytes_of_mixed_precision():
    """16 bytes a parameter in bf16 with fp32 gradients, but with D data ranks 6 + 12 / D (Rajbhandari et al. 2019, arXiv 1910.02054, with fp32 gradients)."""
    config = compose(["model=llama3_8b", "precision=bf16", "launch.ranks=8"])
    found = state(config, 0, 128256)
    count = 8_030_261_248
    assert found.parameters == count and found.weights == pytest.approx(2 * count, rel=1e-4) and found.gradients == pytest.approx(4 * count, rel=1e-4)
    assert found.optimizer == pytest.approx(12 * count / 8, rel=0.01)
    alone = state(replace(config, parallel=replace(config.parallel, distributed_optimizer=False)), 0, 128256)
    assert (alone.weights, alone.gradients, alone.optimizer) == (2 * count, 4 * count, 12 * count)
    full = state(compose(["model=llama3_8b", "precision=fp32"]), 0, 128256)
    assert full.optimizer == 8 * count, "main weights are the weights"


def test_activations_by_hand():
    """A Llama layer in bf16, b = 2: 4 h + 2 (a + 2 g) d - g d + ... counted out for h = a d = 1024, g d = 256, f = 2816, 128 tokens."""
    config = compose(["model=tiny", "model.hidden_size=1024", "model.num_attention_heads=8", "model.num_query_groups=2", "model.ffn_hidden_size=2816",
                      "model.num_layers=1", "precision=bf16", "data.sequence_length=128", "train.micro_batch_size=1", "train.global_batch_size=1"])
    token = 2 * 4 * 1024 + 2 * (1024 + 2 * 256) + 2 * (1024 + 256) + 2 * 1024 + 4 * 8 + 2 * 3 * 2816 + 8
    found = activations(config, 0, 256, 1)
    assert sum(found.parts.values()) == 128 * token
    assert found.layers == 128 * token + 128 * 128 * 4  # and cosines and sines


def test_in_flight_micro_batches():
    base = ["model=micro_llama", "precision=bf16", "parallel.pp=4", "launch.ranks=4", "train.micro_batch_size=1", "train.global_batch_size=8"]
    config = compose(base)
    each = [activations(config, rank, 2048, 8).layers for rank in range(4)]
    assert [round(one / each[3], 6) for one in each] == [4, 3, 2, 1]
    assert activations(config, 0, 2048, 2).layers == 2 * each[3], "never more than the step has"
    full = activations(compose([*base, "parallel.recompute=full"]), 0, 2048, 8)
    assert full.layers < each[0] / 4


@pytest.mark.parametrize("name", [name for name in options_of("hardware") if name != "unknown"])
def test_the_hardware_table_says_what_the_table_of_peaks_says(name):
    one = hardware.load(name)
    assert one.name == name and hardware.find(one.device) == one and hardware.timed(one)
    assert peak_flops(one.device, "bf16") == pytest.approx(one.bf16 * 1e12)
    assert (peak_flops(one.device, "fp8") or 0) == pytest.approx((one.fp8 or 0) * 1e12)


def test_an_unknown_gpu_has_no_mfu_and_is_not_judged():
    config = compose(["model=llama3_8b"])
    assert config.hardware == HardwareConfig() and limit(config) is None and fits(config, 128256) and not hardware.timed(config.hardware)


# ---- the world -------------------------------------------------------------------------------------------------------------------


def test_the_fit_that_is_shipped_and_how_far_off_it_is():
    """The bar: 3 % leaving one out, where the best constant has 6.2 %. Two constants."""
    shipped = json.loads(SHIPPED.read_text())
    found = fit.report()
    assert FITTED == ("gemm", "depth") == tuple(shipped["fitted"])
    for name, value in shipped["constants"].items():
        assert value == pytest.approx(found["constants"][name], rel=1e-4), name
    assert found["error"]["leave_one_out"] <= 0.03 and found["error"]["constant"] == pytest.approx(0.062, abs=0.001)
    assert shipped["error"] == pytest.approx(found["error"], rel=1e-3)


def test_rows_that_nothing_was_fitted_to():
    for row in fit.judge(published.others(), load()):
        assert abs(row.error) <= 0.15, row


def test_strong_scaling_falls_from_47_to_42_percent():
    """How the 177B model was interleaved is not published. Layer by layer it falls less than it did; with four chunks a stage as it did (docs/plan.md)."""
    for count, near in ((16, 0.06), (4, 0.04)):
        found = [(step_time(row.config, load(), row.vocab, software=row.software).mfu, stated) for row, stated in published.strong_scaling(count)]
        assert all(a[0] > b[0] for a, b in itertools.pairwise(found))
        assert all(abs(mfu / stated - 1) < near for mfu, stated in found if stated), count
    assert 0.08 < 1 - found[-1][0] / found[0][0] < 0.13, "published: 0.106"


def needed(row: published.Row) -> float:
    """Bytes that the fullest rank of a row needs, the margin left out: it ran."""
    # Meta runs micro-batches so that a rank holds no more of them than in 1F1B (section 3.3.2): interleaving costs no memory there.
    config = replace(row.config, parallel=replace(row.config.parallel, vpp=None)) if row.name.startswith("Llama 3") else row.config
    most, ranks = fullest(config, row.vocab), Grid.of(config).dp * Grid.of(config).cp
    return most.total - most.margin - (most.weights + most.gradients) * (1 - 1 / ranks if row.sharded else 0.0)


@pytest.mark.parametrize("row", [*TABLE, *published.others()], ids=lambda row: row.name)
def test_every_published_configuration_fits_and_not_without_its_parallelism(row):
    assert needed(row) <= limit(row.config)
    if row.config.parallel.tp * row.config.parallel.pp > 1:
        alone = replace(row.config, parallel=replace(row.config.parallel, tp=1, pp=1, cp=1, vpp=None, sp=False))
        assert fullest(alone, row.vocab).total > limit(alone)


def test_llama_does_not_fit_on_one_gpu_without_sharding():
    row = next(row for row in published.others() if row.name.startswith("torchtitan"))
    one = replace(row.config, launch=replace(row.config.launch, ranks=1))
    assert fullest(one, row.vocab).total > limit(one)
