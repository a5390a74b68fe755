"""Bus bandwidth of the collectives that training uses, in each group of a layout.

    python benchmarks/bench_collectives.py --ranks 4 --tp 2 [--cp 1] [--pp 1] [--backend nccl gloo] [--sizes 64K 1M 256M] [--quick] [--output DIR]
    torchrun --nproc-per-node 8 benchmarks/bench_collectives.py --tp 8          (or srun, one task a GPU)

Bus bandwidth as NCCL-tests defines it (github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md), for n ranks and S bytes in time t: S/t times
    all_reduce 2 (n-1)/n,    all_gather, reduce_scatter (n-1)/n,    p2p 1,
where S is the whole buffer: what all-reduce reduces, all-gather gives, reduce-scatter takes; p2p: every rank sends S bytes to the next rank of
its group while it receives as much from the previous one. All groups of a kind work at the same time, as they do in a step (TP2 on 8 ranks: four
pairs), and the slowest rank counts. Every result is compared with its exact value before it is timed; a wrong one is a row without numbers, and
exit code 1. Column `gb_per_s` is the bus bandwidth, `provider` the backend and the layout.
"""
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from harness import Sink, device_of, parser

ELEMENT = 4  # float32
SIZES = ("64K", "256K", "1M", "4M", "16M", "64M", "256M")
GROUPS = ("tp", "cp", "dp", "pp")
FACTORS: dict[str, Callable[[int], float]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n, "all_gather": lambda n: (n - 1) / n, "reduce_scatter": lambda n: (n - 1) / n, "p2p": lambda n: 1.0,
}


def bus_bandwidth(op: str, n: int, size: int, seconds: float) -> float:
    """Bytes a second."""
    return size / seconds * FACTORS[op](n)


def parse_size(text: str) -> int:
    """"64K" -> 65536; ValueError for what is no size."""
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in ("K", "M", "G") else (text, "")
    size = int(number) * {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[unit]
    if size < 1:
        raise ValueError
    return size


def show_size(size: int) -> str:
    return f"{size >> 20} MB" if size >= 1 << 20 and size % (1 << 20) == 0 else f"{size >> 10} KB" if size % 1024 == 0 else f"{size} bytes"


def options_of(argv: Sequence[str]):
    """The options, checked; ends with 2 for bad ones."""
    from megatron_ext.parallel.launch import launched_ranks
    from megatron_ext.parallel.layout import Layout

    made = parser("Measures the bus bandwidth of collectives in the groups of a layout.", dtype=False)
    made.add_argument("--ranks", type=int, help="started here, on this machine; not under torchrun or srun")
    for name in ("tp", "cp", "pp"):
        made.add_argument(f"--{name}", type=int, default=1)
    made.add_argument("--backend", nargs="+", choices=("nccl", "gloo"), help="default: nccl on GPUs, gloo on CPUs; both only where the ranks are started here")
    made.add_argument("--ops", nargs="+", choices=tuple(FACTORS), default=tuple(FACTORS))
    made.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS)
    made.add_argument("--sizes", nargs="+", metavar="SIZE", help="64K, 1M, ...")
    options = made.parse_args(argv)
    launched = launched_ranks(os.environ)
    options.launched, options.world = launched is not None, launched or options.ranks
    if options.world is None:
        made.error("argument --ranks: how many ranks are to be started? (torchrun and srun start them themselves)")
    if options.ranks and options.ranks != options.world:
        made.error(f"argument --ranks: {options.ranks}, but the launcher started {options.world}; leave it out")
    for name in ("world", "tp", "cp", "pp"):
        if getattr(options, name) < 1:
            made.error(f"argument --{'ranks' if name == 'world' else name}: {getattr(options, name)} is below 1")
    try:
        options.layout = Layout(tp=options.tp, cp=options.cp, pp=options.pp, ranks=tuple(range(options.world)))
    except ValueError as error:
        made.error(str(error))
    try:
        options.bytes = [parse_size(s) for s in options.sizes or (SIZES[:3:2] if options.quick else SIZES)]
    except ValueError:
        made.error(f"argument --sizes: {' '.join(options.sizes)} are not sizes such as 64K, 1M, 256M")
    options.kind = device_of(options, made.error).type
    options.backend = options.backend or ["nccl" if options.kind == "cuda" else "gloo"]
    if "nccl" in options.backend and options.kind != "cuda":
        made.error("argument --backend: nccl needs GPUs, and torch sees none here; use gloo")
    if options.launched and len(options.backend) > 1:
        made.error("argument --backend: ranks that were launched already can measure one; name nccl or gloo")
    return options


