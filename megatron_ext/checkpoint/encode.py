"""Small state as JSON: what the optimizer, the loss scaler and layers keep beside their sharded tensors. Exact, and closed: the
types below and no others, so that reading can build nothing else.

JSON's own values stand for themselves; the rest is {"~": type, "v": value}. Floats keep every bit (shortest representation that
reads back equal).
"""
import base64
import io
import math

import torch

from megatron_ext.checkpoint.manifest import ITEM_BYTES

TAG = "~"


def encode(value: object) -> object:
    """JSON-able form. Raises TypeError naming a type that has none."""
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else _tagged("float", repr(value))
    if type(value) is list:
        return [encode(item) for item in value]
    if isinstance(value, dict):
        if all(type(key) is str for key in value) and TAG not in value:
            return {key: encode(item) for key, item in value.items()}
        return _tagged("dict", [[encode(key), encode(item)] for key, item in value.items()])
    if isinstance(value, torch.Size):
        return _tagged("size", list(value))
    if isinstance(value, tuple):
        return _tagged("tuple", [encode(item) for item in value])
    if isinstance(value, torch.dtype):
        return _tagged("dtype", name_of(value))
    if isinstance(value, torch.Tensor):
        return _tagged("tensor", {"dtype": name_of(value.dtype), "shape": list(value.shape), "data": _text(bytes(raw(value)))})
    if isinstance(value, (bytes, bytearray)):
        return _tagged("bytes", _text(bytes(value)))
    if isinstance(value, io.BytesIO):
        return _tagged("stream", _text(value.getvalue()))
    if type(value).__module__ == "numpy" and hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return encode(value.item())
    raise TypeError(f"a {type(value).__module__}.{type(value).__qualname__} cannot be kept in a checkpoint")


def decode(value: object) -> object:
    """The inverse of `encode`. Raises ValueError for anything that `encode` does not make."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if TAG not in value:
        return {key: decode(item) for key, item in value.items()}
    try:
        return _DECODERS[value[TAG]](value["v"])
    except (KeyError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
        raise ValueError(f"not a value of type {str(value[TAG])[:40]!r} ({str(error)[:80]})") from None


def name_of(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in ITEM_BYTES:
        raise TypeError(f"tensors of {dtype} cannot be kept in a checkpoint")
    return name


def dtype_of(name: str) -> torch.dtype:
    if name not in ITEM_BYTES:
        raise ValueError(f"unknown dtype {name!r}")
    return getattr(torch, name)


def raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, C-contiguous; without a copy where it lies so on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def _tensor(value: dict) -> torch.Tensor:
    dtype, shape = dtype_of(value["dtype"]), [int(size) for size in value["shape"]]
    data = _bytes(value["data"])
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError("a tensor's bytes do not fit its shape")
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)


def _tagged(kind: str, value: object) -> dict:
    return {TAG: kind, "v": value}


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


_DECODERS = {
    "float": float,
    "dict": lambda pairs: {decode(key): decode(item) for key, item in pairs},
    "size": lambda sizes: torch.Size(sizes),
    "tuple": lambda items: tuple(decode(item) for item in items),
    "dtype": dtype_of,
    "tensor": _tensor,
    "bytes": _bytes,
    "stream": lambda text: io.BytesIO(_bytes(text)),
}


def differences(ours: object, theirs: object, name: str = "") -> list[str]:
    """`key: a / b` for each leaf in which two JSON values differ."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = sorted(ours.keys() | theirs.keys())
        return [line for key in keys for line in differences(ours.get(key), theirs.get(key), f"{name}.{key}".lstrip("."))]
    if isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)) and list(ours) == list(theirs):
        return []
    return [] if ours == theirs else [f"{name or 'value'}: {ours} / {theirs}"]
