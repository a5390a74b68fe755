"""Which implementation serves an op on this machine, and why nothing better does.

An op has backends, best first. A backend says by itself whether it can serve here: its probe returns None, or one sentence on why not.
`choose(op)` takes the first that can. A backend that is asked for by name and cannot serve is an error with the line that installs it,
never a silent fallback. To add one: a probe, and a row in `ops()`. Probes look (`find_spec`, torch's own flags) and import nothing heavy.
"""
from collections.abc import Callable, Mapping
from dataclasses import dataclass


class MissingBackend(ValueError):
    """A backend that was asked for cannot serve the op here: `.op`, `.backend`, `.reason`, `.install` (a command, or "")."""

    def __init__(self, op: str, backend: str, reason: str, install: str = ""):
        self.op, self.backend, self.reason, self.install = op, backend, reason, install
        super().__init__(f"{backend} cannot serve {op}: {reason}" + (f"; install it with: {install}" if install else ""))


@dataclass(frozen=True)
class Backend:
    """One implementation of an op: why it is good, a probe (None = it can serve here, else why not), and how it is installed."""

    name: str
    reason: str
    probe: Callable[[], str | None]
    install: str = ""


@dataclass(frozen=True)
class Choice:
    """The backend that serves `op`, why, and for each of the others (name, why not)."""

    op: str
    backend: str
    reason: str
    alternatives: tuple[tuple[str, str], ...]


def _torch_has_fused_adamw() -> str | None:
    import torch

    return None if hasattr(torch, "_fused_adamw_") else f"torch {torch.__version__} has no fused AdamW kernel (2.4 and later have)"


def ops() -> dict[str, tuple[Backend, ...]]:
    """Every op of the project with its backends, best first."""
    return {
        "adamw": (
            Backend("torch", "torch's fused multi-tensor kernel: one pass over weights, gradients and moments on CPU and CUDA",
                    _torch_has_fused_adamw, "pip install 'torch>=2.4'"),
        ),
    }


def choose(op: str, backend: str = "auto", *, table: Mapping[str, tuple[Backend, ...]] | None = None) -> Choice:
    """What serves `op`.

    Args:
        op: a key of `ops()`.
        backend: "auto" for the best that can serve here, or the name of one.
        table: other ops than the project's own.

    Raises:
        MissingBackend: none can serve, or the one asked for cannot, or it is unknown for this op.
        KeyError: unknown op.
    """
    backends = (ops() if table is None else table)[op]
    named = {b.name: b for b in backends}
    if backend not in ("auto", *named):
        raise MissingBackend(op, backend, f"unknown here; there are: {', '.join(named)}")
    why_not = {b.name: b.probe() for b in backends}
    if backend == "auto":
        chosen = next((b for b in backends if why_not[b.name] is None), None)
        if chosen is None:
            raise MissingBackend(op, "any backend", "; ".join(f"{b.name}: {why_not[b.name]}" for b in backends), backends[-1].install)
    else:
        chosen = named[backend]
        if why_not[backend] is not None:
            raise MissingBackend(op, backend, why_not[backend], chosen.install)
    others = tuple((b.name, why_not[b.name] or f"can serve, but {chosen.name} " + ("is preferred" if backend == "auto" else "was asked for"))
                   for b in backends if b is not chosen)
    return Choice(op, chosen.name, chosen.reason, others)
