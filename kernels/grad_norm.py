"""The norm of all gradients together, and scaling by it: gradient clipping (Pascanu et al. 2013, arXiv 1211.5063).

    norm = (sum over tensors and elements of |x|^p)^(1/p),  p = 1 or 2;  max |x| for p = inf;      x <- x min(1, max_norm / (norm + 1e-6)).

The sum must depend neither on the run nor on how the model was cut into tensors: each chunk is summed in fp32, the chunks in fp64, in one order
(torch.norm on the CPU adds fp32 in order, and is 7e-5 off at 4 million elements). No atomics. The norm stays on the device: nothing here waits.

Memory traffic: the norm reads everything once, scaling reads and writes it once. Shapes: any, dense in memory; fp32, bf16, fp16 mixed.
"""
import math
from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import multi_tensor
from kernels.backend import serving
from kernels.checks import check_dtype, check_group
from kernels.jit import Launch, narrow, on_device_of, tl, triton
from kernels.multi_tensor import address, flat, tables, torch_type

NORM_BLOCK = 1024  # elements summed in fp32 before fp64 takes over, in torch


def grad_norm_reference(tensors: Sequence[Tensor], norm_type: float = 2) -> Tensor:
    """The definition in plain PyTorch, to fp32 (fp64 for fp64): a norm of norms, which is what `torch.nn.utils.clip_grad_norm_` takes."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t, norm_type, dtype=wide) for t in tensors]), norm_type)


@triton.jit
def _partial(pointers, sizes, tensor_of, offset_of, partial_ptr, tensors, DTYPE: tl.constexpr, KIND: tl.constexpr, ALIGNED: tl.constexpr,
             CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """A chunk's sum of squares (KIND 2) or of |x| (1), or its largest |x| (0); a NaN anywhere gives NaN."""
    chunk = tl.program_id(0)
    tensor = tl.load(tensor_of + chunk)
    offset = tl.load(offset_of + chunk)
    left = tl.load(sizes + tensor) - offset
    x_ptr = address(pointers, tensors, 0, tensor, DTYPE, ALIGNED) + tl.multiple_of(offset, CHUNK)
    at = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    broken = tl.zeros([BLOCK], tl.int32)
    if left >= CHUNK:  # unmasked, for its own sake: a mask whose end is unknown allows no 16-byte loads
        for start in range(0, CHUNK, BLOCK):
            x = tl.abs(tl.load(x_ptr + start + at).to(tl.float32))
            total = tl.maximum(total, x) if KIND == 0 else total + (x * x if KIND == 2 else x)
            broken |= (x != x).to(tl.int32)  # noqa: PLR0124 NaN
    else:
        for start in range(0, CHUNK, BLOCK):
            x = tl.abs(tl.load(x_ptr + start + at, mask=start + at < left, other=0.0).to(tl.float32))
            total = tl.maximum(total, x) if KIND == 0 else total + (x * x if KIND == 2 else x)
            broken |= (x != x).to(tl.int32)  # noqa: PLR0124 NaN
    if KIND == 0:
        found = tl.max(total, axis=0)
        found = tl.where(tl.max(broken, axis=0) != 0, float("nan"), found)
    else:
        found = tl.sum(total, axis=0)
    tl.store(partial_ptr + chunk, found)


@triton.jit
def _scale(pointers, sizes, tensor_of, offset_of, factor_ptr, tensors, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
           BLOCK: tl.constexpr):
    chunk = tl.program_id(0)
    tensor = tl.load(tensor_of + chunk)
    offset = tl.load(offset_of + chunk)
    left = tl.load(sizes + tensor) - offset
    x_ptr = address(pointers, tensors, 0, tensor, DTYPE, ALIGNED) + tl.multiple_of(offset, CHUNK)
    factor = tl.load(factor_ptr)
    at = tl.arange(0, BLOCK)
    if left >= CHUNK:
        for start in range(0, CHUNK, BLOCK):
            x = tl.load(x_ptr + start + at).to(tl.float32)
            tl.store(x_ptr + start + at, narrow(x * factor, DTYPE))
    else:
        for start in range(0, CHUNK, BLOCK):
            live = start + at < left
            x = tl.load(x_ptr + start + at, mask=live, other=0.0).to(tl.float32)
            tl.store(x_ptr + start + at, narrow(x * factor, DTYPE), mask=live)


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    groups = defaultdict(list)
    for tensor in tensors:
        groups[tensor.dtype].append(tensor)
    return list(groups.values())


