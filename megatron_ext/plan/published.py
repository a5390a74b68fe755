"""Throughputs that others have published, as configurations of ours: what the timing model is fitted to and judged by. No torch.

What a source does not say is filled in by one rule, the same for every row: of a pipeline's micro-batch one sequence, interleaved layer by layer; without a
pipeline a rank takes the sequences of a step at once, where they are few (four in the Megatron-LM table).
"""
from dataclasses import dataclass, replace

from megatron_ext.config.schema import Config, DataConfig, LaunchConfig, ModelConfig, ParallelConfig, PrecisionConfig, TrainConfig
from megatron_ext.plan import hardware
from megatron_ext.plan.timing import MEGATRON, Software

TABLE = "Megatron-LM's README, images/model_table.png (H100, core r0.8.0, sequence 4,096, vocabulary 131,072, the whole attention matrix counted)"


@dataclass(frozen=True)
class Row:
    """A published figure. unit: tflops (a GPU, the whole attention matrix counted), causal (half of it), tokens (a second and GPU)."""

    name: str
    config: Config
    vocab: int
    measured: float
    unit: str
    source: str
    software: Software = MEGATRON
    sharded: bool = False  # FSDP: weights and gradients are split over the data ranks too, which this runtime does not


def _config(model: ModelConfig, *, tp: int, pp: int, gpus: int, batch: int, length: int, micro: int = 1, vpp: int | None = None, cp: int = 1,
            fp8: str | None = None, recompute: str = "none", gpu: str = "h100_sxm") -> Config:
    return Config(
        model=model, parallel=ParallelConfig(tp=tp, pp=pp, vpp=vpp, cp=cp, sp=tp > 1, recompute=recompute),
        precision=PrecisionConfig(dtype="bf16", fp8=fp8), data=DataConfig(sequence_length=length),
        train=TrainConfig(global_batch_size=batch, micro_batch_size=micro), launch=LaunchConfig(ranks=gpus), hardware=hardware.load(gpu),
    )


