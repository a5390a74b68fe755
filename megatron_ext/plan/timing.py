"""How long a step takes: products, attention, elementwise passes, tensor-, context-, data- and pipeline-parallel communication, the bubble. No torch.

Of a micro-batch of T = b s / CP tokens a GPU computes in a layer, with TP ranks, h hidden, a heads and g key/value heads of d, f feed-forward:

    products     [T, h] x [h, (a + 2 g) d / TP],  [T, a d / TP] x [.., h],  [T, h] x [h, c f / TP],  [T, f / TP] x [.., h]   (c = 2 with a gate)
                 once forward, twice backward (the input's gradient and the weight's), each as `Calibration` says; on another GPU
                 `depth` goes with its FLOP a byte
    attention    4 a d s / TP a token forward, half of it where it is causal; backward 2.5 times that
    elementwise  bytes over the memory's rate (`_elementwise`)
    tensor       with sequence parallelism 6 all-gathers and 4 reduce-scatters of T h elements (2 + 2 forward, 4 + 2 backward), without 4 all-reduces, each
                 worth a scatter and a gather; what of it is waited for is the runtime's affair (`Software`)

A step is m micro-batches on the slowest stage, the bubble (p - 1) / v times a micro-batch of a mean stage (`bubble.py` simulates the schedule), what of
the data-parallel reduce-scatter the last backward pass, and of the all-gather the first forward pass, does not hide, and the optimizer.
"""
from dataclasses import asdict, dataclass

from megatron_ext.config import sizes
from megatron_ext.config.geometry import Batch, Grid
from megatron_ext.config.schema import Config
from megatron_ext.config.spans import spans_of
from megatron_ext.observe.flops import token_flops, utilisation
from megatron_ext.plan.buffers import BYTES, fullest_stage, state
from megatron_ext.plan.calibration import Calibration
from megatron_ext.plan.hardware import peaks

FITTED_ON = 989.4 / 3.35  # FLOP in bf16 a byte of memory, of the H100 whose rows the constants are fitted to


@dataclass(frozen=True)
class Passes:
    """Seconds of a micro-batch on one GPU, by part, forward and backward apart."""

    forward: dict[str, float]
    backward: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.forward.values()) + sum(self.backward.values())

    def times(self, count: float) -> "Passes":
        return Passes({k: v * count for k, v in self.forward.items()}, {k: v * count for k, v in self.backward.items()})

    def plus(self, other: "Passes") -> "Passes":
        def add(a: dict, b: dict) -> dict:
            return {k: a.get(k, 0.0) + b.get(k, 0.0) for k in {**a, **b}}

        return Passes(add(self.forward, other.forward), add(self.backward, other.backward))


@dataclass(frozen=True)
class Step:
    """A step's seconds and what follows from them.

    Attributes:
        parts: compute | attention | elementwise | recompute | tensor | context | pipeline | data | bubble | optimizer -> seconds; they add up to `seconds`.
        bubble: idle share of the pipeline, (p - 1) / (m v) of a stage with the mean load.
        mfu, hfu: of the bf16 peak, FP8 products of theirs (observe/flops.py); causal_mfu counts half of the attention matrix. None: unknown GPU.
    """

    seconds: float
    parts: dict[str, float]
    micro_batches: int
    bubble: float
    tokens_per_second: float
    tokens_per_second_per_gpu: float
    tflops_per_gpu: float
    mfu: float | None
    hfu: float | None
    causal_tflops_per_gpu: float

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class Software:
    """What a runtime does between the products.

    Attributes:
        elementwise: passes over memory, over those of fused kernels.
        fused_loss: it never stores logits, and makes them twice.
        exposed_forward, exposed_backward: share of tensor- and context-parallel communication that is waited for.
        sends_exposed: share of the transfers between stages that is waited for while the pipeline is full: without, with interleaving.
        again: share of the forward products that backward computes again, beside `parallel.recompute`.
        attention: rate of its attention over flash attention written for the GPU.
        speed: clock over that of a GPU at full power.
    """

    elementwise: float = 1.0
    fused_loss: bool = True
    exposed_forward: float = 1.0
    exposed_backward: float = 0.5
    sends_exposed: tuple[float, float] = (1.0, 0.0)
    again: float = 0.0
    attention: float = 1.0
    speed: float = 1.0