def _in_torch(tensors: Sequence[Tensor], norm_type: float) -> Tensor:
    """The norms of all blocks of all vectors, fp32."""
    parts = []
    for x in tensors:
        body = x.numel() // NORM_BLOCK * NORM_BLOCK if norm_type in (1, 2) else 0
        if body:
            parts.append(torch.linalg.vector_norm(x[:body].view(-1, NORM_BLOCK), norm_type, dim=1, dtype=torch.float32))
        if body < x.numel():
            parts.append(torch.linalg.vector_norm(x[body:] if body else x, norm_type, dtype=torch.float32).view(1))
    return torch.cat(parts) if parts else torch.zeros(1, device=tensors[0].device)


def _norm(tensors: Sequence[Tensor], norm_type: float, backend: str) -> Tensor:
    device = tensors[0].device
    if serving("grad_norm", backend, device.type) == "torch":
        parts = _in_torch(tensors, norm_type).double()
        parts = parts if math.isinf(norm_type) else parts.pow_(norm_type)
    else:
        parts = []
        for group in _by_dtype(tensors):
            if (table := tables([group])) is not None:
                partial = torch.empty(table.grid, dtype=torch.float32, device=device)
                with on_device_of(table.pointers):
                    _partial[table.grid](
                        table.pointers, table.sizes, table.tensor_of, table.offset_of, partial, table.sizes.numel(),
                        DTYPE=torch_type(group[0].dtype), KIND=0 if math.isinf(norm_type) else int(norm_type), ALIGNED=table.aligned,
                        CHUNK=multi_tensor.CHUNK, BLOCK=multi_tensor.BLOCK, num_warps=multi_tensor.WARPS)
                parts.append(partial)
        parts = torch.cat(parts).double() if parts else torch.zeros(1, dtype=torch.float64, device=device)
    return parts.amax() if math.isinf(norm_type) else parts.sum()


_norm_op = torch.library.custom_op("kernels::grad_norm", _norm, mutates_args=())


@_norm_op.register_fake
def _(tensors, norm_type, backend):
    return tensors[0].new_empty((), dtype=torch.float64)


def _scaled(tensors: Sequence[Tensor], factor: Tensor, backend: str) -> None:
    if serving("grad_norm", backend, tensors[0].device.type) == "torch":
        for x in tensors:
            if x.device.type == "cpu":
                x.mul_(factor.item())
            elif x.dtype == torch.float32:
                x.mul_(factor)
            else:
                x.copy_(x.float().mul_(factor))  # a bf16 product with a tensor would round the factor too
        return
    for group in _by_dtype(tensors):
        if (table := tables([group])) is not None:
            with on_device_of(table.pointers):
                _scale[table.grid](
                    table.pointers, table.sizes, table.tensor_of, table.offset_of, factor, table.sizes.numel(), DTYPE=torch_type(group[0].dtype),
                    ALIGNED=table.aligned, CHUNK=multi_tensor.CHUNK, BLOCK=multi_tensor.BLOCK, num_warps=multi_tensor.WARPS)


_scale_op = torch.library.custom_op("kernels::scale_", _scaled, mutates_args=("tensors",))


@_scale_op.register_fake
def _(tensors, factor, backend):
    return None


def _eager_on_cpu(tensors: Sequence[Tensor]) -> bool:
    return bool(tensors) and tensors[0].device.type == "cpu" and type(tensors[0]) is Tensor and not torch.compiler.is_compiling()


