"""What a rank keeps of forward passes until their backward, and what lies beside it at the fullest moment. Bytes; no torch.

With b bytes an element, T tokens of a micro-batch on this rank, TP ranks and w = 1 / TP with sequence parallelism, else 1, a fused layer keeps

    residual stream   4 h w b     the input of each norm (the layer's, and the sum after attention) and what each gives; 3 in parallel blocks, 2 with one norm
    projections       (a + 2 g) d / TP b     queries, keys and values, and (a + g) d / TP b more where positions rotate them, and where norms take copies
    attention         a d / TP b + 4 a / TP     the result, and a number for each row (flash attention)
    MLP               (c + 1) f / TP b     before and after the activation; c = 2 with a gate, 0 with relu
    dropout           2 h w     a byte for each element that may be dropped

a token. Full recomputation keeps the input of every `recompute_layers` layers, and those layers whole while they go backward. In FP8 the inputs of
products are kept in FP8. Counted from a trace of the real step (`trace.py`), with which tests/test_plan_trace.py compares.
"""
import math
from dataclasses import dataclass

from megatron_ext.config import sizes
from megatron_ext.config.geometry import Grid
from megatron_ext.config.schema import Config
from megatron_ext.config.spans import spans_of
from megatron_ext.plan.buffers import BYTES, state
from megatron_ext.plan.shapes import chunks


@dataclass(frozen=True)
class Layer:
    """Bytes of one layer and micro-batch. kept: until backward. input: of the layer, what recomputation keeps. backward: the most beside `kept` while the
    layer goes backward."""

    kept: float
    input: float
    backward: float
    parts: dict[str, float]


def tokens(config: Config) -> float:
    """Of a micro-batch on this rank; an encoder-decoder's encoder reads them."""
    length = config.data.sequence_length
    if config.model.family == "encoder_decoder":
        length = spans_of(length, config.data.masked_share, config.data.span_length).encoder
    return config.train.micro_batch_size * length / config.parallel.cp


def said(config: Config) -> float:
    """Tokens that an encoder-decoder's decoder says."""
    return config.train.micro_batch_size * spans_of(config.data.sequence_length, config.data.masked_share, config.data.span_length).decoder


def layer(config: Config, *, crosses: bool = False) -> Layer:
    """One layer. crosses: of an encoder-decoder's decoder."""
    model, parallel, b = config.model, config.parallel, BYTES[config.precision.dtype]
    read = tokens(config)
    t = said(config) if crosses else read
    tp, w, hidden, ffn = parallel.tp, 1 / (parallel.tp if parallel.sp else 1), model.hidden_size, sizes.ffn_size(model)
    heads, head = model.num_attention_heads, sizes.head_dim(model)
    width, key_value = heads * head, head * sizes.query_groups(model)
    into = (2 if model.activation in sizes.GATED else 1) * ffn
    fp8 = 1 if config.precision.fp8 is not None else b  # bytes of what only a product reads
    plain = config.kernels.layers == "plain"
    shared = tp > 1 and sizes.query_groups(model) < tp  # keys are gathered, and each rank takes its own (models/shared_keys.py)
    rotated = model.position_embedding == "rope"
    turned = (width / tp + max(key_value / tp, head if shared else 0)) * b
    norms = 1 if model.block == "parallel_one_norm" else 2
    inputs = 1 if model.block in ("parallel", "parallel_one_norm") else 2  # of the norms: one sum for both, or one each
    parts = {
        "stream": (inputs * b + norms * fp8) * hidden * w + (8 * hidden * w if plain else 0),  # plain norms keep fp32 copies
        "projections": (width + 2 * key_value) / (1 if shared else tp) * b + (turned if rotated else 0) + (turned if model.qk_norm else 0),
        "attention": width / tp * fp8 + 4 * heads / tp + (width / tp * b if fp8 != b else 0),
        "mlp": (0 if model.activation == "relu" else into / tp * b) + ffn / tp * fp8 + (ffn / tp * b if plain else 0),  # relu keeps what it gives
        "dropout": 2 * hidden * w if model.hidden_dropout else 0.0,
        "statistics": norms * (8 if model.norm == "layernorm" else 4) * w,
    }
    if crosses:
        parts["cross"] = 2 * hidden * w * b + 2 * width / tp * b + 4 * heads / tp + (hidden * w if model.hidden_dropout else 0) + 2 * width / tp * b * read / t
    trained = not config.lora.rank  # a frozen matrix needs no gradient, and none of megatron-core's placeholders for one
    fc1, fc2 = (into * hidden / tp * b, ffn * hidden / tp * b) if trained else (0.0, 0.0)
    stream = 2 * hidden * w * b * t  # the gradient that comes in, and the one that goes on
    backward = max(stream + ffn / tp * b * t + fc2, stream + (into - ffn) / tp * b * t + fc1 + (hidden * b * t if tp > 1 else 0))
    if model.block in ("parallel", "parallel_one_norm"):
        backward += stream  # attention's half waits for the MLP's, or the other way
    return Layer(kept=t * sum(parts.values()), input=t * hidden * w * b, backward=backward, parts={k: t * v for k, v in parts.items()})