def gpt(heads: int, hidden: int, layers: int, *, tp: int, pp: int, gpus: int, batch: int) -> Config:
    """A model of the Megatron-LM table."""
    model = ModelConfig(name=f"gpt_{layers}x{hidden}", num_layers=layers, hidden_size=hidden, num_attention_heads=heads, max_sequence_length=4096,
                        position_embedding="learned", norm="layernorm", activation="gelu", bias=True, tied_embeddings=True, vocab_size=131072)
    each = batch * tp * pp // gpus
    return _config(model, tp=tp, pp=pp, gpus=gpus, batch=batch, length=4096, micro=1 if pp > 1 or each > 4 else each,
                   vpp=layers // pp if pp > 1 and layers > pp else None)


def megatron_table() -> list[Row]:
    """The nine rows of weak scaling."""
    rows = [
        ("1.7B", 16, 2048, 24, 1, 1, 48, 192, 408.8), ("7.1B", 32, 4096, 30, 2, 1, 96, 192, 465.9), ("16B", 48, 6144, 32, 4, 1, 192, 192, 489.1),
        ("32B", 56, 7168, 48, 8, 1, 384, 192, 459.6), ("70B", 64, 8192, 84, 8, 2, 768, 384, 419.7), ("119B", 80, 10240, 92, 8, 4, 1536, 768, 420.5),
        ("177B", 96, 12288, 96, 8, 6, 2304, 1152, 432.8), ("314B", 128, 16384, 96, 8, 8, 3072, 1536, 474.4),
        ("462B", 144, 18432, 112, 8, 16, 6144, 3072, 459.9),
    ]
    return [Row(name, gpt(heads, hidden, layers, tp=tp, pp=pp, gpus=gpus, batch=batch), 131072, measured, "tflops", TABLE)
            for name, heads, hidden, layers, tp, pp, gpus, batch, measured in rows]


def strong_scaling(chunks: int = 16) -> list[tuple[Row, float | None]]:
    """The 177B model on 96 to 4,608 GPUs, batch 1,152, in the table's TP 8 x PP 6; the MFU that the README states, where it does.

    Args:
        chunks: of a stage, which the README does not tell; 16 is layer by layer.
    """
    stated = {96: 0.47, 2304: 0.44, 4608: 0.42}
    found = []
    for gpus in (96, 144, 288, 576, 1152, 2304, 3072, 4608):
        config = gpt(96, 12288, 96, tp=8, pp=6, gpus=gpus, batch=1152)
        config = replace(config, parallel=replace(config.parallel, vpp=chunks))
        found.append((Row(f"177B on {gpus}", config, 131072, stated.get(gpus, 0.0) * 989.4, "tflops", TABLE), stated.get(gpus)))
    return found


def _llama(size: str) -> ModelConfig:
    sizes = {"8b": (32, 4096, 32, 14336), "70b": (80, 8192, 64, 28672), "405b": (126, 16384, 128, 53248)}
    layers, hidden, heads, ffn = sizes[size]
    return ModelConfig(name=f"llama3_{size}", num_layers=layers, hidden_size=hidden, num_attention_heads=heads, num_query_groups=8, ffn_hidden_size=ffn,
                       max_sequence_length=131072, vocab_size=128256)


def others() -> list[Row]:
    """Rows that nothing was fitted to."""
    herd = "The Llama 3 Herd of Models (arXiv 2407.21783), table 4; half of the attention matrix counted here"
    titan = "torchtitan, docs/performance: Llama 3.1 8B on 8 H100 at 500 W, FSDP, selective recomputation of every second product"
    # torch's attention is FlashAttention-2, which reaches 35 % of an H100 (arXiv 2407.08608, abstract), where kernels for Hopper reach 50 %.
    # Power goes with the cube of the clock where voltage follows it: 500 of 700 W leave 0.89 of the speed. FSDP is data parallelism here.
    half = replace(MEGATRON, again=0.5, attention=0.7, speed=(500 / 700) ** (1 / 3))
    bridge = "Megatron-Bridge, docs/performance-summary: H100, FP8 with current scaling, sequence 8,192, half of the attention matrix counted"
    small, large, huge = _llama("8b"), _llama("70b"), _llama("405b")
    # 126 layers are not sixteen stages' worth; Meta's first and last stage hold one less. 128 layers' time is shared out here, 126 are counted.
    sixteen = {"tp": 8, "pp": 16, "length": 8192}
    deep = replace(huge, num_layers=128)
    return [
        Row("Llama 3 405B, 8,192 GPUs", _config(deep, gpus=8192, batch=2048, vpp=8, **sixteen), 128256, 430 * 128 / 126, "causal", herd, sharded=True),
        Row("Llama 3 405B, 16,384 GPUs", _config(deep, gpus=16384, batch=2048, vpp=8, **sixteen), 128256, 400 * 128 / 126, "causal", herd, sharded=True),
        Row("Llama 3 405B, 131,072 tokens", _config(deep, gpus=16384, batch=128, vpp=8, cp=16, **(sixteen | {"length": 131072})), 128256, 380 * 128 / 126,
            "causal", herd, sharded=True),
        Row("torchtitan 8B, compiled", _config(small, tp=1, pp=1, gpus=8, batch=8, length=8192), 128256, 6667, "tokens", titan, half, True),
        Row("torchtitan 8B, eager", _config(small, tp=1, pp=1, gpus=8, batch=8, length=8192), 128256, 5762, "tokens", titan,
            replace(half, elementwise=2.5), True),
        Row("torchtitan 8B, float8", _config(small, tp=1, pp=1, gpus=8, batch=8, length=8192, fp8="current"), 128256, 8532, "tokens", titan, half, True),
        Row("Megatron-Bridge 8B, FP8", _config(small, tp=1, pp=1, gpus=8, batch=128, length=8192, fp8="current"), 128256, 744, "causal", bridge, sharded=True),
        Row("Megatron-Bridge 70B, FP8", _config(large, tp=4, pp=8, vpp=5, gpus=64, batch=128, length=8192, fp8="current"), 128256, 731, "causal", bridge),
        # 126 layers on 8 stages of 8 chunks: 128 are timed, as above.
        Row("Megatron-Bridge 405B, FP8", _config(deep, tp=8, pp=8, vpp=8, cp=2, gpus=1024, batch=512, length=8192, fp8="current"), 128256, 827 * 128 / 126,
            "causal", bridge),
        *_mt_nlg(),
    ]


def _mt_nlg() -> list[Row]:
    """MT-NLG on another GPU: batch 1,920 in 60.1, 50.2 and 44.4 seconds."""
    source = "Smith et al. 2022 (arXiv 2201.11990), section 2.3: MT-NLG 530B on A100, TP 8 x PP 35, full recomputation"
    # Attention was not flash attention yet, and tensor-parallel communication was not cut to run beside products.
    software = Software(fused_loss=False, attention=0.5)
    model = ModelConfig(name="mt_nlg_530b", num_layers=105, hidden_size=20480, num_attention_heads=128, max_sequence_length=2048,
                        position_embedding="learned", norm="layernorm", activation="gelu", bias=True, tied_embeddings=True, vocab_size=50257)
    rows = ((2240, 60.1), (2800, 50.2), (3360, 44.4))
    return [Row(f"MT-NLG 530B, {gpus:,} A100", _config(model, tp=8, pp=35, gpus=gpus, batch=1920, length=2048, recompute="full", gpu="a100_80g"), 50257,
                1920 * 2048 / seconds / gpus, "tokens", source, software) for gpus, seconds in rows]


def predicted(row: Row, step) -> float:
    """The figure of a `timing.Step` in the row's unit."""
    return {"tflops": step.tflops_per_gpu, "causal": step.causal_tflops_per_gpu, "tokens": step.tokens_per_second_per_gpu}[row.unit]