def _checked(op: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    if isinstance(tensors, Tensor):
        tensors = [tensors]
    for i, tensor in enumerate(tensors):
        check_dtype(op, f"tensors[{i}]", tensor)
    return flat(op, "tensors", tensors)


@torch.no_grad()
def grad_norm(tensors: Sequence[Tensor] | Tensor, *, norm_type: float = 2, group: dist.ProcessGroup | None = None,
              device: torch.device | str | None = None, backend: str = "auto") -> Tensor:
    """The norm of all tensors as one vector, over all ranks of `group`; the same bits at each run.

    Args:
        tensors: fp32, bf16 or fp16, of any shapes, dense in memory (transposed is fine), on one device. No element may be on two ranks of the group.
        norm_type: 1, 2 or math.inf.
        group: ranks that hold the other parts of the vector; None = it is all here.
        device: where the result goes when there are no tensors (a rank that owns nothing still takes part); None = the CPU.
        backend: triton, torch, or auto.
    Returns:
        fp32 scalar tensor on the tensors' device; not finite where an element of any rank is not. Not differentiable.
    Raises:
        TypeError, ValueError: a dtype, stride, device, group or norm_type that does not fit, naming it.
        MissingBackend: the backend asked for cannot serve here.
    """
    if norm_type not in (1, 2, math.inf):
        raise ValueError(f"grad_norm: norm_type is {norm_type}; it must be 1, 2 or math.inf")
    check_group("grad_norm", "group", group)
    tensors = _checked("grad_norm", tensors)
    # Handing many tensors through the registered op costs half a millisecond: nothing on a GPU, where it overlaps; on a CPU, all of it.
    run = _norm if _eager_on_cpu(tensors) else _norm_op
    found = run(tensors, float(norm_type), backend) if tensors else torch.zeros((), dtype=torch.float64, device=device or "cpu")
    if group is not None:
        if math.isinf(norm_type):
            found = found.nan_to_num(nan=math.inf, posinf=math.inf)  # a maximum may lose a NaN on the way
        dist.all_reduce(found, op=dist.ReduceOp.MAX if math.isinf(norm_type) else dist.ReduceOp.SUM, group=group)
    return (found.sqrt() if norm_type == 2 else found).float()


@torch.no_grad()
def scale_(tensors: Sequence[Tensor] | Tensor, factor: float | Tensor, *, backend: str = "auto") -> None:
    """x <- x factor for each tensor, in place, rounded to nearest even; factor is a number or an fp32 scalar tensor beside them (no waiting)."""
    tensors = _checked("scale_", tensors)
    if isinstance(factor, Tensor):
        check_dtype("scale_", "factor", factor, (torch.float32,))
        if factor.numel() != 1:
            raise ValueError(f"scale_: factor has shape {tuple(factor.shape)}, expected a scalar")
        if tensors and factor.device != tensors[0].device:
            raise ValueError(f"scale_: factor is on {factor.device}, the tensors on {tensors[0].device}; move one of them")
    if tensors:
        value = factor.reshape(()) if isinstance(factor, Tensor) else torch.full((), factor, dtype=torch.float32, device=tensors[0].device)
        (_scaled if _eager_on_cpu(tensors) else _scale_op)(tensors, value, backend)


@torch.no_grad()
def clip_(tensors: Sequence[Tensor] | Tensor, max_norm: float, norm: Tensor, *, backend: str = "auto") -> Tensor:
    """Scales by min(1, max_norm / (norm + 1e-6)), megatron-core's and torch's rule, without waiting for the norm.

    Args:
        norm: from `grad_norm`. Where it is not finite the tensors stay as they are: `~norm.isfinite()` says so to the optimizer (`found_inf`).
    Returns:
        The factor, fp32 scalar tensor.
    """
    if not isinstance(norm, Tensor):
        raise TypeError(f"clip_: norm is {norm!r}; it must be a tensor, as grad_norm returns it")
    if not max_norm > 0:
        raise ValueError(f"clip_: max_norm is {max_norm}; it must be above 0")
    factor = torch.where(norm.isfinite(), (max_norm / (norm.float() + 1e-6)).clamp(max=1.0), 1.0).float()
    scale_(tensors, factor, backend=backend)
    return factor


def launches() -> list[Launch]:
    """Every kernel for each dtype, with 16-byte addresses; tensors that begin elsewhere take the same code with narrow loads."""
    found = []
    tables_of = {"pointers": "*i64", "sizes": "*i64", "tensor_of": "*i32", "offset_of": "*i64"}
    walk = {"CHUNK": multi_tensor.CHUNK, "BLOCK": multi_tensor.BLOCK}
    for dtype in ("fp32", "bf16", "fp16"):
        for aligned in (True, False):
            constants = {"DTYPE": getattr(tl, {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[dtype]), "ALIGNED": aligned, **walk}
            name = f"{dtype}{'' if aligned else ' unaligned'}"
            for kind, said in ((2, "squares"), (1, "sum"), (0, "max")):
                found.append(Launch("grad_norm", f"{said} {name}", _partial, {**tables_of, "partial_ptr": "*fp32", "tensors": "i32"},
                                    {**constants, "KIND": kind}, multi_tensor.WARPS, memory_bound=aligned))
            found.append(Launch("grad_norm", f"scale {name}", _scale, {**tables_of, "factor_ptr": "*fp32", "tensors": "i32"}, constants,
                                multi_tensor.WARPS, memory_bound=aligned))
    return found
