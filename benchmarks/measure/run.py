"""Measures a case: errors first, then memory and times, each provider on its own feet."""
import contextlib
import gc
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from measure import errors, machine, memory, table, timing
from measure.case import MODES, Built, Case, NotInstalled, short

COPY = "copy, beside the providers"


@dataclass(frozen=True)
class Run:
    """What holds for all cases of a run."""

    device: torch.device
    budget: timing.Budget
    copy: timing.Copy
    columns: Mapping[str, object]
    modes: Sequence[str] = MODES
    providers: Sequence[str] = ()


def reason(error: BaseException) -> str:
    """Why a provider has no numbers, in one line."""
    text = str(error).strip()
    if isinstance(error, NotInstalled):
        return text
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        return "out of memory"
    line = text.splitlines()[0] if text else ""
    return f"failed: {type(error).__name__}" + (f": {line[:200]}" if line else "")


def measure(case: Case, run: Run) -> list[dict[str, str]]:
    """Every provider in every mode. Never raises for what a provider does."""
    names = [name for name in case.providers if not run.providers or name in run.providers]
    torch._dynamo.reset()  # compiled code of other shapes counts towards dynamo's limit
    found: dict[tuple[str, str], dict[str, object]] = {}
    failed: dict[str, str] = {}
    judged = _errors(case, names, run, failed)
    # On a GPU one at a time, since memory is the limit; on a CPU in turns, since other processes are.
    alive = [name for name in names if name not in failed]
    for group in ([[name] for name in alive] if run.device.type == "cuda" else [alive]):
        found |= _timed(case, group, run, failed)
    rows = []
    for mode in [m for m in MODES if m in case.modes and m in run.modes]:
        if mode != "forward" and case.differentiable == ():
            continue
        base = found.get(("eager", mode), {}).get("times")
        for name in names:
            values = {"op": case.op, "mode": mode, "shape": case.shape, "dtype": short(case.dtype), "provider": name, **run.columns}
            values |= judged.get((name, mode), {})
            got = dict(found.get((name, mode), {"note": failed.get(name, "")}))
            times, copy = got.pop("times", None), got.pop("copy", None)
            if times:
                got |= figures(case, mode, times, base, copy)
            rows.append(table.row(**{**values, **got}))
    return rows


def figures(case: Case, mode: str, times: Sequence[float], base: Sequence[float] | None, copy: float) -> dict[str, object]:
    """The columns that follow from the times (seconds a call, one a turn) and from the copy's bytes a second in the same turns."""
    middle = statistics.median(times)
    moved, computed = case.amount("bytes", mode), case.amount("flops", mode)
    rate = timing.bandwidth(moved, middle) if moved else None
    return {
        **{f"p{p}_ms": 1e3 * timing.percentile(times, p / 100) for p in (20, 50, 80)},
        "time_over_eager": timing.ratio_in_turns(times, base) if base else None,
        "gb_per_s": rate / 1e9 if rate else None, "copy_gb_per_s": copy / 1e9,
        "share_of_copy": rate / copy if rate and case.memory_bound else None,
        "tflops": computed / middle / 1e12 if computed else None,
    }


def _provider(case: Case, name: str) -> Callable:
    given = case.providers[name]
    return given.build() if isinstance(given, Built) else given


