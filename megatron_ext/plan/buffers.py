"""megatron-core's gradient buffers and the distributed optimizer's shards, element by element, from the shapes alone. No torch.

A model chunk's trained parameters lie in a buffer in reverse order, cut into buckets. With the distributed optimizer a parameter starts at a multiple of 64
elements, a bucket ends at a multiple of lcm(DP, 128), and data rank r owns the r-th part of every bucket: the main weights and moments of what lies
there are its own (core/distributed/param_and_grad_buffer.py, 0.16 to 0.19).

Bytes of a parameter, with b bytes an element of weights:
    weights b, gradients 4 (or b with precision.grad_reduce_in_fp32=false), main weights 4 / D (none with fp32: the weights are that), moments 8 / D
with D the data (and context) ranks, or 1 without the distributed optimizer.
"""
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_ext.config.geometry import Grid
from megatron_ext.config.schema import Config
from megatron_ext.plan.shapes import Tensor, chunks, tensors

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
SMALLEST_BUCKET = 40_000_000  # elements; megatron-core's default, with at least a million a data rank


@dataclass(frozen=True)
class Buffer:
    """The trained parameters of a chunk: `buckets` of [start, end), and `places` [start, end) of each parameter."""

    buckets: tuple[tuple[int, int], ...]
    places: tuple[tuple[int, int], ...]

    @property
    def numel(self) -> int:
        """Elements, padding included."""
        return self.buckets[-1][1] if self.buckets else 0

    def pieces(self, rank: int, ranks: int) -> Iterator[int]:
        """Elements of each parameter whose optimizer state is on data rank `rank` of `ranks`."""
        for start, end in self.buckets:
            share = (end - start) // ranks
            low, high = start + rank * share, start + (rank + 1) * share
            yield from (min(high, b) - max(low, a) for a, b in self.places if min(high, b) > max(low, a))

    def owned(self, rank: int, ranks: int) -> int:
        """All of them together."""
        return sum(self.pieces(rank, ranks))


def buffer(parameters: Sequence[Tensor], *, ranks: int, bucket: int | None, distributed: bool) -> Buffer:
    """How megatron-core lays parameters out.

    Args:
        ranks: data ranks (times context ranks) that share the buffer.
        bucket: elements after which a bucket is closed; None = one bucket.
        distributed: with the distributed optimizer.
    """
    start_step, end_step = (64, math.lcm(ranks, 128)) if distributed else (1, 1)
    buckets: list[tuple[int, int]] = []
    places: list[tuple[int, int]] = []
    opened = position = filled = 0

    def close(end: int) -> int:
        nonlocal opened, filled
        buckets.append((opened, _up(end, end_step)))
        opened, filled = buckets[-1][1], 0
        return opened

    for tensor in reversed(parameters):
        alone = tensor.alone and distributed
        position = _up(position, start_step)
        if alone and filled:
            position = close(position)
        places.append((position, position + tensor.numel))
        position, filled = position + tensor.numel, filled + 1
        if alone or bucket is not None and position - opened >= bucket:
            position = close(position)
    if filled:
        close(position)
    return Buffer(tuple(buckets), tuple(places))


def _up(number: int, step: int) -> int:
    return step * math.ceil(number / step)


@dataclass(frozen=True)
class State:
    """Bytes that a rank holds all the time."""

    parameters: int  # elements, without padding
    weights: int
    gradients: int
    optimizer: int  # main weights and moments
    largest: int  # elements of the largest piece of a parameter that this rank updates


def chunk_buffer(config: Config, parameters: Sequence[Tensor], number: int, pipeline_rank: int, ranks: int) -> Buffer:
    """The buffer of chunk `number` of a pipeline rank: buckets exist where communication overlaps, on the first stage's first chunk."""
    cut = config.parallel.overlap_grad_reduce and number == 0 and pipeline_rank == 0
    return buffer(parameters, ranks=ranks, bucket=max(SMALLEST_BUCKET, 1_000_000 * ranks) if cut else None,
                  distributed=config.parallel.distributed_optimizer)


def state(config: Config, rank: int, vocab: int, *, head: str = "vocabulary", train: bool = True) -> State:
    """What `rank` holds of a model in its layout, in bytes.

    Args:
        vocab: words that exist.
        train: False = weights alone.
    """
    # What does not matter here is left out, so that a search looks at each layout once.
    parallel = replace(config.parallel, recompute="none", recompute_layers=1)
    return _state(Config(model=config.model, parallel=parallel, precision=config.precision, lora=config.lora, launch=config.launch), rank, vocab, head, train)


@lru_cache(maxsize=1024)
def _state(config: Config, rank: int, vocab: int, head: str, train: bool) -> State:
    grid = Grid.of(config)
    where, size, ranks = grid.coordinates(rank), BYTES[config.precision.dtype], grid.dp * grid.cp
    data_rank = where["cp"] + grid.cp * where["dp"]
    count = weights = gradients = optimizer = largest = 0
    for number, chunk in enumerate(chunks(config, where["pp"])):
        held = tensors(config, chunk, vocab, head=head)
        count += sum(t.numel for t in held)
        trained = [t for t in held if train and t.trained]
        weights += size * sum(t.numel for t in held if not (train and t.trained))
        if not trained:
            continue
        made = chunk_buffer(config, trained, number, where["pp"], ranks)
        own = sum(t.numel for t in trained)
        distributed = config.parallel.distributed_optimizer
        largest = max(largest, *(made.pieces(data_rank, ranks) if distributed else (t.numel for t in trained)), 0)
        weights += size * (made.numel if distributed else own)
        gradients += made.numel * (4 if config.precision.grad_reduce_in_fp32 else size)
        optimizer += (8 if size == 4 else 12) * (made.owned(data_rank, ranks) if distributed else own)
    return State(count, weights, gradients, optimizer, largest)


@lru_cache(maxsize=1024)
def fullest_stage(config: Config, vocab: int) -> int:
    """The pipeline rank with the most parameters."""
    def held(rank: int) -> int:
        return sum(t.numel for chunk in chunks(config, rank) for t in tensors(config, chunk, vocab))

    return max({0, config.parallel.pp - 1, min(1, config.parallel.pp - 1)}, key=held)
