"""Low-rank adapters (models/lora.py) in a checkpoint: W [.., out, in] stands there beside A [.., r, in] and B [.., out, r].

A run reads them as they are, with the settings that they were written with; or it starts from what the model was with them, W + alpha / r B A
(`merge`), be it to train on without adapters or with new ones. Either way they are not lost without a word.
"""
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from megatron_ext.checkpoint import manifest as m
from megatron_ext.errors import UserError

if TYPE_CHECKING:
    from megatron_ext.checkpoint.read import Stored

A, B, WEIGHT = ".lora_a", ".lora_b", ".weight"
ADAPTERS = (A, B)


def _beside(stored: "Stored", key: str) -> tuple[str, str] | None:
    """The keys of a weight's adapters, where the checkpoint has them."""
    a, b = (key.removesuffix(WEIGHT) + name for name in ADAPTERS)
    return (a, b) if key.endswith(WEIGHT) and a in stored.tensors and b in stored.tensors else None


def check_adapters(stored: "Stored", keys: Iterable[str], lora: dict | None) -> None:
    """Raises UserError where a state would take weights without their adapters, or adapters that count more or less than they did.

    Args:
        keys: of what is asked for.
        lora: this run's settings; None = they are not compared.
    """
    asked = set(keys)
    beside = [adapters for key in asked if (adapters := _beside(stored, key))]
    if not beside:
        return
    theirs = stored.record.get("config", {}).get("lora", {})
    if not all(asked.issuperset(adapters) for adapters in beside):
        words = " ".join(f"lora.{name}={','.join(value) if name == 'targets' else value}" for name, value in sorted(theirs.items()))
        raise UserError(m.KEY, stored.path, f"holds adapters ({words}) that this run would leave out: it needs the same lora keys; or name it in "
                                            "checkpoint.start, where its adapters become part of the weights")
    if lora is not None and theirs.get("alpha") != lora["alpha"]:
        raise UserError("lora.alpha", lora["alpha"], f"scales the adapters of {stored.path}, which were trained with lora.alpha={theirs.get('alpha')}")


def product(stored: "Stored", tensor: ShardedTensor, offset: Sequence[int], shape: Sequence[int]) -> tuple[Tensor, Tensor] | None:
    """alpha / r B and A of a region of a weight, fp32, whose product belongs to it; None where it has no adapters.

    Raises:
        UserError: adapters that do not fit the weight, or whose scale the record does not know.
    """
    keys = _beside(stored, tensor.key)
    if keys is None:
        return None
    a, b = (stored.tensors[key] for key in keys)
    lead, (out, width), rank = tuple(tensor.global_shape[:-2]), tensor.global_shape[-2:], a.shape[-2] if len(a.shape) > 1 else 0
    if rank == 0 or a.shape != (*lead, rank, width) or b.shape != (*lead, out, rank):
        raise m.damaged(stored.path, "the index", f"has adapters of {tensor.key} that do not fit it")
    try:
        alpha = float(stored.record["config"]["lora"]["alpha"])
    except (KeyError, TypeError, ValueError):
        alpha = math.nan
    if not math.isfinite(alpha):
        raise UserError(m.KEY, stored.path, "holds adapters, and its record does not say lora.alpha, by which they are scaled")
    own_a = stored.region(keys[0], (*offset[:-2], 0, offset[-1]), (*shape[:-2], rank, shape[-1]))
    own_b = stored.region(keys[1], (*offset[:-1], 0), (*shape[:-1], rank))
    return own_b.float() * (alpha / rank), own_a.float()


@torch.no_grad()
def merge(tensor: ShardedTensor, weight: Tensor, b: Tensor, a: Tensor) -> None:
    """Sets a tensor to weight + b a, summed in fp32 from what the checkpoint holds and rounded once to the tensor's dtype."""
    tensor.data.copy_((weight.float() + b @ a).view(tensor.data.shape))