def _cleared(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _errors(case: Case, names: Sequence[str], run: Run, failed: dict[str, str]) -> dict[tuple[str, str], dict[str, object]]:
    """The error columns of each provider and mode; providers that cannot run at all go into `failed`."""
    judged: dict[tuple[str, str], dict[str, object]] = {}
    truth = None
    try:
        if case.reference is not None:
            truth = errors.truth(case.reference, lambda: case.inputs(run.device), case.differentiable)
    except Exception as error:  # noqa: BLE001 the times are worth having without the errors
        print(f"{case.op} {case.shape}: no error columns, the reference {reason(error)}", file=sys.stderr)
    for name in names:
        try:
            _cleared(run.device)
            function = _provider(case, name)
            if truth is None:
                continue
            got = errors.results(function, case.inputs(run.device), case.differentiable, truth.plain.douts)
            forward = errors.worst(got.outputs, truth.exact.outputs, truth.plain.outputs)
            backward = errors.worst(got.grads, truth.exact.grads, truth.plain.grads)
        except Exception as error:  # noqa: BLE001
            failed[name] = reason(error)
            continue
        worst = max((w for w in (forward, backward) if w), key=lambda w: w[2], default=None)
        for mode, values in (("forward", forward), ("backward", backward), ("both", worst if backward else None)):
            if values:
                judged[name, mode] = dict(zip(("error", "error_of_torch", "error_ratio"), values))
            if [o.shape for o in got.outputs] != [o.shape for o in truth.exact.outputs]:
                judged.setdefault((name, mode), {})["note"] = "other outputs than the reference's; those of the same place and shape were compared"
    return judged


def _call(function: Callable, inputs: Sequence[object], mode: str) -> Callable[[], object] | None:
    """The call that is timed; None where there is nothing to differentiate."""
    if mode == "forward":
        return lambda: function(*inputs)

    def outputs() -> list[Tensor]:
        return [o for o in errors.outputs_of(function(*inputs)) if o.requires_grad]

    graded, wanted = outputs(), errors.wanted_of(inputs)
    if not graded or not wanted:
        return None
    douts = errors.douts_for(graded)
    if mode == "backward":
        return lambda: torch.autograd.grad(graded, wanted, douts, retain_graph=True, allow_unused=True)
    return lambda: torch.autograd.grad(outputs(), wanted, douts, allow_unused=True)


def _timed(case: Case, names: Sequence[str], run: Run, failed: dict[str, str]) -> dict[tuple[str, str], dict[str, object]]:
    """Times and peaks of these providers, in turns."""
    found: dict[tuple[str, str], dict[str, object]] = {}
    ready: dict[str, tuple[Callable, list]] = {}
    for name in names:
        try:
            ready[name] = _provider(case, name), errors.leaves(case.inputs(run.device), case.differentiable)
        except Exception as error:  # noqa: BLE001
            failed[name] = reason(error)
    for mode in [m for m in MODES if m in case.modes and m in run.modes]:
        try:
            found |= {(name, mode): values for name, values in _timed_mode(mode, ready, run).items()}
        except Exception as error:  # noqa: BLE001 a broken CUDA context fails every call from here on, the copy's and the clock's too
            found |= {(name, mode): {"note": reason(error)} for name in ready}
        with contextlib.suppress(Exception):
            _cleared(run.device)
    return found


def _timed_mode(mode: str, ready: Mapping[str, tuple[Callable, list]], run: Run) -> dict[str, dict[str, object]]:
    """name -> its times, peak and clocks, or a note. What a mode holds (graphs, outputs) dies with this call."""
    found: dict[str, dict[str, object]] = {}
    calls, peaks = {}, {}
    for name, (function, inputs) in ready.items():
        try:
            call = _call(function, inputs, mode)
            if call is None:
                found[name] = {"note": "no gradient"}
                continue
            call()
            timing.release()
            peaks[name] = memory.peak_bytes(call, run.device) / 1e6
            calls[name] = call
        except Exception as error:  # noqa: BLE001
            found[name] = {"note": reason(error)}
    if calls:
        turns = timing.seconds_in_turns({**calls, COPY: run.copy}, run.device, run.budget, lambda: machine.clocks(run.device))
        found |= {name: {"note": reason(error)} for name, error in turns.failures.items() if name != COPY}
        if COPY in turns.failures:
            raise turns.failures[COPY]
        copy = run.copy.bandwidth(turns.times.pop(COPY))
        found |= {name: {"times": times, "copy": copy, "peak_mb": peaks[name], **turns.while_busy} for name, times in turns.times.items()}
    return found
