"""Dynamo is imported by whoever compiles, not by whoever calls an op or makes an optimizer.

torch keeps Dynamo out of registered ops and of an optimizer's book-keeping by `torch._disable_dynamo`, which imports Dynamo at the first call: 2 processor
seconds at the start of every rank (benchmarks/bench_import.py). Nobody compiles in a process that has not imported it, so there is nothing to keep out until
then; from then on torch's own guard serves, made at the first call as ever.

torch's wrapper looks for its guard in the attribute `__dynamo_disable` of the function; `patient` puts one there that waits. Where a later torch looks
elsewhere nothing changes but the seconds (tests/test_start_up.py counts modules).
"""
import sys
from collections.abc import Callable

import torch

_guard = torch._disable_dynamo


def patient(function: Callable, recursive: bool = True) -> Callable:
    """`function`, whose guard against Dynamo is made when Dynamo is there."""

    def call(*args, **kwargs):
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        function.__dynamo_disable = torch._dynamo.disable(function, recursive, wrapping=False)
        return function.__dynamo_disable(*args, **kwargs)

    function.__dynamo_disable = call
    return function


def _disable_dynamo(function: Callable | None = None, recursive: bool = True) -> Callable:
    return _guard(function if function is None else patient(function, recursive), recursive)


def install() -> None:
    """For every op that is registered from now on, and for torch's optimizers."""
    if torch._disable_dynamo is not _guard:
        return
    torch._disable_dynamo = _disable_dynamo
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        inner = getattr(getattr(torch.optim.Optimizer, name), "__wrapped__", None)
        if inner is not None and not hasattr(inner, "__dynamo_disable"):
            patient(inner)
