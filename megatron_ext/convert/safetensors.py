"""The safetensors format (github.com/huggingface/safetensors), read through a memory map and written as a stream.

    8 bytes      n, little-endian
    n bytes      JSON: {"name": {"dtype": "F32", "shape": [..], "data_offsets": [begin, end]}, ..., "__metadata__": {str: str}}
    the rest     tensors, C-contiguous, little-endian; offsets count from here

A directory holds one such file, or several and an index (`model.safetensors.index.json`: which tensor lies in which file). The library that
writes the format takes all tensors at once; a model that does not fit into memory cannot be written with it.
"""
import json
import math
import mmap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_ext.checkpoint.encode import raw
from megatron_ext.errors import UserError

NAME, INDEX = "model.safetensors", "model.safetensors.index.json"
LARGEST_HEADER = 100_000_000  # bytes; the library's own limit
SHARD_BYTES = 5_000_000_000  # of a written file, as transformers has it
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
SAVE = "save the model as safetensors with AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)"


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: where it lies in it, in bytes from the file's start."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path, key: str) -> dict[str, Entry]:
    """The tensors of a file by name. Reads the header alone, and the file's size. Raises UserError(key, path, ...) where the file is not sound."""
    def wrong(what: str) -> UserError:
        return UserError(key, path, what)

    try:
        total = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > min(LARGEST_HEADER, total - 8):
                raise wrong("is cut short, or no safetensors file: its header does not fit into it; copy it anew")
            fields = json.loads(file.read(length))
    except OSError as error:
        raise wrong(f"cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise wrong(f"is no safetensors file: its header is not JSON ({str(error)[:80]})") from None
    found, start = {}, 8 + length
    try:
        fields.pop("__metadata__", None)
        for name, field in fields.items():
            if field["dtype"] not in DTYPES:
                raise wrong(f"holds {name} as {field['dtype']}; known are {', '.join(DTYPES)}")
            dtype, shape, (begin, end) = DTYPES[field["dtype"]], tuple(field["shape"]), field["data_offsets"]
            if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
                raise ValueError(name)
            if end - begin != math.prod(shape) * dtype.itemsize:
                raise wrong(f"says that {name} of {field['dtype']} {list(shape)} takes {end - begin} bytes, which is wrong")
            found[name] = Entry(dtype, shape, start + begin, start + end)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise wrong(f"is no safetensors file: its header does not describe tensors ({type(error).__name__}: {str(error)[:80]})") from None
    last = start
    for name, entry in sorted(found.items(), key=lambda item: item[1].begin):
        if entry.begin < last:
            raise wrong(f"has tensors that overlap at {name}")
        last = max(last, entry.end)
    if last > total:
        cut = next(name for name, entry in found.items() if entry.end > total)
        raise wrong(f"is cut short: {total:,} bytes, its tensors end at {last:,} ({cut} is not whole); copy it anew")
    return found


class Reader:
    """The tensors of a Hugging Face directory.

    Attributes:
        files: the safetensors files, in order.

    Raises:
        UserError: no safetensors (pickles are not read), an index that does not fit the files, a file that is not sound.
    """

    def __init__(self, directory: Path, *, key: str = "hf"):
        self.directory, self._key = Path(directory), key
        self.files = self._listed()
        self._entries: dict[str, tuple[Path, Entry]] = {}
        for file in self.files:
            for name, entry in read_header(file, key).items():
                if name in self._entries:
                    raise UserError(key, file, f"holds {name}, and {self._entries[name][0].name} does too")
                self._entries[name] = (file, entry)
        self._maps: dict[Path, torch.Tensor] = {}

    def _listed(self) -> list[Path]:
        index = self.directory / INDEX
        if not index.is_file():
            found = [self.directory / NAME] if (self.directory / NAME).is_file() else sorted(self.directory.glob("*.safetensors"))
            if len(found) == 1:
                return found
            if found:
                raise UserError(self._key, self.directory, f"holds {len(found)} safetensors files and no {INDEX} that says which belong together")
            pickles = sorted(path.name for pattern in PICKLES for path in self.directory.glob(pattern))
            if pickles:
                raise UserError(self._key, self.directory, f"holds pickles ({pickles[0]}) and no safetensors; convert unpickles nothing: {SAVE}")
            raise UserError(self._key, self.directory, "holds no *.safetensors; name the directory of a model as transformers saves it")
        try:
            names = set(json.loads(index.read_bytes())["weight_map"].values())
            if not all(isinstance(name, str) and Path(name).name == name for name in names):
                raise ValueError("names of files have no folders")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(self._key, index, f"is no index of safetensors files ({type(error).__name__}: {str(error)[:80]})") from None
        for name in sorted(names):
            if not (self.directory / name).is_file():
                raise UserError(self._key, self.directory / name, f"is not there, and {INDEX} names it; copy it too")
        return [self.directory / name for name in sorted(names)]

    def names(self) -> list[str]:
        return list(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def entry(self, name: str) -> Entry:
        return self._entries[name][1]

    def file_of(self, name: str) -> Path:
        return self._entries[name][0]

    def tensor(self, name: str) -> torch.Tensor:
        """A view of the mapped file: reading it reads the disk, and memory that is not looked at again is the system's to take back."""
        file, entry = self._entries[name]
        if entry.begin == entry.end:
            return torch.empty(entry.shape, dtype=entry.dtype)
        if file not in self._maps:
            with open(file, "rb") as opened:
                self._maps[file] = torch.frombuffer(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)
        # An offset that is no multiple of the item's size (the header may have any length) cannot be viewed, only copied.
        data = self._maps[file][entry.begin : entry.end]
        if entry.begin % entry.dtype.itemsize:
            data = data.clone()
        return data.view(entry.dtype).view(entry.shape)


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write(directory: Path, planned: Sequence[Planned], make: Callable[[str], torch.Tensor], *, shard_bytes: int = SHARD_BYTES,
          name: str = NAME) -> list[Path]:
    """Writes `planned` in files of at most `shard_bytes` (a larger tensor has one of its own), with the index where there are several.

    Args:
        make: a tensor by its name, of the dtype and shape planned; called once each, in order, so that one is held at a time.
        name: of the file, where it is one.
    Returns: the safetensors files.
    """
    shards: list[list[Planned]] = [[]]
    for one in planned:
        if shards[-1] and sum(other.bytes for other in shards[-1]) + one.bytes > shard_bytes:
            shards.append([])
        shards[-1].append(one)
    names = [name] if len(shards) == 1 else [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for file, shard in zip(names, shards):
        _write_file(directory / file, shard, make)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(one.bytes for one in planned)},
            "weight_map": {one.name: file for file, shard in zip(names, shards) for one in shard},
        }
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return [directory / file for file in names]


def _write_file(path: Path, planned: Iterable[Planned], make: Callable[[str], torch.Tensor]) -> None:
    # Wide items first, as the library does: every tensor is then aligned to its item.
    planned = sorted(planned, key=lambda one: (-one.dtype.itemsize, one.name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for one in planned:
        header[one.name] = {"dtype": NAMES[one.dtype], "shape": list(one.shape), "data_offsets": [end, end + one.bytes]}
        end += one.bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for one in planned:
            tensor = make(one.name)
            if tensor.dtype != one.dtype or tuple(tensor.shape) != one.shape:
                raise ValueError(f"{one.name}: {tensor.dtype} {tuple(tensor.shape)} in the place of {one.dtype} {one.shape}")
            file.write(raw(tensor))
