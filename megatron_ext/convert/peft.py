"""LoRA adapters in the format of Hugging Face's PEFT (`adapter_config.json`, `adapter_model.safetensors`), and ours (models/lora.py).

    theirs   A [r, in], B [out, r] for each module, also for queries, keys and values apart             W + s B A,  s = alpha / r, or alpha / sqrt(r)
    ours     one A and one B for each of the joined layers                                              W + alpha / rank B A

Modules that we join become one adapter exactly: with one A in common it is B joined; else the As lie one above the other and the Bs beside each other,

    [B_q   0   0 ]   [A_q]
    [ 0   B_k  0 ] . [A_k]
    [ 0    0  B_v]   [A_v]

with so many times the rank. All of ours have one rank: narrower ones are filled up with zeros. Exported, each module of a joined layer gets the common A.
"""
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.checkpoint.manifest import hash_file
from megatron_ext.config.schema import LoraConfig, ModelConfig
from megatron_ext.convert.family import Family, Placed
from megatron_ext.convert.forms import TRANSPOSED, TRANSPOSED_BLOCKS, Heads
from megatron_ext.convert.ours import LAYERS, Ours
from megatron_ext.convert.safetensors import Planned, Reader, write
from megatron_ext.convert.settings import Settings
from megatron_ext.errors import UserError

SETTINGS, NAME = "adapter_config.json", "adapter_model.safetensors"
KEY = "adapter"
LINEAR = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
BEGIN = "base_model.model."
# Settings with another value than these change what is computed, in a way that we do not.
PLAIN = {"use_dora": False, "bias": "none", "modules_to_save": None, "layers_to_transform": None, "rank_pattern": {}, "alpha_pattern": {}, "layer_replication": None,
         "lora_bias": False, "trainable_token_indices": None, "target_parameters": None, "alora_invocation_tokens": None, "use_qalora": False}


@dataclass(frozen=True)
class Part:
    """One of our adapters' matrices in a layer, as `Placed` is for weights."""

    ours: Ours
    layer: int
    tensor: Tensor


@dataclass(frozen=True)
class Adapter:
    """What a directory holds, in our terms. `notes`: what is said of it. `hashes`: sha256 of its files."""

    lora: LoraConfig
    parts: tuple[Part, ...]
    notes: tuple[str, ...]
    hashes: dict[str, str]


def _lines(family: Family, model: ModelConfig, vocab: int) -> Iterator[tuple[Placed, str, tuple[str, ...]]]:
    """(our linear layer, its name in `lora.targets`, the names that PEFT gives its modules), layer by layer."""
    for one in family.placed(model, vocab, family.prefix):
        key = one.ours.key.removeprefix(LAYERS).removesuffix(".weight")
        if one.layer is not None and key in LINEAR and one.ours.key.endswith(".weight"):
            yield one, key.rsplit(".", 1)[1], tuple(BEGIN + name.removesuffix(".weight") for name in one.names)


def _sizes(one: Placed) -> list[tuple[int, int]]:
    """(out, in) of each module."""
    return [shape[::-1] if _transposed(one) else shape for shape in one.shapes]


def _transposed(one: Placed) -> bool:
    """Whether the modules keep their weights [in, out]."""
    return one.form in (TRANSPOSED, TRANSPOSED_BLOCKS)


def read(directory: Path, family: Family, model: ModelConfig, vocab: int, dtype: torch.dtype) -> Adapter:
    """Raises UserError: no adapter there, a kind that we do not compute, tensors that are unknown, missing or of another shape."""
    directory = Path(directory)
    if not (directory / SETTINGS).is_file():
        raise UserError(KEY, directory, f"holds no {SETTINGS}; name a directory as PEFT saves it")
    settings, scale, rank = _settings(directory)
    if not (directory / NAME).is_file():
        raise UserError(KEY, directory, f"holds no {NAME}; convert unpickles nothing: save the adapter with safe_serialization=True")
    reader, heads = Reader(directory, key=KEY), Heads.of(model)
    wanted, found = set(), []
    for one, target, modules in _lines(family, model, vocab):
        pairs: list[tuple[Tensor, Tensor] | None] = []
        for module, (out, width) in zip(modules, _sizes(one), strict=True):
            names = {f"{module}.lora_A.weight": (rank, width), f"{module}.lora_B.weight": (out, rank)}
            there = [name for name in names if name in reader]
            wanted.update(there)
            if len(there) == 1:
                raise UserError(KEY, directory, f"lacks {next(name for name in names if name not in reader)}")
            for name in there:
                if reader.entry(name).shape != names[name]:
                    raise UserError(KEY, directory, f"{name} has shape {list(reader.entry(name).shape)}, its settings and the model say {list(names[name])}")
            pairs.append(tuple(reader.tensor(name).float() for name in names) if there else None)
        if any(pairs):
            found.append((one, target, *_joined(one, pairs, heads)))
    if unknown := sorted(set(reader.names()) - wanted):
        raise UserError(KEY, reader.file_of(unknown[0]), f"holds {unknown[0]}, which lies on no layer of this {family.name} model that adapters are for")
    if not found:
        raise UserError(KEY, directory, "holds no adapter of this model")
    targets = tuple(dict.fromkeys(target for _, target, _, _ in found))
    if odd := [one for one, target, _, _ in found if sum(other == target for _, other, _, _ in found) != model.num_layers]:
        raise UserError(KEY, directory, f"lacks adapters of some layers: {odd[0].names[0]} has one, others have none")
    common = max(a.shape[0] for _, _, a, _ in found)
    parts = tuple(part for one, _, a, b in found for part in _parts(one, _filled(a, 0, common).to(dtype), _filled(b, 1, common).to(dtype)))
    dropout = settings.values.get("lora_dropout")
    notes = [f"adapter of rank {rank} on {', '.join(targets)}, here of rank {common}"] + ([f"lora_dropout={dropout} is not carried on"] if dropout else [])
    return Adapter(LoraConfig(rank=common, alpha=scale * common, targets=targets), parts, tuple(notes),
                   {name: hash_file(directory / name) for name in (SETTINGS, NAME)})


