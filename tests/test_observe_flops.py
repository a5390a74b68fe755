"""megatron_ext/observe/flops.py against torch's own counter, published throughputs, and the peaks of data sheets."""
import pytest

from megatron_ext.config.schema import DataConfig, ModelConfig, PrecisionConfig
from megatron_ext.config.spans import spans_of
from megatron_ext.observe.flops import peak_flops, token_flops, utilisation

LLAMA3 = {  # Llama-3 paper (arXiv 2407.21783), table 3
    "8B": ModelConfig(num_layers=32, hidden_size=4096, num_attention_heads=32, num_query_groups=8, ffn_hidden_size=14336),
    "70B": ModelConfig(num_layers=80, hidden_size=8192, num_attention_heads=64, num_query_groups=8, ffn_hidden_size=28672),
    "405B": ModelConfig(num_layers=126, hidden_size=16384, num_attention_heads=128, num_query_groups=8, ffn_hidden_size=53248),
}


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize(("activation", "width"), [("gelu", 160), ("swiglu", 96)])
def test_against_torchs_counter(groups, activation, width):
    """A decoder written out in plain products, forward and backward, counted by torch."""
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode
    layers, hidden, heads, size, vocab, seq = 2, 48, 4, 16, 80, 24

    def weight(*shape):
        return torch.randn(*shape, requires_grad=True)
    table, output = weight(vocab, hidden), weight(hidden, vocab)
    blocks = [(weight(hidden, heads * size), weight(hidden, 2 * groups * size), weight(heads * size, hidden),
               [weight(hidden, width) for _ in range(2 if activation == "swiglu" else 1)], weight(width, hidden)) for _ in range(layers)]
    with FlopCounterMode(display=False) as counter:
        x = table[torch.arange(seq)]
        for q_w, kv_w, o_w, ups, down in blocks:
            q = (x @ q_w).view(seq, heads, size).transpose(0, 1)
            k, v = (t.repeat_interleave(heads // groups, 0) for t in (x @ kv_w).view(seq, 2, groups, size).permute(1, 2, 0, 3))
            x = x + (torch.softmax(q @ k.transpose(1, 2), -1) @ v).transpose(0, 1).reshape(seq, heads * size) @ o_w
            gate = x @ ups[0]
            x = x + (torch.nn.functional.silu(gate) * (x @ ups[1]) if len(ups) == 2 else torch.nn.functional.gelu(gate)) @ down
        (x @ output).sum().backward()
    model = ModelConfig(num_layers=layers, hidden_size=hidden, num_attention_heads=heads, num_query_groups=groups, head_dim=size,
                        ffn_hidden_size=width, activation=activation)
    assert token_flops(model, sequence_length=seq, vocab_size=vocab).training * seq == counter.get_total_flops()


@pytest.mark.parametrize(("name", "tokens_per_second", "teraflops", "tolerance"),
                         [("8B", 14_451, 744, 0.002), ("70B", 1_664, 731, 0.025), ("405B", 328, 827, 0.002)])
def test_against_megatron_bridges_published_rates(name, tokens_per_second, teraflops, tolerance):
    """Per GPU, sequence 8,192 (ANCHORS.md section 3): they count the causal half. Their 8B and 405B rows agree to the printed digits,
    their 70B row's two figures do not agree with each other by the same formula (2.3 % too few operations)."""
    flops = token_flops(LLAMA3[name], sequence_length=8192, vocab_size=128256, causal=True)
    assert flops.training * tokens_per_second / 1e12 == pytest.approx(teraflops, rel=tolerance)


def test_palms_formula():
    """Appendix B: 6 N + 12 L H Q T, N without the input embedding; GPT-3's shape."""
    model = ModelConfig(num_layers=96, hidden_size=12288, num_attention_heads=96, activation="gelu")
    matrices = 96 * 12 * 12288**2 + 12288 * 51200
    want = 6 * matrices + 12 * 96 * 96 * 128 * 2048
    assert token_flops(model, sequence_length=2048, vocab_size=51200).training == pytest.approx(want, rel=1e-12)


def test_recomputation():
    flops = token_flops(LLAMA3["8B"], sequence_length=8192, vocab_size=128256)
    assert flops.hardware() == flops.training
    assert flops.hardware("selective") == flops.training + flops.attention
    assert flops.hardware("full") == flops.training + flops.attention + flops.linear
    with pytest.raises(ValueError, match="recompute=half"):
        flops.hardware("half")


def test_narrow_words():
    """2 e V of the logits, and the two projections between e and h: OPT-350M's sizes."""
    model = ModelConfig(num_layers=24, hidden_size=1024, num_attention_heads=16, embedding_size=512, activation="relu")
    assert token_flops(model, sequence_length=2048, vocab_size=50272).logits == 2 * 512 * 50272 + 2 * (2 * 512 * 1024)


def test_default_sizes():
    model = ModelConfig(num_layers=1, hidden_size=256, num_attention_heads=8, activation="swiglu")
    assert token_flops(model, sequence_length=1, vocab_size=1).linear == 2 * (4 * 256**2 + 3 * 256 * 704)  # 8/3 of 256, up to 64s


@pytest.mark.parametrize(("rate", "percent"), [(408.8, 41), (465.9, 47), (489.1, 49), (459.6, 46), (419.7, 42), (420.5, 43), (432.8, 44),
                                               (474.4, 48), (459.9, 47)])
def test_megatrons_published_utilisation(rate, percent):
    """The nine rows of Megatron-LM's README (ANCHORS.md section 3), to the whole per cent that they print."""
    mfu = utilisation(rate * 1e12 / 100, tokens_per_second=100 * 8, devices=8, peak=peak_flops("NVIDIA H100 80GB HBM3"))
    assert 100 * mfu == pytest.approx(percent, abs=0.55)


@pytest.mark.parametrize(("name", "dtype", "tera"), [
    ("NVIDIA A100-SXM4-80GB", "bf16", 312), ("NVIDIA A100-PCIE-40GB", "fp16", 312), ("NVIDIA A100 80GB PCIe", "bf16", 312),
    ("NVIDIA H100 80GB HBM3", "bf16", 989.4), ("NVIDIA H100 80GB HBM3", "fp8", 1978.9), ("NVIDIA H100 PCIe", "bf16", 756),
    ("NVIDIA H100 NVL", "bf16", 835.5), ("NVIDIA H200", "bf16", 989.4), ("NVIDIA GH200 480GB", "bf16", 989.4), ("NVIDIA H20", "bf16", 148),
    ("NVIDIA B200", "bf16", 2250), ("NVIDIA GB200", "fp8", 5000), ("NVIDIA L40S", "bf16", 362.05), ("NVIDIA L40", "bf16", 181.05),
    ("NVIDIA RTX A6000", "bf16", 154.8), ("NVIDIA GeForce RTX 4090", "bf16", 165.2), ("AMD Instinct MI300X", "bf16", 1307.4),
])
def test_peaks(name, dtype, tera):
    assert peak_flops(name, dtype) == tera * 1e12


@pytest.mark.parametrize(("name", "dtype"), [
    ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16"), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16"), ("Some GPU of 2031", "bf16"),
    ("NVIDIA A100-SXM4-80GB", "fp8"), ("NVIDIA H100 80GB HBM3", "fp32"), ("Tesla V100-SXM2-16GB", "bf16"), ("", "bf16"),
])
def test_unknown_means_no_mfu(name, dtype):
    assert peak_flops(name, dtype) is None
    assert utilisation(1e9, tokens_per_second=1.0, devices=1, peak=None) is None


# --- mixed peak

SMALL = ModelConfig(num_layers=4, hidden_size=64, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=128, activation="swiglu")


def test_mixed_peak_by_hand():
    """Head size 16. A layer: q and output 2 x 64 x 64 each, k and v 2 x 64 x 32 each, three products of 2 x 64 x 128. Edge layers of 1 leave 2 of 4.
    Peaks: 100 and 200 operations a second."""
    layer = 2 * 2 * 64 * 64 + 2 * 2 * 64 * 32 + 3 * 2 * 64 * 128  # 73,728
    attention = 4 * (4 * 64 * 32)  # four layers, 4 x 4 heads x 16 x sequence 32
    logits = 2 * 64 * 1000
    flops = token_flops(SMALL, sequence_length=32, vocab_size=1000, precision=PrecisionConfig(dtype="bf16", fp8="current", fp8_edge_layers=1))
    assert (flops.linear, flops.attention, flops.logits, flops.fp8) == (4 * layer, attention, logits, 2 * layer)
    seconds = 3 * ((2 * layer + attention + logits) / 100 + 2 * layer / 200)  # that a device at its peaks needs for a token, forward and backward
    options = {"tokens_per_second": 1e-6 * 8, "devices": 8, "peak": 100.0, "fp8_peak": 200.0}
    assert utilisation(flops.training, fp8_flops=flops.training_fp8, **options) == pytest.approx(1e-6 * seconds, rel=1e-12)
    again = seconds + (2 * layer + attention) / 100 + 2 * layer / 200  # all layers once more, the logits not
    assert utilisation(flops.hardware("full"), fp8_flops=flops.hardware_fp8("full"), **options) == pytest.approx(1e-6 * again, rel=1e-12)
    selective = seconds + attention / 100  # scores are not in FP8
    assert utilisation(flops.hardware("selective"), fp8_flops=flops.hardware_fp8("selective"), **options) == pytest.approx(1e-6 * selective, rel=1e-12)


def test_mixed_peak_lies_between_the_two_plain_ones():
    flops = token_flops(LLAMA3["8B"], sequence_length=8192, vocab_size=128256, precision=PrecisionConfig(dtype="bf16", fp8="blockwise"))
    bf16, fp8 = (peak_flops("NVIDIA H100 80GB HBM3", dtype) for dtype in ("bf16", "fp8"))
    options = {"tokens_per_second": 14_451, "devices": 1}
    mixed = utilisation(flops.training, peak=bf16, fp8_flops=flops.training_fp8, fp8_peak=fp8, **options)
    assert utilisation(flops.training, peak=fp8, **options) < mixed < utilisation(flops.training, peak=bf16, **options)


def test_without_fp8_nothing_changes_and_without_its_peak_there_is_none():
    plain = token_flops(SMALL, sequence_length=32, vocab_size=1000, precision=PrecisionConfig(dtype="bf16"))
    assert plain == token_flops(SMALL, sequence_length=32, vocab_size=1000) and plain.training_fp8 == plain.hardware_fp8("full") == 0
    options = {"tokens_per_second": 5.0, "devices": 2, "peak": 312e12}
    assert utilisation(plain.training, fp8_flops=plain.training_fp8, fp8_peak=None, **options) == utilisation(plain.training, **options)
    quantised = token_flops(SMALL, sequence_length=32, vocab_size=1000, precision=PrecisionConfig(dtype="bf16", fp8="current"))
    assert quantised.fp8 == quantised.linear
    assert utilisation(quantised.training, fp8_flops=quantised.training_fp8, fp8_peak=peak_flops("NVIDIA A100-SXM4-80GB", "fp8"), **options) is None
    assert utilisation(quantised.training, fp8_flops=quantised.training_fp8, fp8_peak=1.0, tokens_per_second=1.0, devices=1, peak=None) is None


def test_encoders_and_encoder_decoders_against_transformers_counted_by_torch():
    """BERT's head on all tokens there, so all are masked here; T5's decoder says as many tokens as spans of the encoder's sequence have."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from torch.utils.flop_counter import FlopCounterMode

    def counted(model, **inputs) -> int:
        model.set_attn_implementation("eager")  # torch does not count its fused attention on a CPU
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(**inputs)
        return counter.get_total_flops()

    sizes = {"num_layers": 2, "hidden_size": 48, "num_attention_heads": 4}
    tokens = torch.ones(1, 64, dtype=torch.int64)
    bert = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=80, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=160))
    ours = token_flops(ModelConfig(family="encoder", activation="gelu", ffn_hidden_size=160, **sizes), sequence_length=64, vocab_size=80, causal=True,
                       data=DataConfig(masked_share=1.0))
    assert ours.forward * 64 == counted(bert, input_ids=tokens)
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=80, d_model=48, d_kv=20, d_ff=160, num_layers=2, num_decoder_layers=3, num_heads=4))
    model = ModelConfig(family="encoder_decoder", activation="relu", ffn_hidden_size=160, decoder_layers=3, head_dim=20, **sizes)
    said = torch.ones(1, spans_of(64, 0.15, 3.0).decoder, dtype=torch.int64)
    assert token_flops(model, sequence_length=64, vocab_size=80).forward * 64 == pytest.approx(counted(t5, input_ids=tokens, decoder_input_ids=said), rel=1e-12)