def in_flight(config: Config, pipeline_rank: int, micro_batches: int) -> float:
    """Micro-batches whose activations a pipeline rank holds at most, in passes through one of its chunks."""
    pp, v = config.parallel.pp, config.parallel.vpp or 1
    if v == 1:
        return min(micro_batches, pp - pipeline_rank)
    # megatron-core's warm-up of the interleaved schedule, and the forward pass that follows it
    return min(micro_batches * v, 2 * (pp - pipeline_rank - 1) + (v - 1) * pp + 1)


@dataclass(frozen=True)
class Activations:
    """Bytes at the fullest moment of a step.

    Attributes:
        layers: kept by layers. edges: embedding, last norm, head.
        backward: of the layer that goes backward, its own recomputed activations included.
        buffers: sent, received, gathered.
        clipping: at the end of the step, when nothing else is there, a copy of the largest gradient that the rank owns: without Transformer Engine and Apex
            megatron-core scales out of place (and what autograd made of a tied table).
        workspace: inside kernels, which a trace does not see.
    """

    layers: float
    edges: float
    backward: float
    buffers: float
    clipping: float
    workspace: float
    parts: dict[str, float]

    @property
    def traced(self) -> float:
        """What a trace sees."""
        return max(self.layers + self.edges + self.backward + self.buffers, self.clipping)


