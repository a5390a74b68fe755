"""Floating-point operations of a model, the peak of known devices, and the two ratios between them.

A matrix product of [m, k] and [k, n] is 2 m k n operations. Only matrix products are counted (norms, softmax, rotations and the
embedding lookup are not). Forward, for one token, with h hidden, a heads and g key/value heads of size d, f the MLP's width, s the sequence:

    linear layers     L [2 h d (a + 2 g) + 2 h d a + 2 h f c]        c = 3 for gated activations (SwiGLU, GeGLU), else 2
    core attention    L [4 a d s]                                    scores and weighted values; causal=True: s -> s / 2
    logits            2 h V                                      with words of width e: 2 e V + 4 e h for the two projections

Of an encoder the attention is never halved, and its head (2 h V + 2 h h) is for the masked tokens alone, data.masked_share of all. Of an
encoder-decoder a token is the encoder's: the decoder's share follows from how much it has to say (config/spans.py), its cross-attention has keys and
values of the encoder's tokens.

Training is three times that: backward has two products for every one of forward. Without the embedding table this is the 6 N + 12 L H Q T
of PaLM (Chowdhery et al. 2022, arXiv 2204.02311, appendix B), which counts the *whole* attention matrix; so does `causal=False`, the default.
`causal=True` counts the half that a causal kernel needs, as Megatron-LM and Megatron-Bridge do since 2025. Say which when you compare.

MFU (model FLOPs utilisation) is model operations over peak: recomputation earns nothing. HFU counts the recomputed operations too.

Mixed peak. With FP8 products (precision.fp8) a token has F8 operations in FP8 and F16 in the layers' own type, and no single peak fits both. Each
part is counted at its own peak, so that utilisation is the time a device would need at full speed over the time it took:

    utilisation = (F16 / P16 + F8 / P8) (tokens/s) / devices,    F8 = 3 (L - 2 e) / L of the linear layers    (all of F without FP8: the plain ratio)

e = precision.fp8_edge_layers: that many layers at each end stay in their type, and so do the products of attention (scores and weighted values)
and the logits. A number over the bf16 peak alone would be up to twice as high, one over the FP8 peak alone lower by what was never in FP8.
"""
import re
from dataclasses import dataclass

from megatron_ext.config import sizes
from megatron_ext.config.schema import DataConfig, ModelConfig, PrecisionConfig
from megatron_ext.config.spans import spans_of

DATA = DataConfig()
# Device name as torch and NVML report it (regular expression, whole name) -> dense TFLOP/s in bf16 (= fp16) and fp8, both with fp32
# accumulation and without sparsity. A variant that is not listed (laptop, MIG slice, export model) is unknown rather than guessed at.
_PEAKS: tuple[tuple[str, float, float | None], ...] = (
    # NVIDIA A100 data sheet: 312 for every form factor. Others of the Ampere generation: data sheets, GA102 white paper (RTX).
    (r"A[18]00[- ](SXM4|PCIE)\S*|A[18]00 \d+GB PCIe", 312.0, None),
    (r"A40", 149.7, None),
    (r"A30", 165.0, None),
    (r"A10", 125.0, None),
    (r"RTX A6000", 154.8, None),
    (r"GeForce RTX 3090", 71.0, None),
    # NVIDIA H100 data sheet; H100 white paper for the exact 989.4; H200, GH200, H20 data sheets.
    (r"H100( \d+GB)? (HBM3|SXM5?).*|H800( \d+GB)? (HBM3|SXM5?).*|H800", 989.4, 1978.9),
    (r"H100 PCIe", 756.0, 1513.0),
    (r"H100 NVL", 835.5, 1671.0),
    (r"H200|H200 SXM.*|GH200.*", 989.4, 1978.9),
    (r"H200 NVL", 835.5, 1671.0),
    (r"H20( .*)?", 148.0, 296.0),
    # NVIDIA Blackwell data sheets: HGX B200 and B300 per GPU, GB200 NVL72 / 72.
    (r"B200|B300.*", 2250.0, 4500.0),
    (r"GB200|GB300", 2500.0, 5000.0),
    # NVIDIA L4, L40, L40S data sheets; Ada and Blackwell RTX white papers (figures with fp32 accumulation).
    (r"L40S", 362.05, 733.0),
    (r"L40", 181.05, 362.0),
    (r"L4", 121.0, 242.5),
    (r"RTX 6000 Ada Generation", 364.2, 728.5),
    (r"GeForce RTX 4090", 165.2, 330.3),
    (r"GeForce RTX 5090", 209.5, 419.0),
    # AMD Instinct MI250X (per die, which is what torch calls a device), MI300X, MI325X, MI355X data sheets.
    (r"AMD Instinct MI250X?", 191.5, None),
    (r"AMD Instinct MI3(00|25)X", 1307.4, 2614.9),
    (r"AMD Instinct MI355X", 2516.6, 5033.2),
)


