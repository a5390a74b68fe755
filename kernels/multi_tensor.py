"""One launch over many tensors, as Apex's multi_tensor_apply does it: tables of addresses and of chunks, kept on the device between steps.

A program takes one chunk of CHUNK elements of one tensor. It finds the tensor's index and its own offset in the chunk tables, and the tensor's
address in the pointer table: one row a list (parameters, gradients, ...), one column a tensor. The tables are a function of addresses and sizes
alone, so they are cached by them; a step whose tensors stayed where they were uploads nothing.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kernels.checks import check_device
from kernels.jit import tl, triton

CHUNK, BLOCK, WARPS = 8192, 1024, 4  # 8 fp32 elements a thread: two 16-byte loads a list; 8 rounds share one look into the tables


@dataclass(frozen=True)
class Tables:
    """Where the chunks of some lists of tensors are.

    Attributes:
        pointers: int64 [lists, tensors], addresses. sizes: int64 [tensors], elements.
        tensor_of: int32 [chunks]. offset_of: int64 [chunks], in elements.
        aligned: every address is divisible by 16.
    """

    pointers: Tensor
    sizes: Tensor
    tensor_of: Tensor
    offset_of: Tensor
    aligned: bool

    @property
    def grid(self) -> tuple[int]:
        return (self.tensor_of.numel(),)


_captured: dict[tuple, Tables] = {}  # a CUDA graph reads them at each replay, so they live as long as the process


@lru_cache(maxsize=64)
def _tables(device: torch.device, pointers: tuple[tuple[int, ...], ...], sizes: tuple[int, ...]) -> Tables:
    size = torch.tensor(sizes)
    chunks = (size + CHUNK - 1) // CHUNK
    tensor_of = torch.repeat_interleave(chunks)
    offset_of = (torch.arange(tensor_of.numel()) - (chunks.cumsum(0) - chunks)[tensor_of]) * CHUNK
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a multi-tensor kernel met new addresses while a CUDA graph was captured: run the step once before, on the same tensors")
    return Tables(torch.tensor(pointers).to(device), size.to(device), tensor_of.int().to(device), offset_of.to(device),
                  all(address % 16 == 0 for row in pointers for address in row))


def tables(lists: Sequence[Sequence[Tensor]]) -> Tables | None:
    """Of lists of one length whose i-th tensors have one size, all contiguous and on one device; None where there is no element at all."""
    live = [i for i, t in enumerate(lists[0]) if t.numel()]
    if not live:
        return None
    device = lists[0][live[0]].device
    key = device, tuple(tuple(column[i].data_ptr() for i in live) for column in lists), tuple(lists[0][i].numel() for i in live)
    found = _captured.get(key) or _tables(*key)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured[key] = found
    return found


@triton.jit
def address(pointers, tensors, row: tl.constexpr, tensor, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """The address of tensor number `tensor` in list `row`, as a pointer to dtype."""
    pointer = tl.load(pointers + row * tensors + tensor).to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


def flat(op: str, name: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each as a vector in the order in which it lies in memory, a view; ValueError where it has holes or its elements overlap."""
    found = []
    for i, tensor in enumerate(tensors):
        if not tensor.is_contiguous():
            tensor = tensor.permute(sorted(range(tensor.dim()), key=lambda d, t=tensor: (-t.stride(d), -t.shape[d])))
            if not tensor.is_contiguous():
                raise ValueError(f"{op}: {name}[{i}] (shape {tuple(tensors[i].shape)}, strides {tensors[i].stride()}) has holes or overlaps; "
                                 "call .contiguous() where the copy is meant")
        found.append(tensor.view(-1))
        check_device(op, f"{name}[{i}]", tensor, tensors[0].device)
    return found


def torch_type(dtype: torch.dtype):
    """Triton's name of a dtype."""
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
