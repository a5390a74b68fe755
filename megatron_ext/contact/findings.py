"""What is asked of a node, and what falls short of it. Pure."""
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What is asked of a node. None = nothing.

    Attributes:
        gpus: of a node.
        gemm_share, pair_share: of the others'. gemm_floor: 10^12 operations a second; pair_floor: GB/s of a pair across nodes.
        disk_floor: MB/s written; free_gib: of the run directory.
    """

    gpus: int | None = None
    gemm_share: float = 0.85
    gemm_floor: float | None = None
    pair_share: float = 0.6
    pair_floor: float | None = None
    disk_floor: float | None = None
    free_gib: float | None = None


@dataclass(frozen=True)
class Problem:
    """`node`: whose; None where that cannot be said. `exclude`: whether the run would be better off without it."""

    node: str | None
    what: str
    remedy: str
    exclude: bool = True


def figure(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
