"""Modules with parameters of their own, beside those of megatron-core's layers: how they are made and how they stand in checkpoints."""
from collections.abc import Mapping
from types import MappingProxyType

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor


class OwnParameters(MegatronModule):
    """The same on every tensor-parallel rank but for `split`: parameter -> the axis along which ranks hold parts."""

    split: Mapping[str, int] = MappingProxyType({})

    def __init__(self, config, tp_group):
        super().__init__(config=config)
        self.tp_group = tp_group

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, dict(self.split), sharded_offsets, tp_group=self.tp_group, dp_cp_group=metadata["dp_cp_group"],
        )


def matrix(config, out: int, width: int) -> Tensor:
    """Room for [out, width] where and as the model's parameters are; `initialise` fills it."""
    return torch.empty(out, width, dtype=config.params_dtype, device="cpu" if config.use_cpu_initialization else torch.cuda.current_device())
