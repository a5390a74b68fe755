"""Which node holds which ranks, and with them which coordinates of the layout. No torch.

srun (--distribution=block) and torchrun number the ranks node by node, and the grid counts tensor parallelism fastest (`config/geometry.py`), so a
node of T ranks holds ranks n T ... n T + T - 1. A kind of parallelism stays within a node when no group of it has ranks on two nodes.
"""
from collections.abc import Iterator

from megatron_ext.config import stages
from megatron_ext.config.cluster import on_nodes, tasks_per_node
from megatron_ext.config.geometry import Grid
from megatron_ext.config.placement import placed
from megatron_ext.config.schema import Config

KINDS = ("tp", "cp", "dp", "pp")
SHOWN = 8  # nodes printed before the middle is left out


def crossing(grid: Grid, tasks: int) -> tuple[str, ...]:
    """The kinds of parallelism that have a group on more than one node of `tasks` ranks."""
    found, stride = [], 1
    for kind in KINDS:
        size = getattr(grid, kind)
        # A group is ranks first + i stride, where first runs over all ranks with coordinate 0 of this kind.
        firsts = (rank for rank in range(grid.ranks) if grid.coordinates(rank)[kind] == 0)
        if size > 1 and any(first // tasks != (first + (size - 1) * stride) // tasks for first in firsts):
            found.append(kind)
        stride *= size
    return tuple(found)


def lines(config: Config) -> list[str]:
    """The placement for people: a sentence for each model that lies otherwise than the ones before, then a line a node for the policy."""
    cluster, tasks, found, seen = config.cluster, tasks_per_node(config.cluster), [], {}
    whole = on_nodes(config)
    for role in stages.models(config):
        grid = Grid.of(placed(whole, role))
        seen.setdefault(grid, []).append(role)
    for grid, roles in seen.items():
        across = crossing(grid, tasks)
        parts = [f"{kind.upper()} {size} {'across' if kind in across else 'within'} nodes" for kind in KINDS if (size := getattr(grid, kind)) > 1]
        who = f"{', '.join(roles)}: " if len(seen) > 1 else ""
        found.append(f"{who}{grid.ranks} ranks = {cluster.nodes} node{'s' if cluster.nodes > 1 else ''} x {tasks}" + "".join(f"; {part}" for part in parts))
    found += _nodes(next(iter(seen)), cluster.nodes, tasks)
    if cluster.min_nodes is not None and cluster.min_nodes < cluster.nodes:
        fewest = Grid.of(on_nodes(config, cluster.min_nodes))
        found.append(f"starts and restarts on {cluster.min_nodes} or more of them: DP {fewest.dp} at least, the global batch and the losses stay")
    return found


def notes(config: Config) -> list[str]:
    """What works and is slow."""
    tasks, found = tasks_per_node(config.cluster), []
    for role in stages.models(config):
        across = crossing(Grid.of(placed(on_nodes(config), role)), tasks)
        if "tp" in across:
            found.append(f"tensor parallelism of the {role} reaches over nodes and talks in every layer (cluster.cross_node_tp=true)")
        if "cp" in across:
            size = config.parallel.tp * config.parallel.cp
            found.append(f"context parallelism of the {role} reaches over nodes: tp x cp = {size} is more than the {tasks} ranks of a node, or does "
                         "not divide them")
    return found


def _nodes(grid: Grid, nodes: int, tasks: int) -> Iterator[str]:
    shown = range(nodes) if nodes <= SHOWN else [*range(SHOWN // 2), None, *range(nodes - SHOWN // 2, nodes)]
    rows = []
    for node in shown:
        if node is None:
            rows.append(["..."])
            continue
        ranks = range(node * tasks, (node + 1) * tasks)
        held = [grid.coordinates(rank) for rank in ranks]
        rows.append([f"node {node}", f"ranks {_span(ranks)}", *(f"{kind} {_span([one[kind] for one in held])}" for kind in reversed(KINDS)
                                                               if getattr(grid, kind) > 1)])
    widths = [max((len(row[column]) for row in rows if column < len(row)), default=0) for column in range(max(map(len, rows)))]
    for row in rows:
        yield ("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False))).rstrip()


def _span(numbers) -> str:
    """The distinct numbers, those in a row as first-last: "0-3", "0,2"."""
    found: list[list[int]] = []
    for number in sorted(set(numbers)):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in found)
