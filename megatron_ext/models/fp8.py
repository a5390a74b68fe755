"""megatron-core's parallel linear layers with FP8 products (`kernels/fp8_linear.py`): same parameters and communication, other arithmetic.

With sequence parallelism the input is gathered in the layer's dtype before it is quantised; for backward each rank keeps the rows of its
own part, in FP8, and they are gathered again there, at a byte an element.

What keeps every layout on the same numbers: scales that come from tensors are those of the *whole* tensors (their amaxes are reduced over
the tensor-parallel group, since each rank holds a part of the weight and of one side's activations), and what delayed scaling has seen in
a step is reduced over all ranks that hold the same layers before it enters the history.

Delayed scaling. A step's largest x, weight and dy are recorded by maximum: micro-batches come in any order, and what is recomputed counts
once. Only forward passes that are differentiated record, so evaluation and scoring leave no trace. `update_scales`, called once a step,
moves the record into the history, from which the next step's scales come. A layer that has seen nothing yet scales by the tensors at
hand. The history is part of the checkpoint: the same on every tensor- and data-parallel rank, whatever the layout. It is kept as the bits
of its fp32 numbers, int32, so that `module.bfloat16()` does not round it; positive numbers order like their bits.
"""
import copy
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch import Tensor

from kernels.fp8_linear import fp8_linear
from kernels.fp8_scaling import Fp8Recipe, history_amax, push_amax, scale_of


class Fp8Linear:
    """What the two layers share. `recipe`, `backend`, `high_precision`: see `fp8_linears`, which sets them on the class."""

    recipe = Fp8Recipe()
    backend = "auto"
    high_precision = False

    def __init__(self, *args, config, **kwargs):
        # megatron-core refuses to accumulate into main gradients without Apex's extension; the FP8 product does not need it.
        plain = copy.copy(config)
        plain.gradient_accumulation_fusion = self.high_precision and config.gradient_accumulation_fusion
        super().__init__(*args, config=plain, **kwargs)
        self.config, self.gradient_accumulation_fusion = config, config.gradient_accumulation_fusion
        if self.is_expert:
            raise ValueError("FP8 linear layers do not serve the experts of a mixture; give those the layers of megatron-core")
        self.scales: Tensor | None = None
        if self.recipe.kind == "delayed":
            device = None if self.weight is None else self.weight.device
            self.register_buffer("fp8_history", torch.zeros(self.recipe.history, 3, dtype=torch.int32, device=device))
            self.register_buffer("fp8_record", torch.zeros(3, dtype=torch.int32, device=device), persistent=False)

    def take_scales(self) -> None:
        """The scales that the history says."""
        history = self.fp8_history.view(torch.float32)
        self.scales = _scales(history_amax(history, self.recipe), self.recipe) if bool(self.fp8_history.any()) else None

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        if self.recipe.kind == "delayed":
            self.take_scales()

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.scales is not None:
            self.take_scales()  # on the device that the history has gone to
        return self

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None = None, allreduce_dgrad: bool = False,
                      sequence_parallel: bool = False, tp_group=None, **rest) -> Tensor:
        """[seq, batch, in] -> [seq, batch, out]; called by megatron-core's `forward`, which communicates before and after."""
        if self.high_precision:
            return super()._forward_impl(input=input, weight=weight, bias=bias, allreduce_dgrad=allreduce_dgrad,
                                         sequence_parallel=sequence_parallel, tp_group=tp_group, **rest)
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        main_grad = getattr(weight, "main_grad", None) if self.gradient_accumulation_fusion else None
        record = self.recipe.kind == "delayed" and self.training and torch.is_grad_enabled()
        y = fp8_linear(
            input.contiguous(), weight, recipe=self.recipe, scales=self.scales, group=self.tp_group, split=sequence_parallel,
            backend=self.backend,
            record=self.fp8_record.view(torch.float32) if record else None,
            # A main gradient of another dtype gets its part from autograd, through the hooks of the gradient buffers.
            main_grad=main_grad if main_grad is not None and main_grad.dtype == torch.float32 else None,
        )
        return y if bias is None else y + bias


class Fp8ColumnParallelLinear(Fp8Linear, ColumnParallelLinear):
    """Y = X A^T in FP8, A split by rows over the tensor-parallel ranks."""


class Fp8RowParallelLinear(Fp8Linear, RowParallelLinear):
    """Y = X A^T in FP8, A split by columns; the parts of Y are summed in the layer's dtype, as megatron-core does."""


def fp8_linears(recipe: Fp8Recipe, *, high_precision: bool = False, backend: str = "auto") -> tuple[type, type]:
    """The classes (column, row) for a `ModuleSpec`.

    Args:
        recipe: how operands are scaled.
        high_precision: the products stay in the layer's own dtype: for the first and last layers (`is_edge`). With delayed scaling such
            layers carry a history too, unused, because checkpoints want the same tensors in all layers.
        backend: scaled_mm, emulation, or auto.
    """
    chosen = {"recipe": recipe, "high_precision": high_precision, "backend": backend}
    return tuple(type(base.__name__, (base,), {**chosen, "__module__": __name__, "__doc__": base.__doc__})
                 for base in (Fp8ColumnParallelLinear, Fp8RowParallelLinear))


def is_edge(layer: int, layers: int, edge: int) -> bool:
    """Whether `layer` (from 0, of the whole model) is one of the first or last `edge`."""
    return layer < edge or layer >= layers - edge


def _scales(amax: Tensor, recipe: Fp8Recipe) -> Tensor:
    """[..., 3]: of x, weight and dy."""
    settings = {"margin": recipe.margin, "power_of_2": recipe.power_of_2}
    return torch.cat((scale_of(amax[..., :2], recipe.forward, **settings), scale_of(amax[..., 2:], recipe.backward, **settings)), dim=-1)


def _delayed(chunks: Iterable[torch.nn.Module]) -> Iterator[Fp8Linear]:
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, Fp8Linear) and module.recipe.kind == "delayed" and not module.high_precision:
                yield module


@torch.no_grad()
def update_scales(chunks: Iterable[torch.nn.Module], groups: ProcessGroupCollection, *, applied: bool = True) -> None:
    """A step ends: what delayed scaling has recorded enters the histories, and the scales of the next step follow.

    Called once a step on every rank, after backward; does nothing where no layer scales so. Collective over the ranks that hold the same
    layers.

    Args:
        chunks: this rank's model chunks, wrapped or not.
        applied: False forgets what was recorded, as for a step that changed no weights.
    """
    modules = list(_delayed(chunks))
    if not modules:
        return
    if applied:
        recipe = modules[0].recipe
        amax = torch.stack([module.fp8_record.view(torch.float32) for module in modules])
        amax = torch.where(amax.isnan(), torch.inf, amax)
        dist.all_reduce(amax, dist.ReduceOp.MAX, group=groups.tp_dp_cp)
        history = torch.stack([module.fp8_history.view(torch.float32) for module in modules], dim=1)  # [steps, layers, 3]
        push_amax(history, amax)
        scales = _scales(history_amax(history, recipe), recipe)
        seen = history.flatten(2).amax((0, 2)).tolist()
        for index, module in enumerate(modules):
            module.fp8_history.copy_(history[:, index].contiguous().view(torch.int32))
            module.scales = scales[index] if seen[index] else None
    for module in modules:
        module.fp8_record.zero_()