def peak_flops(device_name: str, dtype: str = "bf16") -> float | None:
    """Dense peak of a device in FLOP/s.

    Args:
        device_name: as `torch.cuda.get_device_name()` gives it.
        dtype: bf16 | fp16 | fp8. Anything else (fp32, where TF32 may or may not be in use) has no peak here.

    Returns:
        None when the device or the type is not known; then there is no MFU.
    """
    name = re.sub(r"^(NVIDIA|Tesla|NVIDIA Tesla)\s+", "", device_name.strip())
    for pattern, bf16, fp8 in _PEAKS:
        if "MIG" not in name and re.fullmatch(pattern, name):
            tera = {"bf16": bf16, "fp16": bf16, "fp8": fp8}.get(dtype)
            return None if tera is None else tera * 1e12
    return None


@dataclass(frozen=True)
class TokenFlops:
    """Operations for one token, forward only. fp8: those of `linear` whose products are in FP8."""

    linear: float
    attention: float
    logits: float
    fp8: float = 0.0

    @property
    def forward(self) -> float:
        return self.linear + self.attention + self.logits

    @property
    def training(self) -> float:
        """Forward and backward: the numerator of MFU."""
        return 3 * self.forward

    def hardware(self, recompute: str = "none") -> float:
        """What is really computed in training: the numerator of HFU. `recompute`: none, selective (core attention), full (all layers)."""
        again = {"none": 0.0, "selective": self.attention, "full": self.linear + self.attention}
        if recompute not in again:
            raise ValueError(f"recompute={recompute}: none, selective or full")
        return self.training + again[recompute]

    @property
    def training_fp8(self) -> float:
        """Of `training`, what is in FP8."""
        return 3 * self.fp8

    def hardware_fp8(self, recompute: str = "none") -> float:
        """Of `hardware(recompute)`, what is in FP8."""
        return (4 if recompute == "full" else 3) * self.fp8


def token_flops(model: ModelConfig, *, sequence_length: int, vocab_size: int, causal: bool = False,
                precision: PrecisionConfig | None = None, data: DataConfig = DATA) -> TokenFlops:
    """Operations a token of a sequence; `vocab_size` without padding, since padding is no use to the model.

    Args:
        precision: says which of them are FP8 products; None = none.
        data: says what the objective of a family that is no decoder asks of each sequence.
    """
    hidden, width = model.hidden_size, sizes.head_dim(model) * model.num_attention_heads
    key_value = 2 * sizes.head_dim(model) * sizes.query_groups(model)
    matrices = 3 if model.activation in sizes.GATED else 2
    linear = 2 * hidden * (2 * width + key_value) + 2 * hidden * sizes.ffn_size(model) * matrices
    attention = 4 * width * sequence_length * (0.5 if causal and model.family == "decoder" else 1.0)
    quantised = 0 if precision is None or precision.fp8 is None else max(0, model.num_layers - 2 * precision.fp8_edge_layers)
    embedded = sizes.embedding_size(model)
    logits = 2.0 * embedded * vocab_size + (4.0 * embedded * hidden if embedded != hidden else 0.0)
    if model.family == "encoder":
        logits = data.masked_share * (logits + 2 * hidden * hidden)
    if model.family == "encoder_decoder":
        return _both_stacks(model, linear, width, logits, sequence_length, causal, data)
    return TokenFlops(linear=float(model.num_layers * linear), attention=model.num_layers * attention, logits=logits,
                      fp8=float(quantised * linear))


def _both_stacks(model: ModelConfig, linear: int, width: int, logits: float, length: int, causal: bool, data: DataConfig) -> TokenFlops:
    """linear: of a layer without cross-attention. width: of all heads."""
    said = spans_of(length, data.masked_share, data.span_length).decoder
    share, product, decoder = said / length, 2 * model.hidden_size * width, sizes.decoder_layers(model)
    crossing = product * (2 * share + 2)  # queries and output of what is said, keys and values of what is read
    attention = model.num_layers * length + decoder * share * (length + said * (0.5 if causal else 1.0))
    return TokenFlops(linear=model.num_layers * linear + decoder * (share * linear + crossing), attention=4 * width * attention, logits=share * logits)


def utilisation(flops_per_token: float, *, tokens_per_second: float, devices: int, peak: float | None, fp8_flops: float = 0.0,
                fp8_peak: float | None = None) -> float | None:
    """MFU or HFU as a fraction of 1, by whether the operations are `.training` or `.hardware(...)`.

    Args:
        tokens_per_second: of the whole job. peak: of one device, FLOP/s; None = unknown, and so is the result.
        fp8_flops: of `flops_per_token`, what is in FP8 products, counted at `fp8_peak` (None = unknown; see the mixed peak above).
    """
    if peak is None or fp8_flops and fp8_peak is None:
        return None
    if not fp8_flops:
        return flops_per_token * tokens_per_second / (devices * peak)
    return ((flops_per_token - fp8_flops) / peak + fp8_flops / fp8_peak) * tokens_per_second / devices
