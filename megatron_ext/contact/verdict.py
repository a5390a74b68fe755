"""From what the ranks of a node check measured to who falls short, in plain words. Pure: no torch, no clock, no network.

GEMM speed is compared with the median of the ranks of the other nodes (one node: of its other ranks); bandwidth: links.py. Floors are absolute,
where given.
"""
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from megatron_ext.contact import gpus, links
from megatron_ext.contact.findings import Limits, Problem, figure


@dataclass(frozen=True)
class Verdict:
    nodes: tuple[str, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...] = ()
    summary: str = ""
    facts: dict = field(default_factory=dict)

    @property
    def good(self) -> bool:
        return not self.problems

    @property
    def bad_nodes(self) -> list[str]:
        """Nodes that fall short, each once."""
        return list(dict.fromkeys(p.node for p in self.problems if p.node))

    @property
    def exclude(self) -> list[str]:
        """Nodes to leave out; none where it is all of them: then the fault lies in what they share, or in what was asked."""
        found = list(dict.fromkeys(p.node for p in self.problems if p.node and p.exclude))
        return [] if set(found) >= set(self.nodes) else found

    def text(self) -> str:
        lines = [f"node check: {self.summary}"]
        lines += [f"  bad   {p.node or 'network'}: {p.what}; {p.remedy}" for p in self.problems]
        lines += [f"  note  {note}" for note in self.notes]
        if self.good:
            return "\n".join([*lines, "node check: good"])
        named = ", ".join(self.bad_nodes) or "no single node is at fault"
        return "\n".join([*lines, f"node check: bad: {named}" + (f"; leave out {','.join(self.exclude)}" if self.exclude else "")])

    def json(self) -> dict:
        return {"good": self.good, "nodes": list(self.nodes), "bad_nodes": self.bad_nodes, "exclude": self.exclude, "summary": self.summary,
                "problems": [asdict(p) for p in self.problems], "notes": list(self.notes), **self.facts}


def judge(facts: Sequence[dict | None], network: Sequence[dict | None] | None, limits: Limits, *, expected: Mapping[str, int] | None = None) -> Verdict:
    """The verdict over all ranks.

    Args:
        facts: of each rank, as node_check.py's `local_facts` makes them; None: the rank never reported.
        network: of each rank, as `network.measure` makes them, or {"stuck": ...}; None in it: nothing came; None for it: not measured.
        expected: tasks of each node, where a scheduler says.
    """
    there = {rank: f for rank, f in enumerate(facts) if f is not None}
    nodes = tuple(dict.fromkeys([*(f["node"] for f in there.values()), *(expected or ())]))
    problems = [*_missing(facts, expected), *_gpus(there, limits), *_gemm(there, limits), *_disk(there, limits), *_versions(there)]
    notes: list[str] = []
    if network is not None:
        where = [f["node"] for f in there.values()]
        problems += links.judge(where, network, limits, notes)
    return Verdict(nodes, tuple(problems), tuple(notes), _summary(there, network, nodes), {"ranks": list(facts), "network": network})


def _missing(facts: Sequence[dict | None], expected: Mapping[str, int] | None) -> Iterator[Problem]:
    absent = [rank for rank, f in enumerate(facts) if f is None]
    if not absent:
        return
    came = Counter(f["node"] for f in facts if f is not None)
    named = [(node, tasks - came[node]) for node, tasks in (expected or {}).items() if came[node] < tasks]
    for node, count in named:
        yield Problem(node, f"{count} of its {expected[node]} rank(s) did not report", "look whether the node is up and its network and file system answer")
    if not named:
        yield Problem(None, f"rank(s) {', '.join(map(str, absent))} did not report", "look in the job's log for what ended them", exclude=False)


def _gpus(there: Mapping[int, dict], limits: Limits) -> Iterator[Problem]:
    seen: dict[str, dict] = {}
    users: dict[tuple[str, str], list[int]] = {}
    for rank, f in there.items():
        for gpu in f.get("gpus", ()):
            seen.setdefault(f["node"], {})[gpu.get("uuid", gpu["index"])] = gpu
        if f.get("device_uuid"):
            users.setdefault((f["node"], f["device_uuid"]), []).append(rank)
    for node in dict.fromkeys(f["node"] for f in there.values()):
        # torch's count stands in where there is no NVML.
        count = len([g for g in seen.get(node, {}).values() if "error" not in g]) or max(f.get("cuda", 0) for f in there.values() if f["node"] == node)
        if limits.gpus is not None and count < limits.gpus:
            yield Problem(node, f"{count} GPU(s), {limits.gpus} expected", "look at nvidia-smi and dmesg (Xid) there")
        for gpu in seen.get(node, {}).values():
            for what, remedy in gpus.faults(gpu):
                yield Problem(node, f"GPU {gpu['index']}: {what}", remedy)
    for rank, f in there.items():
        if slowed := sorted(gpus.SLOWED & set(f.get("load", {}).get("throttle", ()))):
            yield Problem(f["node"], f"the GPU of rank {rank} is slowed down under load ({', '.join(slowed)})", "look at cooling and power of the node")
    for (node, _), ranks in users.items():
        if len(ranks) > 1:
            yield Problem(node, f"ranks {', '.join(map(str, ranks))} share one GPU", "start one task a GPU (--ntasks-per-node, --gpus-per-node)", exclude=False)


