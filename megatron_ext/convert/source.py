"""A Hugging Face directory, opened and checked: which family, which configuration, and that its tensors are exactly those that such a model has.
Headers are read, no tensors."""
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_ext.config.schema import ModelConfig
from megatron_ext.convert import origin
from megatron_ext.convert.families import family_of
from megatron_ext.convert.family import Family, Placed
from megatron_ext.convert.forms import Heads
from megatron_ext.convert.ours import WORDS
from megatron_ext.convert.safetensors import NAMES, Reader
from megatron_ext.convert.settings import Settings
from megatron_ext.errors import UserError

PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
DTYPES = {name: dtype for dtype, name in PRECISIONS.items()}
SHOWN = 4  # names in a message


@dataclass(frozen=True)
class Directory:
    """What was found.

    Attributes:
        model: what its settings say, with `vocab_size`.
        prefix: what the names of its tensors begin with.
        placed: its tensors and which of ours they make, in order.
        dtype: that holds every tensor exactly.
        notes: what a person should know of it.
    """

    path: Path
    settings: Settings
    family: Family
    model: ModelConfig
    prefix: str
    reader: Reader
    placed: tuple[Placed, ...]
    dtype: torch.dtype
    notes: Sequence[str]

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    @property
    def kind(self) -> str:
        """What such a model is called."""
        return self.family.architecture

    @property
    def files(self) -> list[Path]:
        """That hold the weights."""
        return self.reader.files

    def make(self, one: Placed, heads: Heads) -> torch.Tensor:
        """Our tensor, in the dtype of theirs (the widest, where they differ)."""
        return one.form.join([self.reader.tensor(name) for name in one.names], heads)

    def origin(self) -> dict:
        """Where the weights come from, for the record."""
        return origin.read(self.path, self.family, self.settings) | {"prefix": self.prefix, "dtypes": self.exceptions}

    @property
    def exceptions(self) -> dict[str, str]:
        """Tensors of another dtype than `dtype`: {name: dtype as the file calls it}."""
        entries = {name: self.reader.entry(name).dtype for one in self.placed for name in one.names}
        return {name: NAMES[dtype] for name, dtype in entries.items() if dtype != self.dtype}


def open_directory(path: Path) -> Directory:
    """Raises UserError: no such directory, no safetensors, a family or a setting that is not known, and any tensor that is unknown, missing or of
    another shape than the settings say."""
    path = Path(path)
    if not path.is_dir():
        raise UserError("hf", path, "is not there; name a directory with config.json and *.safetensors (nothing is downloaded)")
    settings = Settings.of(path)
    family = family_of(settings)
    vocab = settings.size("vocab_size")
    model = replace(family.reads(settings), vocab_size=vocab)
    unknown = settings.finish()
    notes = [f"config.json holds what nobody here knows, taken to change nothing: {', '.join(unknown)}"] if unknown else []
    reader = Reader(path)
    prefix = family.prefix_of(reader.names())
    placed = tuple(family.named(one, reader) for one in family.placed(model, vocab, prefix))
    _check_names(family, model, reader, placed)
    _check_shapes(settings, reader, placed)
    return Directory(path, settings, family, model, prefix, reader, placed, _dtype(reader, placed), notes)


def _check_names(family: Family, model: ModelConfig, reader: Reader, placed: Sequence[Placed]) -> None:
    wanted = {name: one for one in placed for name in one.names}
    if missing := [name for name in wanted if name not in reader]:
        more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise UserError("hf", reader.directory, f"lacks the tensor {missing[0]}{more}, which a {family.name} model of this config.json has")
    tied = {family.head} if model.tied_embeddings else set()
    for name in reader.names():
        if name not in wanted and name not in tied and not family.is_buffer(name):
            raise UserError("hf", reader.file_of(name), f"holds {name}, which no {family.name} model of this config.json has: it would be left out")
    if tied and family.head in reader:
        words = next(one.names[0] for one in placed if one.ours.key == WORDS)
        if not torch.equal(reader.tensor(family.head), reader.tensor(words)):
            raise UserError("hf", reader.file_of(family.head), f"holds {family.head}, which differs from {words} although config.json ties them "
                                                               "(tie_word_embeddings)")


def _check_shapes(settings: Settings, reader: Reader, placed: Sequence[Placed]) -> None:
    wrong = []
    for one in placed:
        for name, shape in zip(one.names, one.shapes, strict=True):
            if reader.entry(name).shape != shape:
                wrong.append(f"{name} has shape {list(reader.entry(name).shape)}, {settings.path.name} says {list(shape)}")
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise UserError("hf", reader.directory, "; ".join(wrong[:SHOWN]) + more)


def _dtype(reader: Reader, placed: Sequence[Placed]) -> torch.dtype:
    """The narrowest of our dtypes that holds all tensors exactly. Raises UserError for quantised ones."""
    found = set()
    for one in placed:
        for name in one.names:
            dtype = reader.entry(name).dtype
            if dtype not in PRECISIONS:
                raise UserError("hf", reader.file_of(name), f"holds {name} as {NAMES[dtype]}; weights are read as F32, BF16 or F16: {_DEQUANTISE}")
            found.add(dtype)
    return found.pop() if len(found) == 1 else torch.float32


_DEQUANTISE = "load it with transformers in dtype=torch.bfloat16 and save that"
