"""What cannot work is refused, with the key, the value and what would be right."""
import pytest

from megatron_ext.config import geometry, sizes
from megatron_ext.config.build import key_types
from megatron_ext.config.compose import compose
from megatron_ext.config.ranges import CHOICES, RANGES
from megatron_ext.config.validate import ConfigErrors, problems, validate

FOUR = ["launch.ranks=4"]


@pytest.mark.parametrize(("words", "expected"), [
    (["model.hidden_size=250"], ["model.num_attention_heads=4", "model.hidden_size=250"]),
    (["model.num_query_groups=3"], ["model.num_query_groups=3", "1, 2, 4"]),
    (["model.rotary_percent=0.3"], ["model.rotary_percent=0.3", "even"]),
    (["model.head_dim=7"], ["even"]),
    (["model.num_query_groups=2", "model.num_attention_heads=6", "model.hidden_size=192", "model.ffn_hidden_size=384", "parallel.tp=3", "launch.ranks=3"],
     ["parallel.tp=3", "model.num_query_groups=2", "multiple"]),
    (["model.num_query_groups=1", "model.num_attention_heads=8", "model.head_dim=2", "parallel.tp=8", "launch.ranks=8"],
     ["parallel.tp=8", "20 rows of queries, keys and values"]),
    (["model=micro_gpt2", "model.rope_scaling_factor=8", "data.sequence_length=64"], ["model.rope_scaling_factor=8", "null"]),
    (["model.block=paralel"], ["model.block=paralel", "did you mean parallel"]),
    (["model.position_offset=2"], ["model.position_offset=2", "learned"]),
    (["model.proj_bias=true"], ["model.proj_bias=true", "model.qkv_bias=true"]),
    (["model.rope_scaling_factor=8", "model.rope_high_freq_factor=1"], ["model.rope_high_freq_factor=1", "model.rope_low_freq_factor=1"]),
    (["kernels.layers=te", "model.block=parallel"], ["model.block=parallel", "Transformer Engine"]),
    (["kernels.layers=te", "model.qk_norm=true"], ["model.qk_norm=true", "Transformer Engine"]),
    (["model.embedding_size=0"], ["model.embedding_size=0", "at least 1"]),
    (["parallel.tp=2"], ["launch.ranks=1", "multiple", "2"]),
    (["parallel.tp=2", "launch.ranks=5"], ["launch.ranks=5", "4 or 6"]),
    (["parallel.tp=3", "launch.ranks=3"], ["parallel.tp=3", "1, 2, 4"]),
    (["parallel.tp=4", "model.num_query_groups=8", "model.num_attention_heads=8", "model.ffn_hidden_size=510", *FOUR], ["feed-forward=510"]),
    (["model.num_attention_heads=12", "model.hidden_size=768", "model.num_query_groups=3", "parallel.tp=2", "launch.ranks=2"],
     ["model.num_query_groups=3"]),
    (["parallel.pp=3", "launch.ranks=3"], ["parallel.pp=3", "1, 2, 4"]),
    (["parallel.vpp=2"], ["parallel.vpp=2", "parallel.pp greater than 1"]),
    (["parallel.vpp=1", "parallel.pp=2", "launch.ranks=2"], ["parallel.vpp=1", "at least 2", "null"]),
    (["parallel.vpp=3", "parallel.pp=2", "launch.ranks=2"], ["model.num_layers=4", "6"]),
    (["parallel.vpp=2", "parallel.pp=2", "launch.ranks=2", "train.global_batch_size=24"], ["train.global_batch_size=24", "multiple of 16"]),
    (["parallel.sp=true"], ["parallel.sp=true", "parallel.tp greater than 1"]),
    (["parallel.sp=true", "parallel.tp=2", "launch.ranks=2", "data.sequence_length=255"], ["data.sequence_length=255", "parallel.tp=2"]),
    (["parallel.cp=2", "launch.ranks=2", "data.sequence_length=250"], ["data.sequence_length=250", "2 x parallel.cp = 4"]),
    (["parallel.cp=2", "launch.ranks=2", "model.attention_dropout=0.1"], ["model.attention_dropout=0.1", "parallel.cp"]),
    (["parallel.cp=3", "launch.ranks=3", "parallel.cp_method=ulysses", "data.sequence_length=240"], ["parallel.cp_method=ulysses", "4 heads", "ring"]),
    (["parallel.cp_method=rign"], ["did you mean ring"]),
    (["precision.fp8=int8"], ["precision.fp8=int8", "delayed, current, blockwise, mxfp8"]),
    (["precision=fp8_current", "precision.dtype=fp16"], ["precision.dtype=fp16", "bf16"]),
    (["precision=fp8_current", "kernels.layers=fused"], ["kernels.layers=fused", "no FP8"]),
    (["kernels.layers=fp8"], ["kernels.layers=fp8", "precision.fp8"]),
    (["precision=fp8_mxfp8", "kernels.layers=fp8"], ["precision.fp8=mxfp8", "kernels.layers=te"]),
    (["precision=fp8_delayed", "kernels.layers=te", "parallel.pp=2", "launch.ranks=2"], ["precision.fp8=delayed", "kernels.layers=fp8"]),
    (["precision=fp8_current", "model.ffn_hidden_size=520"], ["precision.fp8=current", "pieces of 16", "feed-forward", "520"]),
    (["precision=fp8_blockwise", "model.hidden_size=192"], ["precision.fp8=blockwise", "pieces of 128", "192"]),
    (["precision=fp8_current", "kernels.layers=te", "data.sequence_length=9", "train.micro_batch_size=4"], ["train.micro_batch_size=4", "36 tokens"]),
    (["kernels.layers=plain", "parallel.cp=2", "launch.ranks=2", "data.reset_attention=true"], ["kernels.layers=plain", "fused layers"]),
    (["kernels.attention=varlen"], ["kernels.attention=varlen", "data.reset_attention=true"]),
    (["precision=fp8_current", "model.head_dim=2"], ["query, key and value width of a rank is 24"]),
    (["precision=fp8_current", "precision.fp8_edge_layers=2"], ["precision.fp8_edge_layers=2", "none of the 4 layers"]),
    (["kernels.rms_norm=tritn"], ["kernels.rms_norm=tritn", "triton"]),
    (["parallel.recompute=full", "parallel.recompute_layers=5"], ["parallel.recompute_layers=5", "4 layers"]),
    (["train.global_batch_size=20"], ["train.global_batch_size=20", "16 or 24"]),
    (["train.micro_batch_size=64"], ["train.global_batch_size=32", "64"]),
    (["model=micro_gpt2", "data.sequence_length=512"], ["data.sequence_length=512", "max_sequence_length=256"]),
    (["train.steps=100"], ["optim.warmup_steps=100", "100 steps"]),
    (["train.tokens=8192"], ["optim.warmup_steps=100", "1 steps"]),
    (["optim.min_lr=1"], ["optim.min_lr=1", "optim.lr=0.001"]),
    (["optim.schedule=wsd", "optim.decay_steps=950"], ["optim.decay_steps=950", "1000 steps"]),
    (["optim.decay_steps=50"], ["optim.decay_steps=50", "optim.warmup_steps=100"]),
    (["checkpoint.format=dp_reshardable", "parallel.distributed_optimizer=false"], ["checkpoint.format=dp_reshardable"]),
    (["data.tokenizer=/no/such.json"], ["data.tokenizer=/no/such.json", "not a file"]),
    (["data.split=[0.5,0.5]"], ["data.split=[0.5,0.5]", "three parts"]),
    (["data.split=[0.5,0.2,0.2]"], ["sum to 1, not 0.9"]),
    (["data.split=[0,0.5,0.5]"], ["nothing to train on"]),
    (["data.split=[1.5,-0.5,0]"], ["from 0 to 1"]),
    (["data.path=a", "data.paths=[b]"], ["data.path=a", "data.paths"]),
    (["data.paths=[a,b]", "data.weights=[1]"], ["data.weights=[1]", "2 data.paths"]),
    (["data.paths=[a,b]", "data.weights=[1,0]"], ["greater than 0"]),
    (["run.dir= "], ["run.dir", "empty"]),
    (["run.dir=/etc/passwd/x"], ["run.dir=/etc/passwd/x", "is a file"]),
    (["checkpoint.load=/no/such"], ["checkpoint.load=/no/such", "is not there"]),
    (["stage.name=stf"], ["stage.name=stf", "pretrain"]),
    (["model.norm=rms"], ["model.norm=rms", "did you mean rmsnorm", "layernorm"]),
    (["parallel.recompute=slective"], ["did you mean selective"]),
    (["precision.dtype=bfloat16"], ["fp32, bf16, fp16"]),
    (["optim.lr=0"], ["optim.lr=0.0", "greater than 0"]),
    (["optim.lr=nan"], ["optim.lr=nan"]),
    (["optim.beta2=1"], ["optim.beta2=1.0", "below 1"]),
    (["generate.top_p=1.5"], ["generate.top_p=1.5", "greater than 0 and at most 1"]),
    (["model.num_layers=0"], ["model.num_layers=0", "at least 1"]),
    (["data.vocab_size=100"], ["data.vocab_size=100", "at least 257"]),
    (["launch.master_port=70000"], ["launch.master_port=70000", "below 65536"]),
    (["model.family=encoders"], ["did you mean encoder"]),
    (["model.token_types=2"], ["model.token_types=2", "model.family=encoder"]),
    (["model.position_embedding=relative"], ["model.position_embedding=relative", "rope or learned"]),
    (["model=micro_t5", "data.sequence_length=64", "model.position_embedding=rope"], ["learned or sinusoidal or relative"]),
    (["model=micro_bert", "parallel.cp=2", "launch.ranks=2"], ["parallel.cp=2", "model.family=encoder", "parallel.sp"]),
    (["model=micro_bert", "precision=fp8_current"], ["precision.fp8=current", "precision=bf16"]),
    (["model=micro_t5", "kernels.layers=plain"], ["kernels.layers=plain", "auto or fused"]),
    (["model=micro_bert", "stage=sft"], ["stage.name=sft", "stage=pretrain or stage=adapt"]),
    (["model=micro_t5", "stage=ppo"], ["stage.name=ppo", "left to right"]),
    (["model=micro_bert", "data.mask_eod_loss=true"], ["data.mask_eod_loss=true"]),
    (["model=micro_t5", "data.reset_attention=true"], ["data.reset_attention=true", "encoder_decoder"]),
    (["model=micro_t5", "model.num_query_groups=2"], ["model.num_query_groups=2", "null"]),
    (["model=micro_t5", "model.block=parallel"], ["model.block=parallel", "serial or post_norm"]),
    (["model=micro_t5", "model.relative_distance=8"], ["model.relative_distance=8", "16"]),
    (["model=micro_t5", "data.sequence_length=6"], ["data.sequence_length=6", "at least 8"]),
    (["model=t5_small", "data.sequence_length=2048"], ["data.span_length=3", "100 sentinels"]),
    (["model=micro_t5", "parallel.pp=3", "launch.ranks=3"], ["parallel.pp=3", "the layers of both stacks, 8: 1, 2, 4, 8"]),
    (["model=t5_small", "parallel.tp=16", "parallel.sp=true", "model.num_attention_heads=16", "model.head_dim=32", "data.sequence_length=512", "launch.ranks=16"],
     ["parallel.sp=true", "120 tokens"]),
])
def test_refused(words, expected):
    text = "\n".join(map(str, problems(compose(words))))
    assert all(part in text for part in expected), text


