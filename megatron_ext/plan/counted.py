"""Dry runs beside the plan: what was counted on ranks, and what was said of them."""
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from megatron_ext.config.geometry import Grid
from megatron_ext.config.schema import Config
from megatron_ext.errors import UserError
from megatron_ext.plan.activations import activations
from megatron_ext.plan.buffers import State, state
from megatron_ext.plan.hardware import GIB
from megatron_ext.plan.trace import Counted, dry_run


@dataclass(frozen=True)
class Compared:
    """A rank: counted, and planned (bytes of parameters, gradients and optimizer, and the activations' peak that a trace can see)."""

    counted: Counted
    planned: State
    activations: float

    @property
    def exact(self) -> bool:
        """Whether parameters, gradients and optimizer are the same to the byte."""
        one, two = self.counted, self.planned
        return (one.parameters, one.weights, one.gradients, one.optimizer) == (two.parameters, two.weights, two.gradients, two.optimizer)

    @property
    def error(self) -> float:
        """Of the activations' peak, as a share of what was counted."""
        return self.activations / self.counted.activations - 1

    def as_dict(self) -> dict[str, object]:
        return asdict(self) | {"exact": self.exact, "error": self.error}


def compare(config: Config, vocab: int, ranks: Sequence[int] = ()) -> list[Compared]:
    """Dry-runs `ranks` (none: the first of the first and of the last pipeline stage) and plans them."""
    grid = Grid.of(config)
    wanted = list(ranks) or sorted({0, grid.rank(pp=grid.pp - 1)})
    if wrong := [rank for rank in wanted if not 0 <= rank < grid.ranks]:
        raise UserError("--rank", wrong[0], f"there are ranks 0 to {grid.ranks - 1}")
    found = []
    for rank in wanted:
        one = dry_run(config, rank, vocab)
        said = activations(config, grid.coordinates(rank)["pp"], vocab, one.micro_batches)
        found.append(Compared(one, state(config, rank, vocab), said.traced))
    return found


def page(rows: Sequence[Compared]) -> str:
    """For people."""
    lines = []
    for row in rows:
        one = row.counted
        lines += [
            (f"rank {one.rank}: built and stepped in {one.seconds:.1f} s ({one.operations:,} operations, {one.micro_batches} micro-batches); parameters, "
             f"gradients and optimizer {'are as planned, to the byte' if row.exact else 'DIFFER from the plan'}"),
            (f"  {one.parameters:,} parameters; GiB: weights {one.weights / GIB:.3f}, gradients {one.gradients / GIB:.3f}, optimizer "
             f"{one.optimizer / GIB:.3f}, activations {one.activations / GIB:.3f} (planned {row.activations / GIB:.3f}, {100 * row.error:+.1f} %)"),
        ]
        lines += [f"  {c.group:<10} {c.kind:<15} {c.calls:>6,} calls  {c.bytes / GIB:9.3f} GiB" for c in one.collectives if c.bytes]
    return "\n".join(lines)
