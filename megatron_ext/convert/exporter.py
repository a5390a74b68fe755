"""`convert checkpoint.load=DIR output=DIR`: a directory that transformers, vLLM and llama.cpp's converter read, of a checkpoint at any layout.

Read through the checkpoint's own reader, piece by piece: no model is built, no rank is started, and one tensor is held at a time.
"""
import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from megatron_ext.checkpoint import adapters, ancestry
from megatron_ext.checkpoint import manifest as m
from megatron_ext.checkpoint.read import Stored
from megatron_ext.config.schema import Config, ModelConfig
from megatron_ext.convert import carried, origin, peft
from megatron_ext.convert.families import FAMILIES, can_say
from megatron_ext.convert.family import Family, Placed
from megatron_ext.convert.forms import Heads
from megatron_ext.convert.ours import LAYERS
from megatron_ext.convert.safetensors import DTYPES, Planned, write
from megatron_ext.convert.settings import FILE
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import UserError
from megatron_ext.train.start import stored_config, tokenizer_of

KEY = "checkpoint.load"
AVERAGE = "ema."  # as train/weights.py, which brings the whole engine along


@dataclass(frozen=True)
class Export:
    """What is written.

    Attributes:
        origin: of the imported weights that the checkpoint comes from; None where it was trained from the start.
        folder: the files that were carried along with them, where they are still there.
        untouched: the checkpoint is the import itself.
        curation: the curated texts that it and its ancestors were trained on (train/record.py).
    """

    path: Path
    config: Config
    vocab_size: int
    family: Family
    origin: Mapping | None
    folder: Path | None
    untouched: bool
    average: bool
    broken: str | None
    curation: Sequence[Mapping] = ()

    @property
    def model(self) -> ModelConfig:
        return self.config.model


def plan(path: Path, *, average: bool = False) -> Export:
    """Raises UserError: no checkpoint, no language model, or one that no family describes."""
    record, config = m.read_record(path), stored_config(path, KEY)
    if record.get("head") == "scalar":
        raise UserError(KEY, path, "is a reward model: its head gives a number a token, which no language model of transformers holds")
    if average and not record.get("average"):
        raise UserError("checkpoint.average", "true", f"{path} holds no average: it comes from a ppo run with ppo.ema set")
    vocab = int(record["vocab_size"])
    whence, folder, broken = _origin(path)
    names = dict.fromkeys([*([whence["family"]] if whence and whence["family"] in FAMILIES else []), *FAMILIES])
    family = next((FAMILIES[name] for name in names if can_say(FAMILIES[name], config.model, vocab)), None)
    if family is None:
        raise UserError(KEY, path, f"no family of transformers computes such a model (known are {', '.join(FAMILIES)}): {_features(config.model)}")
    if whence and family.name != whence["family"]:
        whence = whence | {"prefix": family.prefix, "dtypes": {}}
    return Export(path, config, vocab, family, whence, folder, whence is not None and record.get("stage") == "import", average, broken,
                  record.get("curation") or ())


def _features(model: ModelConfig) -> str:
    return ", ".join(f"model.{key}={getattr(model, key)}" for key in ("position_embedding", "norm", "activation", "block", "bias", "qkv_bias", "proj_bias",
                                                                      "mlp_bias", "qk_norm", "rotary_percent", "rotary_interleaved"))


def _origin(path: Path) -> tuple[dict | None, Path | None, str | None]:
    """(what the import said of its origin, the folder of the files carried along, why the chain cannot be followed to its end)."""
    links = ancestry.chain(path)
    if "broken" in links[-1]:
        inherited = m.read_record(path).get("origin")
        return inherited, None, f"{links[-1]['path'] or 'a parent'} {links[-1]['broken']}"
    first = Path(links[-1]["path"])
    whence = m.read_record(first).get("origin")
    folder = first.parent.parent / carried.FOLDER
    return whence, folder if whence and folder.is_dir() else None, None