def test_all_mistakes_at_once():
    with pytest.raises(ConfigErrors) as error:
        validate(compose(["parallel.tp=3", "launch.ranks=3", "train.steps=10", "optim.min_lr=1"]))
    assert [one.key for one in error.value.errors] == ["parallel.tp", "optim.warmup_steps", "optim.min_lr"]
    assert str(error.value).count("\nerror: ") == 2


@pytest.mark.parametrize("words", [
    [], ["parallel=tp2", "launch.ranks=2"], ["parallel=pp2", "launch.ranks=2", "parallel.vpp=2"], ["parallel=tp2_pp2", "launch.ranks=8"],
    ["parallel.tp=2", "parallel.sp=true", "launch.ranks=4", "parallel.recompute=full"],
    ["model.num_query_groups=1"], ["model.num_query_groups=1", "parallel.tp=2", "launch.ranks=2"],
    ["model=t5_small", "data.sequence_length=512", "parallel=tp2_pp2", "parallel.sp=true", "launch.ranks=4"],
    ["model=bert_base", "data.sequence_length=512", "parallel=tp2_pp2", "parallel.sp=true", "launch.ranks=4", "data.reset_attention=true"],
    ["model=micro_gpt2", "data.sequence_length=256"], ["model.num_layers=3"], ["optim.schedule=wsd", "optim.decay_steps=900"],
])
def test_accepted(words):
    validate(compose(words))


