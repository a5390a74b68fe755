"""Reading: verified, resharded, and unable to run anything.

Every requested piece is the union of its overlaps with the stored chunks, whatever layout wrote them; the chunks are views of the
memory-mapped file, so a rank reads only what it needs. All that can be wrong is found before the first byte of the model changes.
"""
import math
import mmap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, merge, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_base

from megatron_ext.checkpoint import adapters
from megatron_ext.checkpoint import manifest as m
from megatron_ext.checkpoint.agree import Ranks
from megatron_ext.checkpoint.encode import decode, differences, dtype_of
from megatron_ext.checkpoint.opaque import inspect
from megatron_ext.errors import UserError

EXTRA_STATE = "_extra_state"
HISTORY = "fp8_history"  # of delayed scaling
NEW = (HISTORY, *adapters.ADAPTERS)  # what a run may begin with from a checkpoint that has none: it stays as the run made it


@dataclass
class StoredTensor:
    """A global tensor of a checkpoint. `chunks`: (file, offset, shape, byte)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: list[tuple[str, tuple[int, ...], tuple[int, ...], int]] = field(default_factory=list)


class Stored:
    """The content of a checkpoint directory, opened. Raises UserError where its index is not sound. A context manager: closes its maps."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.manifest = m.read_manifest(self.path)
        self.record = self.manifest["record"]
        self.tensors: dict[str, StoredTensor] = {}
        self._objects: dict[str, object] = {}
        self._maps: dict[str, torch.Tensor] = {}
        shards = []
        for name in sorted(self.manifest["files"]):
            if name.startswith("shard_") and name.endswith(".json"):
                shards.append(m.read_shard(self.path, name, self._content(name)))
        m.covered(self.path, shards)
        for shard in shards:
            self._objects.update(shard["index"]["objects"])
            for key, tensor in shard["index"]["tensors"].items():
                stored = self.tensors.setdefault(key, StoredTensor(dtype_of(tensor["dtype"]), tuple(tensor["shape"])))
                stored.chunks += [(shard["file"], tuple(offset), tuple(extent), byte) for offset, extent, byte in tensor["chunks"]]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc) -> None:
        self._maps.clear()

    def common(self) -> dict:
        value = self._decode(m.COMMON, m.parse_json(self.path, m.COMMON, self._content(m.COMMON)))
        if not isinstance(value, dict):
            raise m.damaged(self.path, m.COMMON, "is not a table of values")
        return value

    def objects(self) -> set[str]:
        return set(self._objects)

    def object(self, unique_key: str) -> object:
        return self._decode(f"the object {unique_key[:80]}", self._objects[unique_key])

    def chunk(self, stored: StoredTensor, number: int) -> torch.Tensor:
        """A view of the file's bytes."""
        file, _, extent, byte = stored.chunks[number]
        size = math.prod(extent) * stored.dtype.itemsize
        if size == 0:
            return torch.empty(extent, dtype=stored.dtype)
        if file not in self._maps:
            try:
                with open(self.path / file, "rb") as opened:
                    mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as error:
                raise m.damaged(self.path, file, f"cannot be read ({error})") from None
            self._maps[file] = torch.frombuffer(mapped, dtype=torch.uint8)
        if byte + size > self._maps[file].numel():
            raise m.damaged(self.path, file, "is shorter than its index says")
        return self._maps[file][byte : byte + size].view(stored.dtype).view(extent)

    def pieces(self, stored: StoredTensor, offset: tuple[int, ...], shape: tuple[int, ...]) -> list[tuple[int, tuple, tuple]]:
        """The stored chunks that overlap a region: (chunk number, slices of the region, slices of the chunk).

        Raises UserError when they do not cover what the region shares with the global tensor exactly once.
        """
        found, boxes = [], []
        for number, (_, start, extent, _) in enumerate(stored.chunks):
            low = [max(a, b) for a, b in zip(offset, start)]
            high = [min(a + n, b + k) for a, n, b, k in zip(offset, shape, start, extent)]
            if all(a < b for a, b in zip(low, high)):
                there = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset))
                found.append((number, there, tuple(slice(a - o, b - o) for a, b, o in zip(low, high, start))))
                boxes.append((low, high))
        wanted = math.prod(max(0, min(o + n, total) - o) for o, n, total in zip(offset, shape, stored.shape))
        if sum(math.prod(b - a for a, b in zip(*box)) for box in boxes) != wanted or _overlap(boxes):
            raise m.damaged(self.path, "the index", "has chunks that overlap or leave gaps")
        return found

    def region(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """A part of a global tensor on the CPU."""
        stored = self.tensors[key]
        result = torch.empty(shape, dtype=stored.dtype)
        for number, there, here in self.pieces(stored, offset, shape):
            result[there] = self.chunk(stored, number)[here]
        return result

    def whole(self, key: str) -> torch.Tensor:
        shape = self.tensors[key].shape
        return self.region(key, (0,) * len(shape), shape)

    def _content(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise m.damaged(self.path, name, f"cannot be read ({error.strerror})") from None

    def _decode(self, name: str, value: object) -> object:
        try:
            value = decode(value)
            inspect(value)
            return value
        except (ValueError, RecursionError) as error:
            raise m.damaged(self.path, name, f"holds what no checkpoint holds: {error}") from None


def load(path: Path, sharded_state: dict, *, group=None, expect: dict | None = None, merge_adapters: bool = False) -> dict:
    """Verifies a checkpoint and loads what `sharded_state` asks for. Collective over `group`; all ranks succeed or all raise.

    Args:
        path: a checkpoint directory (see `find`).
        sharded_state: as for saving, built with `is_loading=True` and the `sharding` of `read_record(path)`. Tensors are filled in
            place, on their device, converted to their dtype. What it does not ask for is not read: a model's part alone loads the weights.
        expect: what the present run's record says under the same keys (`model`, `layout`; `lora` of its `config`), to be compared before
            anything is read.
        merge_adapters: adapters that the checkpoint holds become part of the weights; adapters that are asked for stay what they are.

    Returns: the state dict with plain tensors and values, for `load_state_dict`.

    Raises UserError: a damaged file, another model, another layout where the format does not allow that.
    """
    path, ranks = Path(path), Ranks(group)
    stored = None
    try:
        _agreed(ranks, lambda: _verify_share(path, ranks))
        stored = _agreed(ranks, lambda: Stored(path))
        with stored:
            return _load(stored, sharded_state, ranks, expect or {}, merge_adapters)
    finally:
        ranks.close()


def _load(stored: Stored, sharded_state: dict, ranks: Ranks, expect: dict, merging: bool) -> dict:
    sharded, local, factories = load_preprocess(sharded_state)
    sharded, _ = extract_sharded_base(sharded)
    values = [value for value in nested_values(sharded) if not (merging and value.key.endswith(adapters.ADAPTERS))]
    tensors = [value for value in values if isinstance(value, ShardedTensor)]

    def prepare() -> tuple[dict, dict, list, list]:
        _compare_record(stored, expect, tensors)
        if not merging:
            adapters.check_adapters(stored, (tensor.key for tensor in tensors), expect.get("lora"))
        _compare_keys(stored, values)
        there = stored.objects()
        wanted = {value.unique_key for value in values if isinstance(value, ShardedObject)}
        products = [adapters.product(stored, tensor, *_region(tensor)) if merging else None for tensor in tensors]
        return stored.common(), {key: stored.object(key) for key in wanted & there}, [_reads(stored, tensor) for tensor in tensors], products

    common, objects, reads, products = _agreed(ranks, prepare)
    with torch.no_grad():
        for tensor, pieces, product in zip(tensors, reads, products):
            _fill(stored, tensor, pieces)
            if product is not None:
                adapters.merge(tensor, stored.region(tensor.key, *_region(tensor)), *product)

    def plain(value: ShardedTensor | ShardedObject) -> object:
        return value.data.detach() if isinstance(value, ShardedTensor) else objects.get(value.unique_key, value.data)

    dict_list_map_inplace(plain, sharded)
    result = {key: value for key, value in common.items() if key in sharded_state}
    merge(result, local)
    merge(result, sharded)
    return apply_factory_merges(result, factories)


def _agreed(ranks: Ranks, work):
    """The result of `work`, or on every rank the first rank's UserError: no rank goes on alone or waits for one that stopped."""
    result = problem = None
    try:
        result = work()
    except UserError as error:
        problem = error
    if not ranks.all(problem is None):
        raise next(error for error in ranks.gather(problem) if error is not None)
    return result


def _verify_share(path: Path, ranks: Ranks) -> None:
    """Hashes this rank's part of the files; together the ranks hash all of them once."""
    files = m.read_manifest(path)["files"]
    load = [0] * ranks.size
    for name in sorted(files, key=lambda name: (-files[name]["size"], name)):
        rank = load.index(min(load))
        load[rank] += files[name]["size"] + 1
        if rank == ranks.rank:
            m.verify_file(path, name, files[name])


def _compare_record(stored: Stored, expect: dict, tensors: list[ShardedTensor]) -> None:
    """Refuses another model, and for a format that is bound to its layout another layout, by what the record says."""
    record = stored.record
    if differing := differences(record.get("model"), expect.get("model")) if "model" in expect else []:
        raise UserError(m.KEY, stored.path, f"was made by another model: {'; '.join(differing[:4])} (checkpoint / this run)")
    bound = record.get("sharding") == "dp_reshardable" and any(tensor.key.startswith("optimizer") for tensor in tensors)
    if bound and "layout" in expect and (differing := differences(record.get("layout"), expect["layout"])):
        raise UserError(m.KEY, stored.path, f"{_bound(record)}; this run differs: {'; '.join(differing)} (checkpoint / this run)")


def _bound(record: dict) -> str:
    return (
        f"is in the format dp_reshardable, written at layout {record.get('layout')}, and resumes only there. Resume at that layout with "
        "checkpoint.format=fully_reshardable and save once, or take the weights alone with checkpoint.weights_only=true"
    )


def _compare_keys(stored: Stored, values: list) -> None:
    """Refuses a state that asks for what the checkpoint does not hold, or holds in another shape."""
    wrong = []
    for value in values:
        if isinstance(value, ShardedObject):
            if value.unique_key not in stored.objects() and not value.key.endswith(EXTRA_STATE):
                wrong.append(f"{value.unique_key} is not in it")
            continue
        there = stored.tensors.get(value.key)
        if there is None:
            if "optimizer.state." in value.key or not value.key.endswith(NEW):
                wrong.append(f"{value.key} is not in it")
        elif len(there.shape) != len(value.global_shape) or (there.shape != tuple(value.global_shape) and not value.allow_shape_mismatch):
            wrong.append(f"{value.key} has shape {list(there.shape)}, this run's {list(value.global_shape)}")
    if wrong := list(dict.fromkeys(wrong)):
        what = f"does not fit this run: {'; '.join(wrong[:4])}{f'; and {len(wrong) - 4} more' if len(wrong) > 4 else ''}"
        of_optimizer = all(line.startswith("optimizer") for line in wrong)
        hint = f". It {_bound(stored.record)}" if of_optimizer and stored.record.get("sharding") == "dp_reshardable" else ""
        if of_optimizer and not hint:
            hint = f". Its optimizer state is in the format {stored.record.get('sharding')}"
        if all(HISTORY in line for line in wrong):
            hint = ". Set precision.fp8_history to the length that it was written with"
        if all(any(name in line for name in adapters.ADAPTERS) for line in wrong):
            hint = ". Set lora.rank and lora.targets to what it was written with, or start anew from its weights with checkpoint.start"
        raise UserError(m.KEY, stored.path, what + hint)


def _region(tensor: ShardedTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(tensor.global_offset), (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)


def _reads(stored: Stored, tensor: ShardedTensor) -> list | None:
    """The pieces of a tensor; None where the checkpoint has none and the tensor stays what it is."""
    return stored.pieces(stored.tensors[tensor.key], *_region(tensor)) if tensor.key in stored.tensors else None


def _fill(stored: Stored, tensor: ShardedTensor, pieces: list | None) -> None:
    if pieces is None:
        return
    tensor.init_data("cpu")
    target = tensor.data.detach()[(None,) * tensor.prepend_axis_num]
    if tensor.allow_shape_mismatch:
        target.zero_()  # rows that pad a vocabulary differ between layouts and are not all in the checkpoint
    source = stored.tensors[tensor.key]
    for number, there, here in pieces:
        target[there].copy_(stored.chunk(source, number)[here])


def _overlap(boxes: list[tuple[list[int], list[int]]]) -> bool:
    """Whether any two boxes (low, high) share a point. Sorted by the first axis, so that grids of many chunks stay cheap."""
    boxes = sorted(boxes)
    for number, (low, high) in enumerate(boxes):
        for other_low, other_high in boxes[number + 1 :]:
            if low and other_low[0] >= high[0]:
                break
            if all(a < d and c < b for a, b, c, d in zip(low, high, other_low, other_high)):
                return True
    return False