def _settings(directory: Path) -> tuple[Settings, float, int]:
    """(the settings, s, r)."""
    settings = Settings.of(directory, KEY, file=SETTINGS)

    def wrong(key: str, right: str) -> UserError:
        return settings.wrong(key, settings.get(key), f"is not supported; {right}")

    if settings.get("peft_type") != "LORA":
        raise wrong("peft_type", "LORA is")
    for key, plain in PLAIN.items():
        if settings.get(key, plain) not in (plain, None, [], {}):
            raise wrong(key, f"only {json.dumps(plain)}")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise wrong("r", "a whole number of at least 1")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise wrong("lora_alpha", "a number greater than 0")
    return settings, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank), rank


def _joined(one: Placed, pairs: Sequence[tuple[Tensor, Tensor] | None], heads: Heads) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank] of our layer."""
    present = [pair for pair in pairs if pair is not None]
    shared = len(present) == len(pairs) and all(torch.equal(a, present[0][0]) for a, _ in present)
    a = present[0][0] if shared else torch.cat([a for a, _ in present])
    columns, start = [], 0
    for pair, (out, _) in zip(pairs, _sizes(one), strict=True):
        if shared:
            columns.append(pair[1])
            continue
        column = torch.zeros(out, len(a))
        if pair is not None:
            column[:, start : start + pair[1].shape[1]] = pair[1]
            start += pair[1].shape[1]
        columns.append(column)
    return a, one.form.join([column.t() if _transposed(one) else column for column in columns], heads)


def _filled(matrix: Tensor, axis: int, size: int) -> Tensor:
    """With zeros behind, up to a size."""
    shape = list(matrix.shape)
    shape[axis] = size - shape[axis]
    return torch.cat((matrix, matrix.new_zeros(shape)), dim=axis)


def _parts(one: Placed, a: Tensor, b: Tensor) -> tuple[Part, Part]:
    key, column = one.ours.key.removesuffix("weight"), one.ours.axis == 0
    return (Part(Ours(key + "lora_a", tuple(a.shape), None if column else 1), one.layer, a),
            Part(Ours(key + "lora_b", tuple(b.shape), 0 if column else None, halves=one.ours.halves), one.layer, b))


# ---- export ----------------------------------------------------------------------------------------------------------------------------


def write_directory(directory: Path, family: Family, model: ModelConfig, vocab: int, lora: LoraConfig, region, dtype: torch.dtype, base: str | None) -> list[Path]:
    """Writes an adapter as PEFT reads it.

    Args:
        lora: that it was trained with. region: (key, offset, shape) -> a part of the checkpoint's tensor.
        base: the model that it lies on.
    """
    heads, made, modules = Heads.of(model), {}, []
    for one, target, names in _lines(family, model, vocab):
        if target not in lora.targets:
            continue
        for number, (module, (out, width)) in enumerate(zip(names, _sizes(one), strict=True)):
            made[f"{module}.lora_A.weight"] = (one, None, (lora.rank, width))
            made[f"{module}.lora_B.weight"] = (one, number, (out, lora.rank))
            modules.append(module.rsplit(".", 1)[1])

    def make(name: str) -> Tensor:
        one, number, shape = made[name]
        key = one.ours.key.removesuffix("weight")
        if number is None:
            return region(key + "lora_a", (one.layer, 0, 0), (1, *shape))[0]
        whole = region(key + "lora_b", (one.layer, 0, 0), (1, one.ours.shape[0], lora.rank))[0]
        part = one.form.split(whole, heads)[number]
        return part.t() if _transposed(one) else part

    files = write(directory, [Planned(name, dtype, shape) for name, (_, _, shape) in made.items()], make, name=NAME)
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    values = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": lora.rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted(set(modules)), "fan_in_fan_out": any(_transposed(one) for one, _, _ in made.values()), "use_rslora": False,
        "use_dora": False, "modules_to_save": None, "inference_mode": True,
    }
    (directory / SETTINGS).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return files