def test_generate_needs_a_checkpoint_and_not_a_batch():
    config = compose(["train.global_batch_size=7"])
    assert [error.key for error in problems(config, "generate")] == ["checkpoint.load"]
    assert problems(config, "prepare") == []


def test_every_number_has_a_range_and_every_listed_key_exists():
    numbers = {key for key, hint in key_types().items() if hint in (int, float, int | None, float | None)}
    assert numbers - RANGES.keys() == {"stop.target_loss"}  # any finite number is a target
    assert CHOICES.keys() | RANGES.keys() <= key_types().keys()


def test_backends_are_those_of_the_kernels():
    from kernels.backend import ops

    named = {key.removeprefix("kernels."): set(CHOICES[key]) - {"auto"} for key in key_types() if key.startswith("kernels.")}
    del named["layers"]
    assert named == {op: {b.name for b in ops()[op]} for op in named}


def test_padded_vocabulary():
    assert sizes.padded_vocabulary(50257, 128, 8) == 50304
    assert sizes.padded_vocabulary(2048, 128, 2) == 2048
    assert sizes.padded_vocabulary(100, 128, 3) == 384


def test_rank_grid_numbers_as_megatron_core_does():
    """tp fastest, then cp, dp, pp; and back."""
    grid = geometry.Grid(tp=2, cp=2, dp=3, pp=2)
    assert grid.ranks == 24 and grid.rank(tp=1) == 1 and grid.rank(cp=1) == 2 and grid.rank(dp=1) == 4 and grid.rank(pp=1) == 12
    assert [grid.rank(**grid.coordinates(rank)) for rank in range(24)] == list(range(24))


def test_batch_geometry():
    batch = geometry.Batch.of(compose(["launch.ranks=4", "parallel.tp=2", "train.steps=200"]))
    assert (batch.data_ranks, batch.accumulation, batch.tokens_per_step, batch.steps) == (2, 2, 32 * 256, 200)
    assert (batch.samples, batch.tokens) == (6400, 6400 * 256)


def test_token_budget_gives_the_steps():
    assert geometry.steps_of(compose(["train.tokens=1e6"])) == 123  # 122.07 steps of 8,192: the last one goes over


def test_thousands_of_ranks_are_elided():
    config = compose(["model=mt_nlg_530b", "launch.ranks=2240", "parallel.tp=8", "parallel.pp=35", "train.global_batch_size=1920",
                      "train.micro_batch_size=1"])
    text = geometry.text(config)
    assert len(text.splitlines()) < 25 and max(map(len, text.splitlines())) <= 160
    assert "2,240 = TP 8 x DP 8 x PP 35" in text and "2232-2239" in text and "padded to 50,304 rows" in text
