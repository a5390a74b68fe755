"""Low-rank adapters on the parallel linear layers (Hu et al. 2021, arXiv 2106.09685, equation 3):

    y = W x + (alpha / r) B A x,        A [r, in] ~ N(0, 1 / (3 in)),  B [out, r] = 0

W and all else that the model holds are frozen, but a scalar head, which no base model brings along: gradients, their buffers, main weights and
moments exist for A and B alone. The paper draws A from a Gaussian without saying how wide; this is the variance of its code's (loralib's)
uniform numbers.

Over tensor-parallel ranks what is split follows W, and what travels is r wide:

    column   W, B split by rows; A whole.      A x is whole: its gradient is summed. With sequence parallelism A x of a part of the tokens
                                                is gathered, x is not; A's gradient is then a part over tokens.
    row      W, A split by columns; B whole.   A x is summed (reduce-scattered with sequence parallelism; B's gradient is then a part).

megatron-core adds up the gradients that are a part over tokens where a parameter says `sequence_parallel`. B's rows lie as W's do, with the
gate and the up-projection of gated units in halves, so that checkpoints hold the same A and B whatever layout wrote them.

The adapters' products run in the layer's dtype, FP8 layers included. They live in the layers themselves: an adapted layer is of a subclass that
`apply_lora` gives it, with two parameters more under its own name.
"""
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_ext.config.schema import LoraConfig
from megatron_ext.errors import UserError

PATHS = {
    "linear_qkv": "self_attention.linear_qkv", "linear_proj": "self_attention.linear_proj", "linear_fc1": "mlp.linear_fc1", "linear_fc2": "mlp.linear_fc2",
}


class Adapted:
    """What both kinds share. `split`: the dimension over which W, and one of the two adapters, is split."""

    split: int
    kind: type  # of the layer that is adapted
    lora_scale: float
    lora_halves: bool  # the rows of B are gate and up-projection
    lora_active: bool

    def adapt(self, lora: LoraConfig, *, halves: bool) -> None:
        """Takes the place of __init__: the layer was made before."""
        out, width = self.weight.shape
        for name, shape, split in (("lora_a", (lora.rank, width), self.split == 1), ("lora_b", (out, lora.rank), self.split == 0)):
            parameter = torch.nn.Parameter(torch.empty(shape, dtype=self.weight.dtype, device=self.weight.device))
            if split:
                set_tensor_model_parallel_attributes(parameter, True, self.split, 1)
            else:
                parameter.sequence_parallel = self.sequence_parallel
            self.register_parameter(name, parameter)
        self.lora_scale, self.lora_halves, self.lora_active = lora.alpha / lora.rank, halves, True

    def low(self, x: Tensor) -> Tensor:
        """A x, [..., r], of this rank's part of x."""
        return F.linear(x, self.lora_a)

    def raised(self, y: Tensor, low: Tensor) -> Tensor:
        """y + alpha / r B low, in one pass over y."""
        return torch.addmm(y.flatten(0, -2), low.flatten(0, -2), self.lora_b.t(), alpha=self.lora_scale).view(y.shape)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        own = {name: getattr(self, name) for name in ("lora_a", "lora_b")}
        axes = {"lora_b": 0} if self.split == 0 else {"lora_a": 1}
        state |= make_sharded_tensors_for_checkpoint(own, prefix, axes, sharded_offsets, tp_group=self.tp_group, dp_cp_group=metadata["dp_cp_group"])
        if self.lora_halves:
            state[f"{prefix}lora_b"] = apply_swiglu_sharded_factory(state[f"{prefix}lora_b"], sharded_offsets,
                                                                    metadata.get("singleton_local_shards", False))
        return state


