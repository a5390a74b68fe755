"""Who is at fault between ranks. Pure.

The bandwidth of a pair is compared with the median over the nodes of each one's best pair: of three nodes a bad one spoils two pairs of three,
so the median over pairs would be the bad one's. Who is at fault in a slow pair across nodes: the node most of whose pairs are slow, then the
next, as long as it is more than half of them and it had more than one partner. What is left are single links, of which one cannot say at which end.

A hang: whoever fell silent is at fault. Else both ends of the exchange that hung in the earliest round: those of later rounds wait for these.
"""
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_ext.contact.findings import Limits, Problem, figure


@dataclass(frozen=True)
class Pair:
    a: int
    b: int
    kind: str
    gb_s: float


def judge(nodes: Sequence[str], network: Sequence[dict | None], limits: Limits, notes: list[str]) -> Iterator[Problem]:
    """What is wrong between ranks.

    Args:
        nodes: the node of each rank.
        network: of each rank, as `network.measure` fills it; with "stuck" where it hung, "error" where it raised; None: it fell silent.
        notes: gets what is worth saying and no fault.
    """
    silent = [rank for rank, n in enumerate(network) if n is None]
    stuck = {rank: n["stuck"] for rank, n in enumerate(network) if n and "stuck" in n}
    for rank in silent:
        yield Problem(nodes[rank], f"rank {rank} reported and then fell silent in the network test", "look whether the node still answers")
    for rank, n in enumerate(network):
        if n and "error" in n and not silent:
            yield Problem(nodes[rank], f"rank {rank}: {n['error']}", "look at the network settings (NCCL_DEBUG=INFO)", exclude=False)
        if n and n.get("all_reduce_wrong"):
            yield Problem(nodes[rank], f"rank {rank} got a wrong sum from all-reduce ({n['all_reduce_wrong']} elements)", "take the node out: it corrupts training",
                          exclude=sum(bool(m and m.get("all_reduce_wrong")) for m in network) == 1)
        for pair in n.get("pairs", ()) if n else ():
            if pair["wrong"]:
                yield Problem(nodes[rank], f"rank {rank} got {pair['wrong']} wrong numbers from rank {pair['peer']} ({nodes[pair['peer']]})", "check NIC and cable")
    if not silent:  # who waits for a silent rank is not at fault, nor who waits for one that waits
        yield from _stuck(nodes, stuck)
    yield from _slow(nodes, network, limits, notes)


def _stuck(nodes: Sequence[str], stuck: Mapping[int, dict]) -> Iterator[Problem]:
    if not stuck:
        return
    if any(s["peer"] is None for s in stuck.values()):
        yield Problem(None, f"{next(s for s in stuck.values() if s['peer'] is None)['what']} hung", "check that all nodes are in one network, and its settings "
                      "(NCCL_SOCKET_IFNAME, NCCL_IB_HCA, GLOO_SOCKET_IFNAME; NCCL_DEBUG=INFO says more)", exclude=False)
        return
    first = min(s["round"] for s in stuck.values())
    pairs = {tuple(sorted((rank, s["peer"]))) for rank, s in stuck.items() if s["round"] == first}
    for pair in sorted(pairs):
        for rank, peer in dict(zip([nodes[r] for r in pair], [pair, pair[::-1]])).values():
            yield Problem(nodes[rank], f"the exchange between rank {rank} and rank {peer} ({nodes[peer]}) hung", "check NIC and cable of both")


def _slow(nodes: Sequence[str], network: Sequence[dict | None], limits: Limits, notes: list[str]) -> Iterator[Problem]:
    pairs = pairs_of(network)
    for kind, name in (("inside", lambda rank: rank), ("across", lambda rank: nodes[rank])):
        mine = [pair for pair in pairs if pair.kind == kind]
        best: dict = {}
        for pair in mine:
            for end in (name(pair.a), name(pair.b)):
                best[end] = max(best.get(end, 0.0), pair.gb_s)
        if not best:
            continue
        usual = statistics.median_high(best.values())
        floor = limits.pair_floor if kind == "across" and limits.pair_floor is not None else 0.0
        slow = [pair for pair in mine if pair.gb_s < max(limits.pair_share * usual, floor)]
        if kind == "inside":
            for pair in slow:
                yield Problem(nodes[pair.a], f"ranks {pair.a} and {pair.b} exchange {figure(pair.gb_s)} GB/s inside the node, others {figure(usual)}",
                              "look at NVLink and PCIe of the node (nvidia-smi topo -m)")
        else:
            yield from _across(nodes, mine, slow, usual, floor, notes)


def _across(nodes: Sequence[str], pairs: list[Pair], slow: list[Pair], usual: float, floor: float, notes: list[str]) -> Iterator[Problem]:
    def ends(pair: Pair) -> set[str]:
        return {nodes[pair.a], nodes[pair.b]}

    while slow:
        of_all, of_slow = (Counter(node for pair in some for node in ends(pair)) for some in (pairs, slow))
        partners = {node: {other for pair in pairs if node in ends(pair) for other in ends(pair) - {node}} for node in of_slow}
        worst = max(of_slow, key=lambda node: (of_slow[node] / of_all[node], of_slow[node]))
        if of_slow[worst] <= of_all[worst] / 2 or len(partners[worst]) < 2:
            break
        reached = max(pair.gb_s for pair in slow if worst in ends(pair))
        against = f"at least {figure(floor)} are asked for" if reached >= 0.999 * usual else f"others {figure(usual)}"
        yield Problem(worst, f"exchanges at most {figure(reached)} GB/s with {of_slow[worst]} of {of_all[worst]} ranks elsewhere, {against}", "check its NIC, cable and "
                      "switch port")
        pairs = [pair for pair in pairs if worst not in ends(pair)]
        slow = [pair for pair in slow if worst not in ends(pair)]
    for pair in slow:
        a, b = nodes[pair.a], nodes[pair.b]
        said = f"{a} and {b} exchange {figure(pair.gb_s)} GB/s (ranks {pair.a} and {pair.b})"
        if pair.gb_s < floor:
            yield Problem(None, f"{said}, at least {figure(floor)} are asked for", "at which end the fault is cannot be told from this pair", exclude=False)
        else:
            notes.append(f"{said}, others {figure(usual)}: a link that is slow, or busy with other people's traffic")


def pairs_of(network: Sequence[dict | None]) -> list[Pair]:
    """Each pair once, with the slower of what its two ends measured."""
    found: dict[tuple[int, int], Pair] = {}
    for rank, n in enumerate(network):
        for pair in n.get("pairs", ()) if n else ():
            a, b = sorted((rank, pair["peer"]))
            before = found.get((a, b))
            found[a, b] = Pair(a, b, pair["kind"], min(pair["gb_s"], before.gb_s if before else pair["gb_s"]))
    return list(found.values())
