"""Bytes that a layer keeps as its own state (Transformer Engine's `_extra_state`), which that layer may unpickle when it gets them back.

They are the one way left from a checkpoint to a pickle, so they are looked through first: a pickle of plain values passes, one that
asks for any class or function is refused by its name, and what is not a pickle is only bytes.
"""
import io
import pickle
import tarfile
import zipfile

import torch

BYTES = (bytes, bytearray, io.BytesIO)


class Hostile(ValueError):
    """A pickle that asks for a class or function."""


class _Plain(pickle.Unpickler):
    def find_class(self, module, name):
        raise Hostile(f"a pickle that asks for {module}.{name}")

    def persistent_load(self, pid):
        raise Hostile("a pickle that asks for a persistent object")


def inspect(value: object) -> None:
    """Looks through every byte string, and every tensor of bytes, in a nested value. Raises Hostile. Calls nothing."""
    if isinstance(value, BYTES):
        _bytes(value.getvalue() if isinstance(value, io.BytesIO) else bytes(value))
    elif isinstance(value, torch.Tensor) and value.dtype == torch.uint8:
        _bytes(value.numpy().tobytes())
    elif isinstance(value, dict):
        for pair in value.items():
            inspect(pair)
    elif isinstance(value, (list, tuple)):
        for item in value:
            inspect(item)


def _bytes(data: bytes) -> None:
    if zipfile.is_zipfile(io.BytesIO(data)):  # torch.save
        try:
            torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: BLE001 - whatever it does not take, and in whatever way
            raise Hostile(f"what torch.load refuses with weights_only ({str(error).splitlines()[0][:120]})") from None
        return
    if tarfile.is_tarfile(io.BytesIO(data)):
        raise Hostile("a torch file of the tar era")
    stream = io.BytesIO(data)
    try:
        while stream.tell() < len(data):  # older torch files are several pickles in a row
            _Plain(stream).load()
    except Hostile:
        raise
    except Exception:  # noqa: BLE001, S110 - not a pickle, or a broken one: nobody can load it either
        pass
