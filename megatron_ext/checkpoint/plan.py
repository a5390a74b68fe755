"""Which rank writes what. megatron-core says which pieces of which global tensor each rank holds (`ShardedTensor`, with a replica
number that is zero on exactly one holder); pieces that data-parallel replicas share are spread over them, so that no rank
copies and writes what the others could.
"""
from collections import defaultdict
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess

from megatron_ext.checkpoint.encode import encode, name_of


@dataclass(frozen=True)
class Piece:
    """A chunk of a global tensor; `replica`: 0 where megatron-core would write it, 1 on other data-parallel holders, 2 elsewhere."""

    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]  # with the prepended axes
    size: int  # bytes
    replica: int


@dataclass
class State:
    """What a rank has to save: tensors beside their pieces, objects by unique key, and what all ranks have in common."""

    pieces: list[Piece]
    tensors: list[ShardedTensor]
    objects: dict[str, object]
    common: dict


def take(sharded_state: dict) -> State:
    """Splits a sharded state dict. The caller's dict is not changed, and nothing is copied."""
    sharded_state, _ = extract_matching_values(sharded_state, lambda value: True)
    _blank_padding(sharded_state)
    sharded, common = save_preprocess(sharded_state, validate_access_integrity=False)
    pieces, tensors, objects = [], [], {}
    for value in nested_values(sharded):
        if isinstance(value, ShardedTensor):
            assert value.data is not None, value
            replica = value.replica_id if isinstance(value.replica_id, tuple) else (value.replica_id,)
            rank = 0 if is_main_replica(replica) else 1 if len(replica) > 1 and is_main_replica(replica[:-1]) else 2
            extent = (1,) * value.prepend_axis_num + tuple(value.local_shape)
            size = value.data.numel() * value.data.element_size()
            pieces.append(Piece(value.key, tuple(value.global_offset), extent, size, rank))
            tensors.append(value)
        elif isinstance(value, ShardedObject) and is_main_replica(value.replica_id):
            objects[value.unique_key] = encode(value.data)
    return State(pieces, tensors, objects, encode(common))


def assign(pieces_by_rank: list[list[Piece]]) -> list[list[int]]:
    """For each rank the numbers of its pieces that it writes. Every rank computes the same from the same pieces: the largest first,
    each to the holder with least to write."""
    holders: dict[tuple, list[tuple[int, int]]] = defaultdict(list)
    sizes: dict[tuple, int] = {}
    for rank, pieces in enumerate(pieces_by_rank):
        for number, piece in enumerate(pieces):
            chunk = (piece.key, piece.offset, piece.shape)
            if piece.replica < 2:
                holders[chunk].append((rank, number))
                sizes[chunk] = piece.size
    load, mine = [0] * len(pieces_by_rank), [[] for _ in pieces_by_rank]
    for chunk in sorted(holders, key=lambda chunk: (-sizes[chunk], chunk)):
        rank, number = min(holders[chunk], key=lambda holder: (load[holder[0]], holder))
        load[rank] += sizes[chunk]
        mine[rank].append(number)
    return [sorted(numbers) for numbers in mine]


def index_of(state: State, numbers: list[int], offsets: list[int]) -> dict:
    """The `index` of this rank's shard file."""
    tensors: dict[str, dict] = {}
    for number, byte in zip(numbers, offsets):
        piece, tensor = state.pieces[number], state.tensors[number]
        entry = tensors.setdefault(
            piece.key, {"dtype": name_of(tensor.data.dtype), "shape": list(tensor.global_shape), "chunks": []}
        )
        entry["chunks"].append([list(piece.offset), list(piece.shape), byte])
    return {"tensors": tensors, "objects": state.objects}


def _blank_padding(state: object) -> None:
    """`dp_reshardable` pads its buckets with uninitialised memory, which would make equal states differ on disk. Zeroed in place:
    megatron-core allocated it for this state dict alone."""
    for value in state.values() if isinstance(state, dict) else state if isinstance(state, list) else ():
        _blank_padding(value)
    if isinstance(state, dict) and isinstance(flag := state.get("padding"), LocalNonpersistentObject) and flag.unwrap() is True:
        for value in state.values():
            if isinstance(value, ShardedTensor):
                with torch.no_grad():
                    value.data.zero_()
