"""What a benchmark says of its op: the inputs, who competes, the definition, and what must be moved and computed."""
import importlib
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch._functorch import config as functorch

MODES = ("forward", "backward", "both")
SEED = 20


class NotInstalled(Exception):
    """A provider whose library is not here."""


@dataclass(frozen=True)
class Built:
    """A provider that is made when it is first needed, anew for each case."""

    build: Callable[[], Callable]


def compiled(function: Callable, **options: object) -> Built:
    """`torch.compile(function)`, for the shapes of one case (no dynamic shapes), compiled when it is first called."""
    def build() -> Callable:
        # backward is called many times over one graph, so its saved tensors are not the compiler's to reuse
        functorch.donated_buffer = False
        # the cache on disk knows nothing of our registered ops: after a change of their outputs it would serve code for the old ones
        torch.compiler.config.force_disable_caches = True
        warnings.filterwarnings("ignore", message=".*force_disable_caches")
        return torch.compile(function, **{"dynamic": False, **options})

    return Built(build)


def optional(module: str, builder: Callable) -> Built:
    """A provider from a library that may be absent: `builder(module)` (or `builder()`) returns the function of the inputs."""
    def build() -> Callable:
        try:
            found = importlib.import_module(module)
        except ImportError as error:
            missing = (error.name or module).split(".")[0] == module.split(".")[0]
            raise NotInstalled("not installed" if missing else f"{module} cannot be imported: {error}") from None
        return builder(found) if inspect.signature(builder).parameters else builder()

    return Built(build)


@dataclass(frozen=True)
class Case:
    """One op at one shape in one dtype.

    Attributes:
        make: (generator, device) -> the inputs; called once a provider, with a generator of the same seed each time.
        providers: name -> a function of the inputs, or `compiled(...)`, `optional(...)`. "eager" is what the ratios are taken to.
        reference: the definition, a function of the inputs, run in fp64 for the error columns. None leaves them blank.
        bytes_forward, bytes_backward: what the op must move, by the traffic model of its docstring.
        flops_forward, flops_backward: what it must compute.
        memory_bound: whether its share of the copy bandwidth is the figure of merit (else TFLOP/s).
        differentiable: which inputs get requires_grad; None = all floating ones, () = none (only `forward` is measured then).
        modes: which of `MODES` make sense.
    """

    op: str
    shape: str
    dtype: torch.dtype
    make: Callable[[torch.Generator, torch.device], Sequence[object]]
    providers: Mapping[str, Callable | Built]
    reference: Callable | None = None
    bytes_forward: float = 0
    bytes_backward: float = 0
    flops_forward: float = 0
    flops_backward: float = 0
    memory_bound: bool = True
    differentiable: Sequence[int] | None = None
    modes: Sequence[str] = MODES

    def inputs(self, device: torch.device) -> list[object]:
        return list(self.make(torch.Generator(device).manual_seed(SEED), device))

    def amount(self, kind: str, mode: str) -> float:
        """Bytes or flops ("bytes", "flops") of a mode."""
        forward, backward = getattr(self, f"{kind}_forward"), getattr(self, f"{kind}_backward")
        return {"forward": forward, "backward": backward, "both": forward + backward}[mode]


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
