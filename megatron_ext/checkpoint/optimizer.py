"""The distributed optimizer's state for a reshardable checkpoint, without gathering it.

A data-parallel rank holds, of each parameter of local shape S, the flat range [start, end) of the main weight and of both moments.
megatron-core's `fully_reshardable` gathers the whole parameters on every rank before a save: three fp32 copies of the model, a
collective for each bucket, and most of the time that the loop stands still. But a flat range of a row-major box *is* a few boxes,

    part of a row | whole rows | part of a row          (recursively, for more axes)

each contiguous in memory, so every rank writes its own range where it belongs in the global tensor. Keys, shapes and numbers in the
checkpoint are those of the gathered form, and it is loaded through megatron-core as that.
"""
import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

PREFIX = "optimizer.state"  # of megatron-core's keys
STATES = ("param", "exp_avg", "exp_avg_sq")


def optimizer_state(optimizer, model_state: dict, metadata: dict) -> dict:
    """What `optimizer.sharded_state_dict(model_state, metadata=metadata)` would save. Not for loading.

    Args:
        optimizer: megatron-core's, chained or not.
        model_state: sharded state dict of all model chunks, whose tensors are the parameters themselves.
        metadata: with `distrib_optim_sharding_type`; other formats than fully_reshardable, and optimizers that are not
            distributed, go through megatron-core (they gather nothing).
    """
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    reshardable = metadata.get("distrib_optim_sharding_type") == "fully_reshardable"
    if len(chained) == 1 and isinstance(chained[0], DistributedOptimizer) and reshardable:
        targets = _targets(chained[0], model_state)
        if targets is not None:
            return _ungathered(chained[0], targets)
    return optimizer.sharded_state_dict(model_state, is_loading=False, metadata=metadata)


def flat_boxes(shape: tuple[int, ...], start: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The boxes (offset, extent), in order, that a flat range of a row-major tensor consists of. Each is contiguous in it."""
    if start >= end:
        return
    if len(shape) <= 1:
        yield ((start,), (end - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row  # whole rows: [first, last)
    if start % row:
        head = min(end, first * row)
        for offset, extent in flat_boxes(shape[1:], start % row, head - (first - 1) * row):
            yield (first - 1, *offset), (1, *extent)
        if head == end:
            return
    if first < last:
        yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])
    if end % row:
        for offset, extent in flat_boxes(shape[1:], 0, end % row):
            yield (last, *offset), (1, *extent)


def _targets(optimizer: DistributedOptimizer, model_state: dict) -> dict | None:
    """For each parameter its pieces of global tensors, (flat start within the parameter, ShardedTensor); None when some
    parameter's pieces are not contiguous in it."""
    sharded, _ = extract_sharded_tensors_and_factories(model_state)
    by_parameter = {value.data: value for value in nested_values(sharded)}
    targets = {}
    for buffer in optimizer.buffers:
        for parameter in buffer.param_index_map:
            value = by_parameter[parameter]
            pieces = [value]
            if isinstance(value, ShardedTensorFactory):  # a fused gate and up matrix is two tensors
                built = value.build()
                pieces = list(nested_values(built)) if isinstance(built, (dict, list)) else [built]
            targets[parameter] = []
            for piece in pieces:
                shares = piece.data.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
                if not (shares and piece.data.is_contiguous() and len(piece.replica_id) == 3):
                    return None
                targets[parameter].append((piece.data.storage_offset() - parameter.storage_offset(), piece))
    return targets


@torch.no_grad()
def _ungathered(optimizer: DistributedOptimizer, targets: dict) -> dict:
    if not optimizer.optimizer.state:  # before the first step: moments of zero, which is what the first step starts from
        optimizer.init_state_fn(optimizer.optimizer, optimizer.config)
    state = optimizer.state_dict()
    tensors = {}
    for buckets in (ranges for by_dtype in optimizer.gbuf_ranges for ranges in by_dtype.values()):
        for parameter, ranges in (item for bucket in buckets for item in bucket["param_map"].items()):
            start, end = ranges["param"].start, ranges["param"].end
            # Private, and the one way to the main weight and moments that serves every precision; the test against the gathered
            # form, bit for bit, fails when it changes.
            held = optimizer._get_main_param_and_optimizer_states(parameter)
            for name in STATES:
                for number, piece in enumerate(_shards(held[name].detach(), targets[parameter], start, end)):
                    key = f"{PREFIX}.{name}.{piece.key}"
                    replica = (*piece.replica_id[:2], optimizer.distributed_optimizer_instance_id)
                    tensors[f"{len(tensors)}.{name}.{number}"] = replace(piece, key=key, replica_id=replica)
    state["param_state"] = tensors
    state["param_state_sharding_type"] = "fully_reshardable"
    return state


def _shards(flat: torch.Tensor, pieces: list[tuple[int, ShardedTensor]], start: int, end: int) -> Iterator[ShardedTensor]:
    """The range [start, end) of a parameter, held in `flat`, as shards of its global tensors."""
    for base, piece in pieces:
        low, high = max(start, base), min(end, base + piece.data.numel())
        for offset, extent in flat_boxes(tuple(piece.local_shape), low - base, high - base):
            here = base + sum(o * s for o, s in zip(offset, piece.data.stride())) - start
            lead = piece.prepend_axis_num
            inner = tuple(a + b for a, b in zip(piece.global_offset[lead:], offset))
            yield replace(
                piece, data=flat[here : here + math.prod(extent)].view(extent), dtype=flat.dtype, local_shape=extent,
                global_offset=(*piece.global_offset[:lead], *inner), axis_fragmentations=None,
            )  # fmt: skip