class Collective:
    """One op in this rank's group: buffers of `size` bytes in all, a call, and whether its result is right."""

    def __init__(self, op: str, group, size: int, device):
        import torch
        import torch.distributed as dist

        self.op, self.group, self.n, self.me = op, group, dist.get_world_size(group), dist.get_rank(group)
        each = max(1, size // ELEMENT // self.n)  # a size that n does not divide is rounded down
        self.count = each * self.n if op != "p2p" else size // ELEMENT
        part = each if op in ("all_gather", "reduce_scatter") else self.count
        self.index = torch.arange(self.count, device=device)
        self.source = self._values(self.me).clone()[: part if op == "all_gather" else self.count]
        self.target = self.source.clone() if op == "all_reduce" else torch.empty(
            part if op == "reduce_scatter" else self.count, dtype=torch.float32, device=device)
        self.each, self.dist = each, dist

    @property
    def bytes(self) -> int:
        return self.count * ELEMENT

    def _values(self, rank: int):
        return ((self.index + 17 * rank) % 251).float()  # sums over 65,000 ranks are exact

    def __call__(self) -> None:
        dist, group = self.dist, self.group
        if self.op == "all_reduce":
            dist.all_reduce(self.target, group=group)
        elif self.op == "all_gather":
            dist.all_gather_into_tensor(self.target, self.source, group=group)
        elif self.op == "reduce_scatter":
            dist.reduce_scatter_tensor(self.target, self.source, group=group)
        else:
            there, back = ((self.me + step) % self.n for step in (1, -1))
            for work in dist.batch_isend_irecv([
                dist.P2POp(dist.isend, self.source, dist.get_global_rank(group, there), group),
                dist.P2POp(dist.irecv, self.target, dist.get_global_rank(group, back), group),
            ]):
                work.wait()

    def expected(self):
        import torch

        if self.op == "p2p":
            return self._values((self.me - 1) % self.n)
        if self.op == "all_gather":
            return torch.cat([self._values(r)[: self.each] for r in range(self.n)])
        total = sum(self._values(r) for r in range(self.n))
        return total if self.op == "all_reduce" else total[self.me * self.each: (self.me + 1) * self.each]

    def is_right(self) -> bool:
        """Runs it once, on fresh buffers, and compares exactly."""
        self()
        right = bool((self.target == self.expected()).all())
        if self.op == "all_reduce":
            self.target.zero_()  # it is reduced in place again and again: zeros stay finite
        return right


def timed(call: Callable[[], None], device, seconds: float) -> list[float]:
    """Seconds a call, one entry a turn, of the slowest rank; the same number of turns on every rank."""
    import torch
    import torch.distributed as dist

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def turn(repeats: int) -> float:
        dist.barrier()
        synchronize()
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        synchronize()
        return (time.perf_counter() - begin) / repeats

    def slowest(values: list[float]) -> list[float]:
        found = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.tolist()

    turn(2)
    (once,) = slowest([turn(2)])
    turns = 5 if seconds < 0.5 else 11
    repeats = max(1, min(100, int(seconds / turns / max(once, 1e-6))))
    return slowest([turn(repeats) for _ in range(turns)])


def rows(options, device, backend: str) -> Iterator[dict[str, str]]:
    """One row for each group, op and size, the same on every rank. Collective over the world."""
    import torch
    import torch.distributed as dist
    from measure import machine, table, timing

    from megatron_ext.parallel.groups import build_groups

    groups = build_groups(options.layout)
    hosts: list = [None] * options.world
    dist.all_gather_object(hosts, socket.gethostname())
    where = f"{options.world} ranks, {len(set(hosts))} node{'s' if len(set(hosts)) > 1 else ''}"
    columns = machine.describe(device)
    provider = f"{backend} {str(options.layout).replace(' x ', 'x')}"
    for kind in options.groups:
        group = getattr(groups, kind)
        n = dist.get_world_size(group)
        if n == 1:
            continue
        for op in options.ops:
            for size in options.bytes:
                collective = Collective(op, group, size, device)
                wrong = torch.tensor([0.0 if collective.is_right() else 1.0], device=device)
                dist.all_reduce(wrong)
                values = {"op": f"{op}[{kind}]", "mode": "forward", "shape": f"n={n} {show_size(size)}", "dtype": "float32", "provider": provider, **columns}
                if wrong.item():
                    yield table.row(**values, note=f"wrong result on {int(wrong.item())} of {where}")
                    continue
                times = timed(collective, device, 0.1 if options.quick else 1.0)
                middle = timing.percentile(times, 0.5)
                yield table.row(
                    **values, **{f"p{p}_ms": 1e3 * timing.percentile(times, p / 100) for p in (20, 50, 80)},
                    gb_per_s=bus_bandwidth(op, n, collective.bytes, middle) / 1e9, error=0.0, note=where, **machine.clocks(device))


def rank(options) -> int:
    """The body of one rank; rank 0 writes."""
    from measure import table

    from megatron_ext import platform

    platform.quiet()
    backend = options.backend[0]
    here = platform.install("cpu" if backend == "gloo" else "cuda")
    platform.connect(here, 600)
    try:
        sink = Sink(options.output, "collectives") if platform.is_first_rank() else None
        found = []
        for row in rows(options, here.device, backend):
            found.append(row)
            if sink:
                sink.add([row])
        if sink:
            print(table.readable(found) if found else "every group has one rank: nothing to measure", file=sys.stdout if options.output else sys.stderr)
        return 1 if any(not r["p50_ms"] for r in found) else 0
    finally:
        platform.disconnect()


def main(argv: Sequence[str]) -> int:
    from megatron_ext.config.schema import Config, LaunchConfig
    from megatron_ext.errors import UserError
    from megatron_ext.parallel.job import start
    from megatron_ext.parallel.launch import check_machine, guarded, in_ranks

    options = options_of(argv)
    device = "cpu" if options.backend == ["gloo"] else "auto"
    config = Config(launch=LaunchConfig(ranks=options.world, threads=options.threads or 0, device=device))
    if options.launched:
        return guarded(lambda: in_ranks(config, [], lambda: rank(options)))
    try:
        check_machine(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    script = [sys.executable, str(Path(__file__).resolve())]
    return max(start([*script, *_without(argv, "--backend"), "--backend", backend], config) for backend in options.backend)


def _without(argv: Sequence[str], option: str) -> list[str]:
    """The words without an option and its values."""
    left, skipping = [], False
    for word in argv:
        skipping = word == option or skipping and not word.startswith("--")
        if not skipping:
            left.append(word)
    return left


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
