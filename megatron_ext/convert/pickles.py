"""Pickles taken apart without running them: Megatron-LM and torch keep what a checkpoint holds in them.

A pickle names classes and functions and says what they are called with. Here no name is ever looked up: each becomes an inert stand-in that keeps its name, what it was
called with and its state. Containers of the standard library that are plain data (OrderedDict, Size, ...) become plain data.
"""
import io
import pickle
import zipfile
from pathlib import Path

PLAIN = {("collections", "OrderedDict"): dict, ("builtins", "set"): set, ("builtins", "frozenset"): frozenset, ("torch", "Size"): tuple}


class Inert:
    """What a pickle asked for. Attributes: `args` of the call that made it, its `state`, and what that state sets."""

    name = ""
    args: tuple = ()
    state: object = None

    def __init__(self, *args, **kwargs):
        self.args = args

    def __setstate__(self, state) -> None:
        self.state = state
        # Dataclasses with slots give (dictionary, slots).
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.__dict__.update({key: value for key, value in part.items() if isinstance(key, str)})

    def __setitem__(self, key, value) -> None:  # subclasses of dict and list
        self.__dict__.setdefault("items", {})[key] = value

    def append(self, value) -> None:
        self.__dict__.setdefault("items", {})[len(self.__dict__.get("items", {}))] = value

    def extend(self, values) -> None:
        for value in values:
            self.append(value)


class _Reader(pickle.Unpickler):
    def __init__(self, *args):
        super().__init__(*args)
        self._known: dict[tuple[str, str], type] = {}

    def find_class(self, module, name):
        if (module, name) in PLAIN:
            return PLAIN[module, name]
        key = (module, name)
        return self._known.setdefault(key, type("Inert", (Inert,), {"name": f"{module}.{name}"}))

    def persistent_load(self, pid):
        return Inert(pid)


def loads(content: bytes) -> object:
    """The content of a pickle. Raises ValueError for what is none."""
    try:
        return _Reader(io.BytesIO(content)).load()
    except (pickle.UnpicklingError, EOFError, IndexError, KeyError, TypeError, AttributeError, ValueError, UnicodeDecodeError, MemoryError, OverflowError,
            RecursionError) as error:
        raise ValueError(f"is no pickle that can be read ({type(error).__name__}: {str(error)[:80]})") from None


def load_torch(path: Path) -> object:
    """The content of a file of `torch.save`; tensors in it are stand-ins. Raises ValueError."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            return loads(archive.read(name))
    except (zipfile.BadZipFile, StopIteration, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"is no file of torch.save ({type(error).__name__})") from None