def activations(config: Config, pipeline_rank: int, vocab: int, micro_batches: int, *, head: str = "vocabulary") -> Activations:
    """What a pipeline rank holds beside its parameters, gradients and optimizer.

    Args:
        vocab: words that exist.
        micro_batches: of a step, on a data rank.
    """
    model, parallel, b, t = config.model, config.parallel, BYTES[config.precision.dtype], tokens(config)
    w, held = 1 / (parallel.tp if parallel.sp else 1), chunks(config, pipeline_rank)
    passes, both = in_flight(config, pipeline_rank, micro_batches), model.family == "encoder_decoder"
    one, crossing = layer(config), layer(config, crosses=True) if both else None
    encoded, decoded = (sum(getattr(c, name) for c in held) / len(held) for name in ("encoded", "decoded"))
    if not both:
        encoded, decoded = decoded, 0.0
    wire = t + (said(config) if both else 0)
    stream, whole = wire * model.hidden_size * w * b, wire * model.hidden_size * b
    full = parallel.recompute == "full"
    kept = again = 0.0
    for kind, count in ((one, encoded), (crossing, decoded)):
        if count:
            kept += kind.input * math.ceil(count / parallel.recompute_layers) if full else kind.kept * count
            again = max(again, kind.kept * min(parallel.recompute_layers, count) - kind.input if full else 0.0)
    begins = crossing if decoded and both else one  # goes backward first, while all is still kept
    kept += _once(config, encoded, decoded)
    first, has_head = held[0].first, held[-1].last and head == "vocabulary"
    # Of a rank's chunks the first embeds and the last has the head; both passes are among those in flight.
    embedded = passes / len(held) if first else 0
    edges = embedded * t * ((8 + 4) * 2 + (model.hidden_size * w if model.hidden_dropout else 0))
    rows = sizes.padded_vocabulary(vocab, model.vocab_multiple, parallel.tp) / parallel.tp
    table = rows * model.hidden_size * b
    placeholder = persistent = 0.0
    spoken = said(config) if both else t  # tokens at the head
    heard = spoken * model.hidden_size * b
    shown = heard * (2 * w)
    inputs = shown + (heard if parallel.sp else 0.0) if has_head else 0.0
    if has_head:
        placeholder = table + heard + shown / 2
        if model.tied_embeddings and first:  # autograd adds up both uses of the table: the first gradient waits for the second
            persistent = table
        if config.kernels.layers == "plain":
            placeholder += 3 * rows * spoken * 4
        placeholder += _special_head(config, rows, spoken, table)
    if config.lora.rank:
        placeholder, persistent = heard + shown / 2, 0.0
    # The head goes backward before any layer does: its inputs are gone when the first layer begins.
    at_head, at_layer = edges + inputs + max(placeholder, persistent), edges + persistent + begins.backward + again
    edges, backward = (edges + inputs, max(placeholder, persistent)) if at_head > at_layer else (edges, at_layer - edges)
    shared = whole if parallel.sp and not config.lora.rank else 0.0  # megatron-core's global buffer for a gathered input
    sent = (4 if parallel.vpp else 2) * stream if parallel.pp > 1 else 0.0  # interleaved, what comes next is under way too
    largest = state(config, Grid.of(config).rank(pp=pipeline_rank), vocab, head=head).largest if config.optim.clip else 0
    return Activations(
        layers=kept * passes, edges=edges, backward=backward, buffers=shared + sent, clipping=4.0 * largest + persistent,
        workspace=_workspace(config, rows, spoken, has_head),
        parts={name: value * encoded * passes for name, value in one.parts.items()} if not full and not both else {"all": kept * passes},
    )


def _once(config: Config, encoded: float, decoded: float) -> float:
    """Kept once by a micro-batch, whatever the number of layers: rotary tables; biases of the scores, and from where in their tables they came; what the
    encoder gave; of an encoder's last layer not the tokens that no head reads."""
    model, b = config.model, BYTES[config.precision.dtype]
    found, tp = 0.0, config.parallel.tp
    if model.position_embedding == "rope":
        found += config.data.sequence_length / config.parallel.cp * sizes.head_dim(model) * model.rotary_percent * 4
    if model.family == "encoder_decoder":
        rows = config.train.micro_batch_size
        lengths = (tokens(config) / rows if encoded else 0, said(config) / rows if decoded else 0)
        if model.position_embedding == "relative":
            found += sum(length**2 * (model.num_attention_heads / tp * b + 8) for length in lengths)
        found += tokens(config) * model.hidden_size * b if decoded else 0.0
    return found


def _special_head(config: Config, rows: float, t: float, table: float) -> float:
    """What the heads of some families hold beside the usual: an encoder stores its logits, of the masked words; a bias of logits widens the table."""
    model = config.model
    if model.family == "encoder":
        return 12 * rows * t * config.data.masked_share
    return 3 * table if model.head_bias else 0.0


def _workspace(config: Config, rows: float, t: float, has_head: bool) -> float:
    """Inside kernels: a tile of logits (fp32, at most 64 Mi elements), a product's split sums, and of a ring of context ranks the keys and values that
    travel."""
    found = 64 * 2**20
    if has_head and config.kernels.layers != "plain":
        found += 4 * min(rows * t, 2**26)
    if config.parallel.cp > 1:
        found += 4 * t * 2 * sizes.head_dim(config.model) * sizes.query_groups(config.model) / config.parallel.tp * BYTES[config.precision.dtype]
    return found
