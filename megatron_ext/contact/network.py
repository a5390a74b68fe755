"""Bandwidth between ranks, and whether what arrives is what was sent. Over the platform's own backend: NCCL on GPUs, gloo on CPUs.

All-reduce over everybody: bus bandwidth as NCCL-tests defines it, S/t times 2 (n-1)/n for n ranks and S bytes in time t.

Pairs (pairing.py): both partners send S bytes to each other at once; S/t is the bandwidth each way.

Any step may hang for ever where a network is broken, so each one is announced to a `Guard` (guard.py) with the time that it may take.
"""
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_ext.contact.guard import Guard
from megatron_ext.contact.pairing import rounds

TURNS = 5


def pattern(size: int, rank: int, device: torch.device) -> torch.Tensor:
    """fp32 [size / 4]: whole numbers that differ from rank to rank, and whose sums over 65,000 ranks are exact."""
    return ((torch.arange(size // 4, device=device) + 17 * rank) % 251).float()


def measure(nodes: Sequence[str], device: torch.device, guard: Guard, found: dict, *, size: int, limit: float) -> None:
    """All-reduce, then every round. Collective over the world.

    Args:
        nodes: the node of each rank.
        found: gets, as it goes, `all_reduce_gb_s` (not with one rank), `all_reduce_wrong` (elements), and `pairs`, this rank's, as
            {"kind", "peer", "round", "gb_s", "wrong"}.
        size: bytes, of the all-reduce and of each message.
        limit: seconds that one of them may take.
    """
    me, n = dist.get_rank(), dist.get_world_size()
    found["pairs"] = []
    if n == 1:
        return
    with guard.expects("all-reduce over all ranks", limit):
        found["all_reduce_wrong"] = _all_reduce_wrong(size, me, n, device)
        zeros = torch.zeros(size // 4, device=device)
        _timed(lambda: dist.all_reduce(zeros), device)
        seconds = sorted(_timed(lambda: dist.all_reduce(zeros), device) for _ in range(TURNS))[TURNS // 2]
        found["all_reduce_gb_s"] = size / seconds * 2 * (n - 1) / n / 1e9
    for number, (kind, pairs) in enumerate(rounds(nodes)):
        peer = next((b if a == me else a for a, b in pairs if me in (a, b)), None)
        if peer is None:
            continue
        with guard.expects(f"exchange with rank {peer}", limit, peer=peer, round=number):
            found["pairs"].append({"kind": kind, "peer": peer, "round": number, **_exchange(me, peer, size, device)})


def wrong_collectives(group, ranks: list[int], device: torch.device) -> list[str]:
    """The collectives of one group whose results are not exactly what they must be, in words. Each rank gives whole numbers of its own.

    Args:
        ranks: the group's, ascending.
    """
    n, me, count = len(ranks), ranks.index(dist.get_rank()), 1 << 12

    def numbers(rank: int, of: int = count) -> torch.Tensor:
        return ((torch.arange(of, device=device) + 17 * rank) % 251).float()

    whole, found = sum(numbers(r, n * count) for r in range(n)), []

    def expect(name: str, result: torch.Tensor, right: torch.Tensor) -> None:
        if not torch.equal(result, right):
            found.append(f"{name} is wrong in {int((result != right).sum())} of {result.numel()} numbers")

    summed = numbers(me)
    dist.all_reduce(summed, group=group)
    expect("all-reduce", summed, whole[:count])
    parts = torch.empty(n * count, device=device)
    dist.all_gather_into_tensor(parts, numbers(me), group=group)
    expect("all-gather", parts, torch.cat([numbers(r) for r in range(n)]))
    part = torch.empty(count, device=device)
    dist.reduce_scatter_tensor(part, numbers(me, n * count), group=group)
    expect("reduce-scatter", part, whole[me * count:(me + 1) * count])
    for root in {0, n - 1}:
        told = numbers(root) if me == root else torch.zeros(count, device=device)
        dist.broadcast(told, ranks[root], group=group)
        expect("broadcast", told, numbers(root))
    swapped = torch.empty(n * count, device=device)
    dist.all_to_all_single(swapped, numbers(me, n * count), group=group)
    expect("all-to-all", swapped, torch.cat([numbers(r, n * count)[me * count:(me + 1) * count] for r in range(n)]))
    if n > 1:
        came = torch.empty(count, device=device)
        ends = [dist.P2POp(dist.isend, numbers(me), ranks[(me + 1) % n], group), dist.P2POp(dist.irecv, came, ranks[(me - 1) % n], group)]
        for work in dist.batch_isend_irecv(ends):
            work.wait()
        expect("ring", came, numbers((me - 1) % n))
    return found


def _all_reduce_wrong(size: int, me: int, n: int, device: torch.device) -> int:
    target = pattern(size, me, device)
    dist.all_reduce(target)
    sums = torch.tensor([sum((value + 17 * rank) % 251 for rank in range(n)) for value in range(251)], dtype=torch.float64)
    return int((target.cpu().double() != sums[torch.arange(size // 4) % 251]).sum())


def _exchange(me: int, peer: int, size: int, device: torch.device) -> dict:
    mine, theirs = pattern(size, me, device), torch.zeros(size // 4, device=device)

    def both(out: torch.Tensor, into: torch.Tensor) -> None:
        # The lower rank sends first: for NCCL the two are one group, for gloo two messages that must not wait for each other.
        works = dist.batch_isend_irecv([dist.P2POp(dist.isend, out, peer), dist.P2POp(dist.irecv, into, peer)])
        for work in works:
            work.wait()

    def meet() -> None:
        both(mine[:1], torch.empty_like(mine[:1]))  # whoever comes first waits here, not in the measured turn

    meet()
    both(mine, theirs)
    wrong = int((theirs != pattern(size, peer, device)).sum())
    times = []
    for _ in range(TURNS):
        meet()
        times.append(_timed(lambda: both(mine, theirs), device))
    return {"gb_s": size / sorted(times)[TURNS // 2] / 1e9, "wrong": wrong}


def _timed(call, device: torch.device) -> float:
    _synchronize(device)
    began = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - began


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