# megatron-core's own linear layers wait for the forward pass's gathers and scatters; backward has the weight's gradient to compute meanwhile.
OURS = Software()
# Megatron-LM with --tp-comm-overlap: products are cut so that communication runs beside them. What that costs cannot be told from `depth` in its rows.
MEGATRON = Software(fused_loss=False, exposed_forward=0.0, exposed_backward=0.0)
EAGER = Software(elementwise=2.5, fused_loss=False)  # every expression reads and writes for itself, norms and gates in fp32


class Clock:
    """Times of one configuration on its hardware."""

    def __init__(self, config: Config, calibration: Calibration, vocab: int, software: Software | None = None):
        hardware = config.hardware
        self.config, self.hardware, self.calibration, self.vocab = config, hardware, calibration, vocab
        self.software = software or (EAGER if config.kernels.layers == "plain" else OURS)
        self.peak, fp8 = peaks(hardware)
        self.rate = self.peak * self.software.speed
        # What a result costs beside its sum is memory's and the links' work: worth as many terms of the sum as the GPU computes while a byte moves.
        self.depth = calibration.depth * self.peak / (hardware.bandwidth * 1e12) / FITTED_ON
        self.fp8 = fp8 if config.precision.fp8 is not None else None
        self.grid = Grid.of(config)
        self.size = BYTES[config.precision.dtype]
        self.tokens = config.train.micro_batch_size * config.data.sequence_length / config.parallel.cp
        self.memory = hardware.bandwidth * 1e12 * calibration.memory

    @property
    def layers(self) -> float:
        """Layers, in worths of one over all tokens: an encoder-decoder's decoder sees fewer, and has attention twice."""
        model, data = self.config.model, self.config.data
        if model.family != "encoder_decoder":
            return model.num_layers
        spans = spans_of(data.sequence_length, data.masked_share, data.span_length)
        return model.num_layers + sizes.decoder_layers(model) * spans.decoder / spans.encoder * 4 / 3

    def product(self, out: float, depth: float, rows: float, *, linear: bool = True) -> float:
        """Seconds of [rows, depth] x [depth, out]."""
        peak = self.fp8 * self.software.speed if linear and self.fp8 is not None else self.rate
        return 2 * rows * out * (depth + self.depth) / (peak * self.calibration.gemm)

    def linear(self, out: float, depth: float, *, linear: bool = True) -> Passes:
        """A layer [out, depth] on this GPU's tokens."""
        t = self.tokens
        return Passes({"compute": self.product(out, depth, t, linear=linear)},
                      {"compute": self.product(depth, out, t, linear=linear) + self.product(out, t, depth, linear=linear)})

    def layer(self) -> Passes:
        """One transformer layer."""
        model, tp, t = self.config.model, self.config.parallel.tp, self.tokens
        hidden, width, ffn = model.hidden_size, sizes.head_dim(model) * model.num_attention_heads, sizes.ffn_size(model)
        key_value = 2 * sizes.head_dim(model) * sizes.query_groups(model)
        into = (2 if model.activation in sizes.GATED else 1) * ffn
        found = self.linear((width + key_value) / tp, hidden).plus(self.linear(hidden, width / tp))
        found = found.plus(self.linear(into / tp, hidden)).plus(self.linear(hidden, ffn / tp))
        cal = self.calibration
        rate = self.rate * self.software.attention
        pairs = 4 * width / tp * self.config.data.sequence_length * t * (0.5 if model.family == "decoder" else 1.0)  # causal: half of the matrix
        found = found.plus(Passes({"attention": pairs / (rate * cal.attention_forward)},
                                  {"attention": 2.5 * pairs / (rate * cal.attention_backward)}))
        found = found.plus(self._elementwise(hidden, width + key_value, into, ffn)).plus(self._tensor()).plus(self._context(key_value))
        if self.config.parallel.recompute == "full":
            again = {"recompute": sum(found.forward.values())}
            found = found.plus(Passes({}, again))
        elif self.config.parallel.recompute == "selective":
            found = found.plus(Passes({}, {"recompute": found.forward["attention"]}))
        if self.software.again:
            found = found.plus(Passes({}, {"recompute": self.software.again * found.forward["compute"] + found.forward["elementwise"]}))
        idle = max(0.0, cal.launch - sum(found.forward.values()))  # a GPU that waits for Python
        return found.plus(Passes({"elementwise": idle}, {"elementwise": idle}))

    def _elementwise(self, hidden: int, qkv: int, into: int, ffn: int) -> Passes:
        """Bytes a token, in units of an element's size: norms read and write, the two sums with the residual, rotations, the activation."""
        model, parallel = self.config.model, self.config.parallel
        whole, part = 1 / (parallel.tp if parallel.sp else 1), 1 / parallel.tp
        forward = (2 * 2 + 2 * 3) * hidden * whole + (into + ffn) * part
        backward = (2 * 3 + 2 * 2) * hidden * whole + (2 * into + ffn) * part
        if model.position_embedding == "rope":
            forward, backward = forward + 2 * qkv * part, backward + 2 * qkv * part
        forward, backward = self.software.elementwise * forward, self.software.elementwise * backward
        if self.fp8 is not None:  # each operand read, and written in FP8 as it is and transposed
            forward, backward = forward + 2 * (2 * hidden * whole + hidden * part + ffn * part), backward + 2 * ((qkv + into) * part + 2 * hidden * whole)
        rate = self.memory / (self.tokens * self.size)
        return Passes({"elementwise": forward / rate}, {"elementwise": backward / rate})

    def _rate(self, ranks: int, stride: int) -> float:
        """Bytes a second at which a ring over `ranks` GPUs, `stride` apart, carries each one's data."""
        domain = self.hardware.domain
        if ranks * stride <= domain:
            return self.hardware.nvlink * 1e9 * self.calibration.nvlink
        inside = max(1, domain // stride)  # members of the ring on one node: they share its links to the others
        return min(self.hardware.nvlink * self.calibration.nvlink, self.hardware.network * inside * self.calibration.network) * 1e9

    def _tensor(self) -> Passes:
        tp = self.config.parallel.tp
        if tp == 1:
            return Passes({}, {})
        each = self.tokens * self.config.model.hidden_size * self.size * (tp - 1) / tp / self._rate(tp, 1) + self.calibration.latency
        forward, backward = (4, 6) if self.config.parallel.sp else (4, 4)
        return Passes({"tensor": self.software.exposed_forward * forward * each}, {"tensor": self.software.exposed_backward * backward * each})

    def _context(self, key_value: int) -> Passes:
        cp, tp = self.config.parallel.cp, self.config.parallel.tp
        if cp == 1:
            return Passes({}, {})
        each = self.tokens * (cp - 1) * key_value / tp * self.size / self._rate(cp, tp) + self.calibration.latency * (cp - 1)
        # A ring's transfers run beside the attention of the part that is there; half of them are taken to be waited for.
        return Passes({"context": 0.5 * each}, {"context": each})

    def head(self) -> Passes:
        """Logits and loss."""
        model, tp = self.config.model, self.config.parallel.tp
        rows = sizes.padded_vocabulary(self.vocab, model.vocab_multiple, tp) / tp
        found = self.linear(rows, sizes.embedding_size(model), linear=False)
        bytes_ = self.calibration.fused if self.software.fused_loss else self.calibration.logits
        passes = self.tokens * rows * bytes_ / self.memory
        again = found.forward["compute"] if self.software.fused_loss else 0.0
        found = found.plus(Passes({"elementwise": passes / 2}, {"elementwise": passes / 2, "recompute": again}))
        return found.times(self.config.data.masked_share) if model.family == "encoder" else found  # of the masked words alone

    def embedding(self) -> Passes:
        """Looking words up, and adding up their gradients."""
        passes = self.tokens * self.config.model.hidden_size * (2 * self.size + 8) / self.memory
        return Passes({"elementwise": passes}, {"elementwise": passes})

    def transfer(self) -> float:
        """Seconds of handing a micro-batch on to the next stage."""
        parallel = self.config.parallel
        if parallel.pp == 1:
            return 0.0
        part = parallel.tp if parallel.sp else 1
        bytes_ = self.tokens * self.config.model.hidden_size * self.size / part
        inside = parallel.tp * parallel.cp * self.grid.dp * 2 <= self.hardware.domain
        rate = self.hardware.nvlink * self.calibration.nvlink if inside else self.hardware.network * self.calibration.network
        return bytes_ / (rate * 1e9) + self.calibration.latency

    def data(self) -> tuple[float, float]:
        """Seconds of the reduce-scatter of gradients and of the all-gather of weights."""
        ranks = self.grid.dp * self.grid.cp
        if ranks == 1:
            return 0.0, 0.0
        held = state(self.config, self.grid.rank(pp=fullest_stage(self.config, self.vocab)), self.vocab)
        share, rate = (ranks - 1) / ranks, self._rate(ranks, self.config.parallel.tp)
        latency = self.calibration.latency * ranks ** 0.5
        return held.gradients * share / rate + latency, held.weights * share / rate + latency

    def optimizer(self) -> float:
        """Gradients are zeroed, their norm is taken, and each rank's share is updated."""
        held = state(self.config, self.grid.rank(pp=fullest_stage(self.config, self.vocab)), self.vocab)
        ranks = self.grid.dp * self.grid.cp if self.config.parallel.distributed_optimizer else 1
        return (held.gradients + (2 * held.gradients + held.weights) / ranks + 2 * held.optimizer) / self.memory


def step_time(config: Config, calibration: Calibration, vocab: int, software: Software | None = None) -> Step:
    """A step of `config` on its hardware.

    Args:
        vocab: words that exist.
        software: None = this project's.
    """
    clock, parallel = Clock(config, calibration, vocab, software), config.parallel
    m, pp, v = max(1, Batch.of(config).accumulation), parallel.pp, parallel.vpp or 1
    stage = clock.layer().times(clock.layers / pp)
    first, last = stage.plus(clock.embedding()), stage.plus(clock.head())
    slowest = first.plus(clock.head()) if pp == 1 else max((first, last), key=lambda one: one.total)
    mean = (stage.total * pp + clock.embedding().total + clock.head().total) / pp
    parts: dict[str, float] = {}
    for one in (slowest.forward, slowest.backward):
        for name, seconds in one.items():
            parts[name] = parts.get(name, 0.0) + m * seconds
    if pp > 1:
        # Activations one way and gradients the other, once a chunk: the filling and emptying pipeline waits for them, later they run beside computing.
        parts["pipeline"] = 2 * clock.transfer() * ((pp - 1) + m * v * clock.software.sends_exposed[v > 1])
        parts["bubble"] = (pp - 1) / v * mean
    scatter, gather = clock.data()
    passes = pp * (v - 1) / v + 1 / v  # that hide it: interleaved, a chunk's gradients travel while the earlier chunks are computed
    back, ahead = passes * sum(slowest.backward.values()), passes * sum(slowest.forward.values())
    hidden_scatter = back if parallel.overlap_grad_reduce else 0.0
    hidden_gather = ahead if parallel.overlap_param_gather and parallel.overlap_grad_reduce and parallel.distributed_optimizer else 0.0
    parts["data"] = max(0.0, scatter - hidden_scatter) + max(0.0, gather - hidden_gather)
    parts["optimizer"] = clock.optimizer()
    return _step(config, clock, parts, m, (pp - 1) / (m * v))


def _step(config: Config, clock: Clock, parts: dict[str, float], micro_batches: int, bubble: float) -> Step:
    seconds, batch, ranks = sum(parts.values()), Batch.of(config), config.launch.ranks
    speed = batch.tokens_per_step / seconds
    flops = token_flops(config.model, sequence_length=config.data.sequence_length, vocab_size=clock.vocab, precision=config.precision, data=config.data)
    causal = token_flops(config.model, sequence_length=config.data.sequence_length, vocab_size=clock.vocab, causal=True, data=config.data)
    common = {"tokens_per_second": speed, "devices": ranks, "peak": clock.peak, "fp8_peak": clock.fp8}
    recompute = config.parallel.recompute
    return Step(
        seconds=seconds, parts=parts, micro_batches=micro_batches, bubble=bubble, tokens_per_second=speed, tokens_per_second_per_gpu=speed / ranks,
        tflops_per_gpu=flops.training * speed / ranks / 1e12,
        mfu=utilisation(flops.training, fp8_flops=flops.training_fp8, **common),
        hfu=utilisation(flops.hardware(recompute), fp8_flops=flops.hardware_fp8(recompute), **common),
        causal_tflops_per_gpu=causal.training * speed / ranks / 1e12,
    )
