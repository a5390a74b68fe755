"""A checkpoint's weights into an engine of any layout, without its optimizer: the newest ones, or the average that ppo keeps beside them."""
from dataclasses import replace
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

from megatron_ext import checkpoint
from megatron_ext.checkpoint.adapters import ADAPTERS
from megatron_ext.errors import UserError
from megatron_ext.train import record as records
from megatron_ext.train.engine import Engine

AVERAGE = "ema."  # what the keys of averaged weights begin with


def load_weights(engine: Engine, source: Path, *, average: bool = False, merge_adapters: bool = True) -> None:
    """Collective over the engine's ranks.

    Args:
        average: the exponential moving average (`ppo.ema`) in the place of the newest weights.
        merge_adapters: the checkpoint's adapters become part of the weights, and the engine's own stay as they are drawn; else they are read
            into the engine's.
    Raises:
        UserError: a damaged file, another model, no average.
    """
    stored = checkpoint.read_record(source)
    if average and not stored.get("average"):
        raise UserError("checkpoint.average", "true", f"{source} holds no average: it comes from a ppo run with ppo.ema set")
    expect = {"model": records.architecture(engine.config.model, engine.vocab_size), "layout": records.layout(engine.config)}
    state = engine.sharded_state(loading=True, weights_only=True, sharding=stored["sharding"])
    # What the checkpoint cannot hold stays as it is: a head of its own of a language model that becomes a reward model, a history without an average.
    begins = stored.get("head") != "scalar"

    def kept(name: str, piece: object) -> bool:
        return begins and name.startswith("value_head.") or average and not averaged(piece) or merge_adapters and name.endswith(ADAPTERS)

    stays = {chunk: {name for name, piece in pieces.items() if kept(name, piece)} for chunk, pieces in state.items()}
    wanted = {chunk: {name: piece for name, piece in pieces.items() if name not in stays[chunk]} for chunk, pieces in state.items()}
    if average:
        wanted = as_average({chunk: {name: (piece, torch.empty_like(piece.data, dtype=torch.float32)) for name, piece in pieces.items()}
                             for chunk, pieces in wanted.items()})
    found = checkpoint.load(source, wanted, expect=expect, merge_adapters=merge_adapters)
    own = {chunk: model.state_dict() for chunk, model in zip(stays, engine.models)}
    here = {chunk: {name: own[chunk][name] for name in stays[chunk] & own[chunk].keys()} for chunk in stays}
    engine.load_state({chunk: found[chunk] | here[chunk] for chunk in found})


def averaged(piece: object) -> bool:
    """Whether an entry of a sharded state dict is a weight, which an average is made of."""
    return isinstance(piece, ShardedTensor | ShardedTensorFactory) and piece.data.is_floating_point()


def as_average(weights: dict[str, dict[str, tuple]]) -> dict:
    """{chunk: {name: (piece, fp32 tensor)}} as a sharded state dict of its own: the pieces' places, with the tensors, under AVERAGE."""
    state = {}
    for chunk, pieces in weights.items():
        state[chunk] = {
            name: replace(piece, data=tensor, **({"dtype": torch.float32} if isinstance(piece, ShardedTensor) else {}))
            for name, (piece, tensor) in pieces.items()
        }
    add_prefix_for_sharding(state, AVERAGE)
    return state
