"""What every public op checks of its arguments. Each error names the op and the argument, and says what would be right."""
import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import dynamo

dynamo.install()  # every op imports this module before it registers itself
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_dtype(op: str, name: str, tensor: Tensor, allowed: Sequence[torch.dtype] = FLOATS) -> None:
    """TypeError unless the tensor has one of these dtypes."""
    if tensor.dtype not in allowed:
        raise TypeError(f"{op}: {name} is {_short(tensor.dtype)}; it must be {', '.join(map(_short, allowed))}")


def check_shape(op: str, name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """ValueError unless the tensor has this shape."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")


def check_device(op: str, name: str, tensor: Tensor, device: torch.device) -> None:
    """ValueError unless the tensor lies on the device of the op's first argument."""
    if tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, the first argument on {device}; move one of them")


def check_last_dense(op: str, name: str, tensor: Tensor) -> None:
    """ValueError where the last dimension is strided: the op would have to copy, and copies are asked for, not made silently."""
    if tensor.dim() == 0:
        raise ValueError(f"{op}: {name} is a scalar; it needs at least one dimension")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{op}: the last dimension of {name} is strided (stride {tensor.stride(-1)}); call .contiguous() where the copy is meant")


def rows_of(op: str, name: str, tensor: Tensor) -> Tensor:
    """A view [rows, N] of [..., N]; the leading dimensions must collapse into one stride. ValueError where that would need a copy."""
    check_last_dense(op, name, tensor)
    try:
        return tensor.view(-1, tensor.shape[-1]) if tensor.numel() else tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])
    except RuntimeError:
        raise ValueError(f"{op}: the leading dimensions of {name} (shape {tuple(tensor.shape)}, strides {tensor.stride()}) do not collapse into "
                         "rows without a copy; call .contiguous() where the copy is meant") from None


def check_integer(op: str, name: str, value: object) -> None:
    """TypeError unless the setting is a whole number by type; 2.0 is none."""
    if not isinstance(value, numbers.Integral | torch.SymInt):
        raise TypeError(f"{op}: {name} is {value!r}; it must be an integer")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_group(op: str, name: str, group) -> None:
    """TypeError unless it is a process group or None, ValueError where this rank is not in it: a collective there would be nobody's."""
    import torch.distributed as dist

    if group is None:
        return
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{op}: {name} is {group!r}; it must be a torch.distributed process group that this rank belongs to, or None")
    if dist.get_rank(group) < 0:
        raise ValueError(f"{op}: this rank does not belong to {name}")