def _gemm(there: Mapping[int, dict], limits: Limits) -> Iterator[Problem]:
    speed = {rank: f["gemm"]["tflops"] for rank, f in there.items() if "tflops" in f.get("gemm", {})}
    for rank, f in there.items():
        gemm, node = f.get("gemm"), f["node"]
        if gemm is None:
            continue
        if "error" in gemm:
            yield Problem(node, f"rank {rank} cannot multiply matrices: {gemm['error']}", "look at the GPU and its driver")
            continue
        if gemm["wrong"]:
            yield Problem(node, f"rank {rank} multiplies wrong: {gemm['wrong']} sums of rows and columns are off", "take the node out: it corrupts training")
        others = [s for r, s in speed.items() if there[r]["node"] != node] or [s for r, s in speed.items() if r != rank]
        usual = statistics.median(others) if others else None
        if usual is not None and speed[rank] < limits.gemm_share * usual:
            yield Problem(node, f"rank {rank} multiplies matrices at {figure(speed[rank])} TFLOP/s, the others at {figure(usual)}",
                          "look at clocks, cooling and other processes of the node")
        elif limits.gemm_floor is not None and speed[rank] < limits.gemm_floor:
            yield Problem(node, f"rank {rank} multiplies matrices at {figure(speed[rank])} TFLOP/s, at least {figure(limits.gemm_floor)} are asked for",
                          "look at clocks, cooling and other processes of the node")


def _disk(there: Mapping[int, dict], limits: Limits) -> Iterator[Problem]:
    for f in there.values():
        disk, node = f.get("disk"), f["node"]
        if disk is None:  # one rank of a node measures
            continue
        if "error" in disk:
            yield Problem(node, f"the run directory cannot be written: {disk['error']}", "look at its mount, quota and permissions there")
            continue
        if disk["damaged"]:
            yield Problem(node, f"{disk['damaged']} MiB of the run directory came back different", "take the node out and check the file system")
        if not disk.get("shared", True):
            yield Problem(node, "what rank 0 wrote to the run directory is not seen here", "name a directory on a file system that all nodes share")
        if limits.disk_floor is not None and disk["write_mb_s"] < limits.disk_floor:
            yield Problem(node, f"writes the run directory at {figure(disk['write_mb_s'])} MB/s, at least {figure(limits.disk_floor)} are asked for",
                          "look at the mount and its network there")
        if limits.free_gib is not None and disk["free_gib"] < limits.free_gib:
            yield Problem(node, f"{disk['free_gib']:.1f} GiB free in the run directory, {limits.free_gib:g} are asked for", "make room", exclude=False)


def _versions(there: Mapping[int, dict]) -> Iterator[Problem]:
    for name in dict.fromkeys(name for f in there.values() for name in f.get("versions", {})):
        by_node = {f["node"]: f["versions"].get(name) for f in there.values() if "versions" in f}
        usual, count = Counter(by_node.values()).most_common(1)[0]
        others = {node: value for node, value in by_node.items() if value != usual}
        for node, value in others.items():
            yield Problem(node, f"has {name} {value}, {count} other node(s) {usual}", "use one environment on all nodes", exclude=len(others) < count)


# ---- words ---------------------------------------------------------------------------------------------------------------------


def _summary(there: Mapping[int, dict], network: Sequence[dict | None] | None, nodes: Sequence[str]) -> str:
    parts = [f"{len(there)} rank(s) on {len(nodes)} node(s)"]
    names = Counter(gpu["name"] for f in there.values() for gpu in f.get("gpus", ()) if "name" in gpu and f["local"] == 0)
    parts += [f"{count} x {name}" for name, count in names.items()]
    parts += _spread("GEMM", [f["gemm"]["tflops"] for f in there.values() if "tflops" in f.get("gemm", {})], "TFLOP/s")
    parts += _spread("disk write", [f["disk"]["write_mb_s"] for f in there.values() if "write_mb_s" in (f.get("disk") or {})], "MB/s")
    if network is not None:
        parts += _spread("all-reduce", [n["all_reduce_gb_s"] for n in network if n and n.get("all_reduce_gb_s")], "GB/s")
        for kind in ("inside", "across"):
            parts += _spread(f"pairs {kind} nodes", [pair.gb_s for pair in links.pairs_of(network) if pair.kind == kind], "GB/s")
    return ", ".join(parts)


def _spread(name: str, values: Sequence[float], unit: str) -> list[str]:
    if not values:
        return []
    low, high = figure(min(values)), figure(max(values))
    return [f"{name} {low} {unit}" if low == high else f"{name} {low} to {high} {unit}"]
