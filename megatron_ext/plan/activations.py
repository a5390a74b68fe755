"""What a rank keeps of forward passes until their backward, and what lies beside it at the fullest moment. Bytes; no torch.

With b bytes an element, T tokens of a micro-batch on this rank, TP ranks and w = 1 / TP with sequence parallelism, else 1, a fused layer keeps

    residual stream   4 h w b     the input of each norm (the layer's, and the sum after attention) and what each gives
    projections       (a + 2 g) d / TP b     queries, keys and values, and (a + g) d / TP b more where positions rotate them
    attention         a d / TP b + 4 a / TP     the result, and a number for each row (flash attention)
    MLP               (c + 1) f / TP b     before and after the activation; c = 2 with a gate
    dropout           2 h w     a byte for each element that may be dropped

a token. Full recomputation keeps the input of every `recompute_layers` layers, and those layers whole while they go backward. In FP8 the inputs of
products are kept in FP8. Counted from a trace of the real step (`trace.py`), with which tests/test_plan_trace.py compares.
"""
from dataclasses import dataclass

from megatron_ext.config import sizes
from megatron_ext.config.geometry import Grid
from megatron_ext.config.schema import Config
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
    """Of a micro-batch on this rank."""
    return config.train.micro_batch_size * config.data.sequence_length / config.parallel.cp


def layer(config: Config) -> Layer:
    """One layer."""
    model, parallel, b, t = config.model, config.parallel, BYTES[config.precision.dtype], tokens(config)
    tp, w, hidden, ffn = parallel.tp, 1 / (parallel.tp if parallel.sp else 1), model.hidden_size, sizes.ffn_size(model)
    heads, head = model.num_attention_heads, sizes.head_dim(model)
    key_value = head * sizes.query_groups(model)
    into = (2 if model.activation in sizes.GATED else 1) * ffn
    fp8 = 1 if config.precision.fp8 is not None else b  # bytes of what only a product reads
    plain = config.kernels.layers == "plain"
    attention = heads * head / tp * fp8 + 4 * heads / tp + (head * heads / tp * b if fp8 != b else 0)
    parts = {
        "stream": (2 * b + 2 * fp8) * hidden * w + (8 * hidden * w if plain else 0),  # plain norms keep fp32 copies
        "projections": (heads * head + 2 * key_value) / tp * b + ((heads * head + key_value) / tp * b if model.position_embedding == "rope" else 0),
        "attention": attention,
        "mlp": into / tp * b + ffn / tp * fp8 + (ffn / tp * b if plain else 0),
        "dropout": 2 * hidden * w if model.hidden_dropout else 0.0,
        "statistics": (16 if model.norm == "layernorm" else 8) * w,
    }
    trained = not config.lora.rank  # a frozen matrix needs no gradient, and none of megatron-core's placeholders for one
    fc1, fc2 = (into * hidden / tp * b, ffn * hidden / tp * b) if trained else (0.0, 0.0)
    stream = 2 * hidden * w * b * t  # the gradient that comes in, and the one that goes on
    backward = max(stream + ffn / tp * b * t + fc2, stream + (into - ffn) / tp * b * t + fc1 + (hidden * b * t if tp > 1 else 0))
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
    """Bytes at the fullest moment of a step. layers: kept by layers. edges: embedding, last norm, head. backward: of the layer that goes backward (its own
    recomputed activations included). buffers: sent, received, gathered. clipping: at the end of the step, when nothing else is there, a copy of the largest
    gradient that the rank owns: without Transformer Engine and Apex megatron-core scales out of place. workspace: inside kernels, which a trace does not
    see."""

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

    @property
    def total(self) -> float:
        return self.traced + self.workspace


def activations(config: Config, pipeline_rank: int, vocab: int, micro_batches: int, *, head: str = "vocabulary") -> Activations:
    """What a pipeline rank holds beside its parameters, gradients and optimizer.

    Args:
        vocab: words that exist.
        micro_batches: of a step, on a data rank.
    """
    model, parallel, b, t, one = config.model, config.parallel, BYTES[config.precision.dtype], tokens(config), layer(config)
    w, held = 1 / (parallel.tp if parallel.sp else 1), chunks(config, pipeline_rank)
    each, passes = held[0].layers, in_flight(config, pipeline_rank, micro_batches)
    stream, whole = t * model.hidden_size * w * b, t * model.hidden_size * b
    full = parallel.recompute == "full"
    kept = one.input * -(-each // parallel.recompute_layers) if full else one.kept * each
    again = one.kept * min(parallel.recompute_layers, each) - one.input if full else 0.0
    first, last = held[0].first, held[-1].last
    # Of a rank's chunks the first embeds and the last has the head; both passes are among those in flight.
    embedded = passes / len(held) if first else 0
    if model.position_embedding == "rope":  # cosines and sines, fp32, of each pass
        kept += config.data.sequence_length / parallel.cp * sizes.head_dim(model) * model.rotary_percent * 4
    edges = embedded * t * ((8 + 4) * 2 + (model.hidden_size * w if model.hidden_dropout else 0))
    rows = sizes.padded_vocabulary(vocab, model.vocab_multiple, parallel.tp) / parallel.tp
    table = rows * model.hidden_size * b
    placeholder = persistent = 0.0
    if last and head == "vocabulary":
        edges += 2 * stream + (whole if parallel.sp else 0)
        placeholder = table + whole + stream
        if model.tied_embeddings and first:  # autograd adds up both uses of the table: the first gradient waits for the second
            persistent = table
        if config.kernels.layers == "plain":
            placeholder += 3 * rows * t * 4
    if config.lora.rank:
        placeholder, persistent = whole + stream, 0.0
    # The head goes backward before any layer does: its inputs are gone when the first layer begins.
    after = edges - (2 * stream + (whole if parallel.sp else 0) if last and head == "vocabulary" else 0)
    at_head, at_layer = edges + max(placeholder, persistent), after + persistent + one.backward + again
    edges, backward = (edges, max(placeholder, persistent)) if at_head > at_layer else (after, at_layer - after)
    gathered = whole if parallel.sp and not config.lora.rank else 0.0  # megatron-core's global buffer for a gathered input
    sent = (4 if parallel.vpp else 2) * stream if parallel.pp > 1 else 0.0  # interleaved, what comes next is under way too
    largest = state(config, Grid.of(config).rank(pp=pipeline_rank), vocab, head=head).largest if config.optim.clip else 0
    return Activations(
        layers=kept * passes, edges=edges, backward=backward, buffers=gathered + sent, clipping=4.0 * largest, workspace=_workspace(config, rows, t, last and head == "vocabulary"),
        parts={name: value * each * passes for name, value in one.parts.items()} if not full else {"inputs": kept * passes},
    )


def _workspace(config: Config, rows: float, t: float, has_head: bool) -> float:
    """Inside kernels: a tile of logits (fp32, at most 64 Mi elements), a product's split sums, and of a ring of context ranks the keys and values that
    travel."""
    found = 64 * 2**20
    if has_head and config.kernels.layers != "plain":
        found += 4 * min(rows * t, 2**26)
    if config.parallel.cp > 1:
        found += 4 * t * 2 * sizes.head_dim(config.model) * sizes.query_groups(config.model) / config.parallel.tp * BYTES[config.precision.dtype]
    return found