def write_directory(found: Export, output: Path, *, adapter: bool = False) -> list[Path]:
    """Writes the Hugging Face directory, which appears whole or not at all. Returns its safetensors files. Raises UserError.

    Args:
        adapter: the checkpoint's LoRA adapter alone, as PEFT reads it, and not the model with it.
    """
    output = output.absolute()
    draft = output.with_name(f".{output.name}.{secrets.token_hex(4)}")
    try:
        draft.mkdir(parents=True)
        m.verify(found.path)
        with Stored(found.path) as stored:
            if adapter:
                files = _adapter(found, stored, draft)
            else:
                tensors = Tensors(found, stored)
                own = _tokenizer(found)  # what may be refused goes before the weights
                _settings(found, tensors, own, draft)
                _beside(found, own, draft)
                files = write(draft, tensors.planned(), tensors.make)
        if output.exists():
            output.rmdir()
        os.rename(draft, output)
        return [output / file.name for file in files]
    except OSError as error:
        raise UserError("output", output, f"cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


class Tensors:
    """The tensors of theirs, made of a checkpoint's."""

    def __init__(self, found: Export, stored: Stored):
        self._found, self._stored, self._heads = found, stored, Heads.of(found.model)
        prefix = found.origin["prefix"] if found.origin else found.family.prefix
        self.placed = list(found.family.placed(found.model, found.vocab_size, prefix))
        self._where: dict[str, tuple[Placed, int]] = {name: (one, number) for one in self.placed for number, name in enumerate(one.names)}
        self._last: tuple[Placed, list[Tensor]] | None = None

    def dtype(self, name: str) -> torch.dtype:
        """As it was imported; of a checkpoint that was trained since, as it is stored."""
        if self._found.untouched and name in self._found.origin["dtypes"]:
            return DTYPES[self._found.origin["dtypes"][name]]
        return torch.float32 if self._found.average else self._stored.tensors[self._where[name][0].ours.key].dtype

    def planned(self) -> list[Planned]:
        return [Planned(name, self.dtype(name), shape) for one in self.placed for name, shape in zip(one.names, one.shapes, strict=True)]

    def make(self, name: str) -> Tensor:
        one, number = self._where[name]
        if self._last is None or self._last[0] is not one:
            self._last = (one, one.form.split(self._ours(one), self._heads))
        return self._last[1][number].to(self.dtype(name))

    def _ours(self, one: Placed) -> Tensor:
        key = (AVERAGE if self._found.average else "") + one.ours.key
        lead = () if one.layer is None else (one.layer,)
        offset, shape = (*lead, *(0 for _ in one.ours.shape)), (*(1 for _ in lead), *one.ours.shape)
        if key not in self._stored.tensors:
            raise m.damaged(self._found.path, "the index", f"lacks {key}")
        there = self._stored.tensors[key].shape
        if len(there) != len(shape) or any(size < start + length for size, start, length in zip(there, offset, shape)):
            raise m.damaged(self._found.path, "the index", f"has {key} in the shape {list(there)}, which is not this model's")
        whole = self._stored.region(key, offset, shape)
        if not self._found.average:
            product = adapters.product(self._stored, SimpleNamespace(key=key, global_shape=one.ours.stored(self._found.model)), offset, shape)
            if product is not None:  # as `adapters.merge`: summed in fp32, rounded once
                whole = (whole.float() + (product[0] @ product[1]).view(whole.shape)).to(whole.dtype)
        return whole.view(one.ours.shape)


def _adapter(found: Export, stored: Stored, draft: Path) -> list[Path]:
    lora = found.config.lora
    keys = [key for key in stored.tensors if key.endswith(adapters.ADAPTERS) and key.startswith(LAYERS)]
    if not lora.rank or not keys:
        raise UserError("adapter", "only", f"{found.path} holds no adapter: it was not trained with lora.rank")
    base = found.origin.get("name") if found.origin else None
    files = peft.write_directory(draft, found.family, found.model, found.vocab_size, lora, stored.region, stored.tensors[keys[0]].dtype, base)
    if found.origin is not None:
        (draft / origin.CARD).write_text(origin.front_matter(found.origin) + origin.data_card(found.curation), encoding="utf-8")
    return files


def _tokenizer(found: Export) -> Tokenizer | None:
    """Of the run."""
    file = tokenizer_of(found.path)
    return None if file is None else Tokenizer.from_file(file, end=None if found.folder is None else carried.end_text(found.folder))


def _settings(found: Export, tensors: Tensors, own: Tokenizer | None, draft: Path) -> None:
    """config.json: the one that was imported, where the model is still that one; else made."""
    dtype = str(max((one.dtype for one in tensors.planned()), key=lambda dtype: dtype.itemsize)).removeprefix("torch.")
    if found.folder is not None and found.family.name == found.origin["family"]:
        content = (found.folder / FILE).read_bytes()
        values = json.loads(content)
        said = values.get("dtype", values.get("torch_dtype"))
        if said in (dtype, None):
            (draft / FILE).write_bytes(content)
            return
        values["dtype" if "dtype" in values else "torch_dtype"] = dtype
    else:
        ends = None if own is None else own.eod
        values = {"model_type": found.family.name, "architectures": [found.family.architecture], "vocab_size": found.vocab_size, "torch_dtype": dtype,
                  "use_cache": True, "bos_token_id": ends, "eos_token_id": ends, **found.family.writes(found.model, found.vocab_size)}
    (draft / FILE).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _beside(found: Export, own: Tokenizer | None, draft: Path) -> None:
    """Tokenizer, settings of generation, licence."""
    if found.folder is not None:
        for file in found.folder.iterdir():
            if file.name not in (FILE, origin.CARD):
                shutil.copyfile(file, draft / file.name)
    if own is not None and not (draft / carried.TOKENIZER).exists() and not (draft / "merges.txt").exists():
        shutil.copyfile(tokenizer_of(found.path), draft / carried.TOKENIZER)
    if own is not None and not (draft / "tokenizer_config.json").exists():
        said = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": own.eod_text, "bos_token": own.eod_text,
                "model_max_length": found.model.max_sequence_length, "clean_up_tokenization_spaces": False}
        (draft / "tokenizer_config.json").write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if found.origin is not None and found.origin["format"] == "hugging_face":
        (draft / origin.CARD).write_text(origin.front_matter(found.origin) + origin.data_card(found.curation), encoding="utf-8")
    elif found.curation:
        (draft / origin.CARD).write_text("Exported by megatron_ext.\n" + origin.data_card(found.curation), encoding="utf-8")


def described(found: Export, output: Path, files: list[Path]) -> list[str]:
    """What a person wants to know of it."""
    size = sum(file.stat().st_size for file in files)
    lines = [f"{output}: {found.family.architecture} of {found.path}, {size:,} bytes in {len(files)} file{'s' if len(files) > 1 else ''}"]
    if found.origin is not None:
        lines += [f"  warning: {line}" for line in origin.warnings(found.origin)]
    lines += [f"  warning: {line}" for line in origin.data_warnings(found.curation)]
    if found.broken is not None:
        lines.append(f"  warning: where the weights come from cannot be followed: {found.broken}" + ("" if found.origin else "; nor under what licence they are"))
    if found.origin is not None and found.folder is None:
        lines.append(f"  note: the files that were imported beside the weights ({carried.FOLDER}/) are not there any more; config.json was made anew")
    return lines
