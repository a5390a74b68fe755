"""megatron-core imported in a quarter of its time: every rank of every run waits for it, and a suite of tests a few hundred times.

Of 7 processor seconds, 5 went into what few runs use (benchmarks/bench_import.py): `@jit_fuser` is `torch.compile`, which imports Dynamo and Inductor the
moment it decorates; and wandb is imported to learn whether it is there. So while `megatron.core` is imported `torch.compile` decorates without compiling,
which is done at the first call, as ever; and wandb is not there (megatron_ext/observe/track.py imports it where a run wants it).

`install` runs before any module of this package does, so whoever imports one before megatron-core gets this. It imports nothing itself.
"""
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial, wraps

CORE = "megatron.core"


def install() -> None:
    """The next import of megatron-core in this process is the quick one. Harmless when it has been imported, and when called again."""
    if CORE not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def deferred(function: Callable | None = None, /, **options) -> Callable:
    """`torch.compile(function, **options)`, made at the first call. Inside a graph that is being compiled it is the function itself, as there."""
    if function is None:
        return partial(deferred, **options)
    compiled = None

    @wraps(function)
    def call(*args, **kwargs):
        import torch

        nonlocal compiled
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if compiled is None:
            compiled = torch.compile(function, **options)
        return compiled(*args, **kwargs)

    return call


@contextmanager
def _lean():
    import torch

    hide = "wandb" not in sys.modules
    if hide:
        sys.modules["wandb"] = None  # ImportError, as where it is not installed
    compile_now, torch.compile = torch.compile, deferred
    try:
        yield
    finally:
        torch.compile = compile_now
        if hide:
            del sys.modules["wandb"]


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader):
        self.loader = loader

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module) -> None:
        module.__spec__.loader = module.__loader__ = self.loader  # nothing of ours stays behind
        with _lean():
            self.loader.exec_module(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        if name != CORE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec
