"""Initial weights that do not depend on the layout.

Each rank of a parallel model drawing its own part gives every layout other weights. Here every tensor is drawn whole from a generator
seeded by its global name and its layer, and each rank copies in its part. megatron-core's sharded state dict says, for every parameter,
what it is called globally, which layer it is, how large the whole is, and where this part lies.

Embeddings, and all matrices: normal with standard deviation `init_std`; those that write into the residual stream (attention's output,
the second of the MLP): init_std / sqrt(2 L), as GPT-2 (Radford et al. 2019). Value heads and adapters: see heads.py
and lora.py. A word table whose logits are scaled (T5) is as much wider: init_std / logit_scale. Gains 1, biases 0. Rows that only pad the vocabulary are 0.
"""
import hashlib
import math
from collections.abc import Iterator

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_ext.config.schema import ModelConfig
from megatron_ext.models.heads import ValueHead

RESIDUAL = ("linear_proj.weight", "linear_fc2.weight")
VOCABULARY = ("word_embeddings.weight", "output_layer.weight")
ZERO = ("bias", "lora_b")


def sharded_tensors(state: dict) -> Iterator[ShardedTensor]:
    """The tensors of a sharded state dict; their data are views of the model's."""
    for value in nested_values(state):
        if isinstance(value, ShardedTensorFactory):  # the gate and the up-projection share a parameter; build() gives views of it
            yield from sharded_tensors(value.build())
        elif isinstance(value, ShardedTensor):
            yield value


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _std(key: str, shape: list[int], model: ModelConfig) -> float:
    if key.endswith("value_head.weight"):
        return ValueHead.std(model.hidden_size)
    if key.endswith("lora_a"):
        return 1 / math.sqrt(3 * shape[-1])
    if key.endswith("word_embeddings.weight"):
        return model.init_std / model.logit_scale
    return model.init_std / (math.sqrt(2 * model.num_layers) if key.endswith(RESIDUAL) else 1.0)


@torch.no_grad()
def initialise(chunk: torch.nn.Module, model: ModelConfig, *, vocab_size: int, seed: int) -> None:
    """Draws the weights of one model chunk in place.

    Args:
        chunk: a `Decoder` (not yet wrapped).
        model: for `init_std` and the number of layers.
        vocab_size: words that exist: the table is drawn without its padding, whose size may depend on the layout.
        seed: the same seed gives the same model in every layout.
    """
    for tensor in sharded_tensors(chunk.sharded_state_dict(metadata={"dp_cp_group": chunk.pg_collection.dp_cp})):
        lead = tensor.prepend_axis_num  # the axis of layers, where there is one
        layer, offset = tensor.global_offset[:lead], tensor.global_offset[lead:]
        shape, part = list(tensor.global_shape[lead:]), tensor.data
        if part is None or not part.is_floating_point():
            continue
        if "norm" in tensor.key and tensor.key.endswith("weight"):
            part.fill_(1.0)
        elif tensor.key.endswith(ZERO):
            part.zero_()
        else:
            if tensor.key.endswith(VOCABULARY):
                shape[0] = vocab_size
            whole = torch.empty(shape, device="cpu").normal_(0.0, _std(tensor.key, shape, model), generator=_generator(seed, f"{tensor.key}/{layer}"))
            own = whole[tuple(slice(o, o + n) for o, n in zip(offset, part.shape[-len(shape):]))]
            target = part.view(part.shape[-len(shape):])
            target.zero_()
            target[tuple(slice(n) for n in own.shape)].copy_(own)
