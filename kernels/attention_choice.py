"""Which library computes an attention call. Unlike other ops this depends on the call: a mask, dropout, fp32 or a head size rules libraries out.

`choose_for(call, backend)` is to `attention` what `kernels.backend.choose` is to other ops; the rows and their order stand in
`kernels.backend.ops()["attention"]`, what a library can do stands here, as its sources say (flash-attention at v2.8, hopper/ and
flash_attn/cute of August 2026; Transformer Engine 2.x; torch 2.13). The first sentence that applies is what the user reads.
"""
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kernels.backend import Choice, MissingBackend, ops

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Call:
    """What decides: the tensors' device and dtype, the GPU's compute capability, the head size, and what is asked of the call."""

    device: str
    dtype: torch.dtype
    head_size: int
    capability: tuple[int, int] | None = None  # of the GPU; None where there is none
    packed: bool = False
    mask: bool = False
    dropout: bool = False
    return_lse: bool = False
    grad: bool = False  # a gradient will be asked for; looked at for flex alone


def _half(name: str, call: Call, largest: int = 256) -> str | None:
    """What every fused kernel asks: a GPU, 16 bits, a head size of whole 16-byte loads, and no mask."""
    if call.device != "cuda":
        return f"{name} runs on NVIDIA GPUs, the tensors are on {call.device}"
    if call.dtype not in HALF:
        return f"{name} takes bf16 and fp16, the tensors are {str(call.dtype).removeprefix('torch.')}"
    if call.mask:
        return f"{name} takes no mask; pack the sequences (cu_seqlens_q) or leave masks to torch"
    if call.head_size % 8 or call.head_size > largest:
        return f"{name} takes head sizes up to {largest} in multiples of 8, this one is {call.head_size}"
    return None


def _needs(call: Call, name: str, lowest: tuple[int, int], highest: tuple[int, int] = (99, 0)) -> str | None:
    if call.capability is None or lowest <= call.capability <= highest:
        return None
    end = "" if highest[0] == 99 else f" to sm_{highest[0]}{highest[1]}"
    return f"{name} is made for sm_{lowest[0]}{lowest[1]}{end or ' and later'}, this GPU is sm_{call.capability[0]}{call.capability[1]}"


def refusal(name: str, call: Call) -> str | None:
    """Why the library `name` cannot do `call`, were it installed; None = it can."""
    if name == "torch":
        return None
    if name == "flex":
        if not call.packed:
            return "flex_attention serves packed sequences here; dense ones are scaled_dot_product_attention's"
        if call.grad and call.device == "cpu":
            return "flex_attention has no backward on CPU"
        return "flex_attention has no dropout" if call.dropout else None
    reason = _half(name, call)
    if reason:
        return reason
    if name == "flash-attn-3":
        return _needs(call, name, (9, 0), (9, 9)) or (f"{name} has no dropout" if call.dropout else None)
    if name == "flash-attn-4":
        if call.capability and call.capability[0] in (10, 11) and call.head_size > 128 and call.head_size != 256:
            return f"{name} takes head sizes up to 128, and 256, on sm_{call.capability[0]}0; this one is {call.head_size}"
        return _needs(call, name, (9, 0)) or (f"{name} has no dropout" if call.dropout else None)
    if name == "flash-attn-2":
        return _needs(call, name, (8, 0))
    if name == "transformer-engine":
        return _needs(call, name, (8, 0)) or (f"{name} returns no log-sum-exp" if call.return_lse else None)
    if name == "varlen":
        if not call.packed:
            return "torch.nn.attention.varlen serves packed sequences; dense ones are scaled_dot_product_attention's"
        return _needs(call, name, (8, 0)) or (f"{name} has no dropout" if call.dropout else None)
    raise KeyError(name)


def choose_for(call: Call, backend: str = "auto", *, partial: bool = False) -> Choice:
    """What serves `call`: the best installed library that can, or the one named.

    Args:
        partial: only libraries that give forward and backward of a part of the keys (ring attention).
    Raises:
        MissingBackend: the one named is unknown, not installed, or cannot do this call; the message says which and why.
    """
    rows = {row.name: row for row in ops()["attention"]}
    order = list(rows)
    if call.device == "cuda" and call.packed:  # otherwise packed sequences are a loop over them, with their lengths on the host
        order.remove("flex")
        order.insert(order.index("torch"), "flex")
    if backend not in ("auto", *rows):
        raise MissingBackend("attention", backend, f"unknown here; there are: {', '.join(rows)}")

    def why_not(name: str) -> str | None:
        if partial and name in ("transformer-engine", "varlen", "flex"):
            return f"{name} does not give the parts that ring attention merges"
        return rows[name].probe(call.device) or refusal(name, call)

    if backend != "auto":
        reason = why_not(backend)
        if reason is not None:
            missing = rows[backend].probe(call.device) is not None
            raise MissingBackend("attention", backend, reason, rows[backend].install if missing else "")
    chosen = backend if backend != "auto" else next(name for name in order if why_not(name) is None)
    others = tuple((name, why_not(name) or f"can serve, but {chosen} " + ("is preferred" if backend == "auto" else "was asked for"))
                   for name in order if name != chosen)
    return Choice("attention", chosen, rows[chosen].reason, others)


@cache
def _serving(backend: str, device: str, index: int | None, dtype: torch.dtype, head_size: int, packed: bool, mask: bool, dropout: bool,
             return_lse: bool, grad: bool, partial: bool) -> str:
    capability = torch.cuda.get_device_capability(index) if device == "cuda" and torch.cuda.is_available() else None
    call = Call(device, dtype, head_size, capability, packed, mask, dropout, return_lse, grad)
    return choose_for(call, backend, partial=partial).backend


def _constant(*call) -> str:
    return _serving(*call)


_constant._dynamo_marked_constant = True  # torch.compiler.assume_constant_result does this and imports Dynamo for it: 2 s of every start


def serving(backend: str, q: Tensor, *, packed: bool, mask: bool, dropout: bool = False, return_lse: bool = False, grad: bool = False,
            partial: bool = False) -> str:
    """The name of what serves these tensors: looked up once for each kind of call, a constant under `torch.compile`."""
    if q.is_cpu and backend in ("auto", "torch"):  # what nearly every call on CPU asks, answered without a look-up
        return "torch"
    device, size = q.device, q.shape[-1]
    if not torch.compiler.is_compiling():
        return _serving(backend, device.type, device.index, q.dtype, size, packed, mask, dropout, return_lse, grad, partial)
    # A size that the compiler holds for dynamic becomes a number by comparison; where it is none of these, no fused kernel takes it either.
    size = next((n for n in range(8, 257, 8) if n == size), 1)
    return _constant(backend, device.type, device.index, q.dtype, size, packed, mask, dropout, return_lse, grad, partial)
