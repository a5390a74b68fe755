"""A layout is a value: how a model's ranks are arranged. Several layouts may live on the same ranks, or on parts of them.

Ranks are numbered as in Megatron: tensor parallel fastest, then context, data, and pipeline:
    position = tp + TP (cp + CP (dp + DP pp)).
"""
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Layout:
    """Sizes of each kind of parallelism, and the global ranks it spans.

    Attributes:
        tp, pp, cp: ranks of one tensor-, pipeline-, context-parallel group.
        vpp: model chunks a pipeline rank, or None (no interleaving).
        sp: sequence parallelism over the tensor-parallel ranks.
        ranks: global ranks, ascending (torch numbers the members of a group so), in the order of the formula above.
    """

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    cp: int = 1
    sp: bool = False
    ranks: tuple[int, ...] = field(default=(0,))

    def __post_init__(self):
        if list(self.ranks) != sorted(set(self.ranks)):
            raise ValueError(f"the ranks of a layout must ascend, got {self.ranks}")
        if len(self.ranks) % (self.tp * self.pp * self.cp):
            raise ValueError(f"{len(self.ranks)} ranks do not divide into tp={self.tp} x pp={self.pp} x cp={self.cp}")

    @property
    def dp(self) -> int:
        return len(self.ranks) // (self.tp * self.pp * self.cp)

    @property
    def grid(self) -> np.ndarray:
        """[PP, DP, CP, TP] global ranks."""
        return np.array(self.ranks).reshape(self.pp, self.dp, self.cp, self.tp)

    def __str__(self) -> str:
        parts = [f"{name}{size}" for name, size in (("TP", self.tp), ("PP", self.pp), ("CP", self.cp), ("DP", self.dp)) if size > 1]
        text = " x ".join(parts) or "one rank"
        return text + (f", {self.vpp} chunks a stage" if self.vpp else "") + (", sequence parallel" if self.sp else "")