class AdaptedColumn(Adapted):
    """In front of a ColumnParallelLinear."""

    split = 0

    def forward(self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None) -> tuple[Tensor, Tensor | None]:
        """[seq (/ TP with sequence parallel), batch, in] -> ([seq, batch, out / TP], bias that is not yet added or None)."""
        y, bias = super().forward(input_, weight=weight, runtime_gather_output=runtime_gather_output)
        if not self.lora_active:
            return y, bias
        low = self.low(input_)
        if self.sequence_parallel:
            low = gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            low = copy_to_tensor_model_parallel_region(low, group=self.tp_group)
        return self.raised(y, low), bias


class AdaptedRow(Adapted):
    """In front of a RowParallelLinear."""

    split = 1

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[seq, batch, in / TP] -> ([seq (/ TP with sequence parallel), batch, out], bias that is not yet added or None)."""
        y, bias = super().forward(input_)
        if not self.lora_active:
            return y, bias
        reduced = reduce_scatter_to_sequence_parallel_region if self.sequence_parallel else reduce_from_tensor_model_parallel_region
        return self.raised(y, reduced(self.low(input_), group=self.tp_group)), bias


def apply_lora(chunk: torch.nn.Module, lora: LoraConfig) -> None:
    """Freezes a model chunk and gives its linear layers adapters, whose numbers `initialise` draws.

    Call it on a bare `Decoder`, before it is wrapped for precision and data parallelism.

    Raises:
        UserError: targets that no layer has, layers that cannot be adapted.
    """
    if unknown := sorted(set(lora.targets) - PATHS.keys()):
        raise UserError("lora.targets", ",".join(unknown), f"must be of {', '.join(PATHS)}")
    if not lora.targets:
        raise UserError("lora.targets", "[]", "names no layer: with lora.rank nothing would be trained; name some, or set lora.rank=0")
    for name, parameter in chunk.named_parameters():
        parameter.requires_grad_(name.startswith("value_head."))
    classes: dict[type, type] = {}
    for layer in chunk.decoder.layers:
        for target in lora.targets:
            linear = layer.get_submodule(PATHS[target])
            kind = type(linear)
            mixin = next((mixin for base, mixin in ((ColumnParallelLinear, AdaptedColumn), (RowParallelLinear, AdaptedRow)) if issubclass(kind, base)), None)
            if mixin is None:
                raise UserError("lora.rank", lora.rank, f"adapts megatron-core's linear layers, not {kind.__name__}: kernels.layers=te has no adapters yet; "
                                                        "fused, fp8 and plain have")
            if kind not in classes:
                classes[kind] = type(f"{mixin.__name__}{kind.__name__}", (mixin, kind), {"__module__": __name__, "__doc__": mixin.__doc__, "kind": kind})
            linear.__class__ = classes[kind]
            linear.adapt(lora, halves=target == "linear_fc1" and chunk.config.gated_linear_unit)
    if chunk.pre_process and chunk.config.recompute_granularity == "full":
        chunk.embedding.register_forward_hook(_differentiable)


def _differentiable(_module, _inputs, output: Tensor) -> None:
    """megatron-core's recomputation runs layers backward only where their input has a gradient, and that of frozen embeddings has none."""
    if torch.is_grad_enabled():
        output.requires_grad_()


def adapted(models: Iterable[torch.nn.Module]) -> Iterator[Adapted]:
    """The adapted layers of model chunks, wrapped or not."""
    for model in models:
        for module in model.modules():
            if isinstance(module, Adapted):
                yield module


def active(module: torch.nn.Module) -> bool:
    """Whether a layer has an adapter that contributes."""
    return isinstance(module, Adapted) and module.lora_active


@contextmanager
def disabled(models: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Inside, forward passes are those of the base model, bit for bit: the reference policy, for nothing. Backward passes of what is computed
    inside have to be inside too: recomputation would find the adapters again."""
    changed = [linear for linear in adapted(models) if linear.lora_active]
    for linear in changed:
        linear.lora_active = False
    try:
        yield
    finally:
        for linear in changed:
            linear.lora_active = True
