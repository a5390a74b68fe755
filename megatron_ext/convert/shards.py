"""A checkpoint of our own kind (checkpoint/manifest.py), written tensor by tensor: no model is built and no tensor is held but the one that is written.

Its pieces are cut as the ranks of a layout will read them; every other layout reads them too.
"""
import hashlib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path

import torch

from megatron_ext.checkpoint import manifest as m
from megatron_ext.checkpoint.encode import encode, name_of, raw
from megatron_ext.checkpoint.writer import commit, durable
from megatron_ext.config import sizes
from megatron_ext.config.schema import ModelConfig, ParallelConfig
from megatron_ext.convert.family import Placed
from megatron_ext.convert.ours import LAYERS, Ours


class Shard:
    """The files of one rank of the layout."""

    def __init__(self, directory: Path, number: int):
        self._directory, self._number = directory, number
        self._file = open(directory / m.shard_name(number, "bin"), "xb")  # noqa: SIM115 closed by `finish`
        self._digest, self._size, self._tensors = hashlib.sha256(), 0, {}

    def add(self, key: str, shape: tuple[int, ...], offset: tuple[int, ...], part: torch.Tensor) -> None:
        """Writes a part of the global tensor of a shape, which begins at an offset in it."""
        self._put(b"\0" * (-self._size % m.ALIGNMENT))
        entry = self._tensors.setdefault(key, {"dtype": name_of(part.dtype), "shape": list(shape), "chunks": []})
        entry["chunks"].append([list(offset), list(part.shape), self._size])
        self._put(raw(part))

    def _put(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self._digest.update(content)
        self._size += len(content)

    def finish(self) -> None:
        """Makes the files durable."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        index = {"file": m.shard_name(self._number, "bin"), "size": self._size, "sha256": self._digest.hexdigest(),
                 "index": {"tensors": self._tensors, "objects": {}}}
        durable(self._directory / m.shard_name(self._number, "json"), json.dumps(index).encode())


class Layout:
    """How the tensors of a model lie on the ranks of a layout; shard `stage * tp + tensor rank` is that rank's."""

    def __init__(self, parallel: ParallelConfig, model: ModelConfig):
        self.tp, self.pp, self.model = parallel.tp, parallel.pp, model
        self.chunk = sizes.layers(model) // (parallel.pp * (parallel.vpp or 1))

    @property
    def shards(self) -> int:
        return self.tp * self.pp

    def stage(self, one: Ours, layer: int | None) -> int:
        if layer is not None:
            before = self.model.num_layers if self.model.family == "encoder_decoder" and one.key.startswith(LAYERS) else 0
            return (before + layer) // self.chunk % self.pp
        return self.pp - 1 if one.last else 0

    def pieces(self, one: Ours, layer: int | None) -> Iterable[tuple[int, tuple[int, ...], tuple[slice, ...]]]:
        """(shard, offset in the global tensor, slices of the tensor) for each piece."""
        lead = () if layer is None else (layer,)
        stage = self.stage(one, layer)
        for rank in range(self.tp if one.axis is not None else 1):
            for start, length in one.parts(rank, self.tp):
                offset, cut = [0] * len(one.shape), [slice(None)] * len(one.shape)
                if one.axis is not None:
                    offset[one.axis], cut[one.axis] = start, slice(start, start + length)
                if length or not math.prod(one.shape):
                    yield stage * self.tp + rank, (*lead, *offset), tuple(cut)


def write(directory: Path, layout: Layout, placed: Iterable[Placed], make, numbers: Iterable[int]) -> None:
    """Writes shards of a checkpoint.

    Args:
        placed: all tensors (`Placed`, or anything else with `ours` and `layer`); `make` gives our tensor of one of them.
        numbers: of the shards that are written here.
    """
    shards = {number: Shard(directory, number) for number in numbers}
    for one in placed:
        pieces = [piece for piece in layout.pieces(one.ours, one.layer) if piece[0] in shards]
        if not pieces:
            continue
        whole = make(one)
        shape = one.ours.stored(layout.model)
        for number, offset, cut in pieces:
            part = whole[cut]
            shards[number].add(one.ours.key, shape, offset, part if one.layer is None else part[None])
    for shard in shards.values():
        shard.finish()


def close(directory: Path, layout: Layout, record: dict) -> str:
    """The manifest over all shards, and the rename that makes the checkpoint exist. Returns its hash."""
    durable(directory / m.COMMON, json.dumps(encode({})).encode())
    return commit({"directory": str(directory), "ranks": layout.shards, "record": record, "keep": 0, "protect": []})["hash"]
