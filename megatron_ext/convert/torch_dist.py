"""Checkpoints in megatron-core's format `torch_dist` (torch.distributed.checkpoint), read without unpickling.

    .metadata       a pickle: for every tensor its dtype, shape and chunks, and where each chunk lies          read by pickles.py
    __R_N.distcp    chunk after chunk, each as torch.save writes it                                            read with weights_only
    common.pt       what all ranks have in common: `args` of Megatron-LM's scripts, `iteration`                read by pickles.py

Chunks are of any layout; a region is put together of those that it overlaps, so memory holds a region and a chunk.
"""
import io
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_ext.convert import pickles
from megatron_ext.errors import UserError

METADATA, COMMON = ".metadata", "common.pt"


@dataclass
class Stored:
    """A global tensor. `chunks`: (file, byte, bytes, offset, shape)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: list[tuple[str, int, int, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)


class Reader:
    """The tensors of a directory. Raises UserError: no such checkpoint, or one that is not sound."""

    def __init__(self, directory: Path, *, key: str):
        self.directory, self._key = Path(directory), key
        if not (self.directory / METADATA).is_file():
            raise UserError(key, directory, f"holds no {METADATA}: it is no checkpoint in the format torch_dist (Megatron-LM's --ckpt-format torch_dist); name the "
                                            "iteration's directory, such as .../iter_0001000")
        self.tensors = self._listed()
        ends: dict[str, int] = {}
        for tensor in self.tensors.values():
            for name, byte, length, _, _ in tensor.chunks:
                ends[name] = max(ends.get(name, 0), byte + length)
        for name, end in sorted(ends.items()):
            file = self.directory / name
            if not file.is_file() or file.stat().st_size < end:
                raise UserError(key, file, "is not there, or is cut short; copy it anew")

    def wrong(self, name: str, what: str) -> UserError:
        return UserError(self._key, self.directory / name, what)

    def _listed(self) -> dict[str, Stored]:
        try:
            found = pickles.loads((self.directory / METADATA).read_bytes())
            tensors, shapes = {}, {}
            for name, entry in found.state_dict_metadata.items():
                if entry.__class__.name.endswith("TensorStorageMetadata"):
                    tensors[name] = Stored(_dtype(entry.properties), tuple(entry.size))
                    shapes[name] = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in entry.chunks}
            for index, place in found.storage_data.items():
                if index.fqn not in tensors:
                    continue
                tensor, file = tensors[index.fqn], place.relative_path
                if Path(file).name != file:
                    raise ValueError("a file outside of the directory")
                offset = tuple(index.offset)
                tensor.chunks.append((file, int(place.offset), int(place.length), offset, shapes[index.fqn][offset]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self.wrong(METADATA, f"cannot be read ({type(error).__name__}: {str(error)[:80]})") from None
        return tensors

    def common(self) -> dict:
        """What common.pt holds, classes as stand-ins."""
        try:
            found = pickles.load_torch(self.directory / COMMON)
        except (OSError, ValueError) as error:
            raise self.wrong(COMMON, str(error)) from None
        if not isinstance(found, dict):
            raise self.wrong(COMMON, "is not a table of values")
        return found

    def region(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """A part of a global tensor. Raises UserError where the chunks do not cover it."""
        stored = self.tensors[name]
        result, covered = torch.empty(shape, dtype=stored.dtype), 0
        for file, byte, length, start, extent in stored.chunks:
            low = [max(a, b) for a, b in zip(offset, start)]
            high = [min(a + n, b + k) for a, n, b, k in zip(offset, shape, start, extent)]
            if all(a < b for a, b in zip(low, high)):
                chunk = self._chunk(file, byte, length, extent, stored.dtype)
                result[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, offset))] = chunk[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, start))]
                covered += math.prod(b - a for a, b in zip(low, high))
        if covered != math.prod(shape):
            raise self.wrong(METADATA, f"has chunks of {name} that overlap or leave gaps")
        return result

    def _chunk(self, file: str, byte: int, length: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        with open(self.directory / file, "rb") as opened:
            opened.seek(byte)
            content = opened.read(length)
        try:
            tensor = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise ValueError(f"{tensor.dtype} {tuple(tensor.shape)} in the place of {dtype} {shape}")
        except Exception as error:  # noqa: BLE001 whatever torch does not take
            raise self.wrong(file, f"holds at byte {byte} what is not the chunk that {METADATA} says ({str(error).splitlines()[0][:120]})") from None
        return tensor


def _dtype(properties: object) -> torch.dtype:
    """The dtype of TensorProperties, whose state is a tuple that begins with it; dtypes are pickled by name."""
    said = properties.__dict__.get("dtype") or properties.state[0]
    name = (said.name if isinstance(said, type) else str(said)).removeprefix("torch.")
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype {name[:40]}")
    return dtype
