"""Which collective of which group each thread of this process is inside, and how long steps wait in them.

Every collective of Python code, megatron-core's too, goes through a method of torch's ProcessGroup, whichever name it was imported under, and
waits in Work.wait. Both are wrapped while `Collectives` is installed: a call costs about a microsecond more (benchmarks/watchdog_overhead.py
measures it). A stack alone would not do: of `handle.wait()` it tells neither the collective nor the group.

Under NCCL the host does not wait in collectives: it queues them, and waits for the device later. What it waits for is then found in
torch's flight recorder (evidence.py); and time is taken by CUDA events around each call and each wait on the stream that computes, which is
the time that this stream stands still for it.
"""
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from threading import get_ident, main_thread
from time import perf_counter

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import ProcessGroup, Work

from megatron_ext.health.heartbeat import Waiting

# Methods of ProcessGroup, of all versions of torch, and what torch.distributed calls them.
COLLECTIVES = {
    "allreduce": "all_reduce", "allreduce_coalesced": "all_reduce_coalesced", "broadcast": "broadcast", "reduce": "reduce", "barrier": "barrier",
    "monitored_barrier": "monitored_barrier", "allgather": "all_gather", "allgather_coalesced": "all_gather_coalesced", "gather": "gather",
    "_allgather_base": "all_gather_into_tensor", "all_gather_single": "all_gather_into_tensor",
    "allgather_into_tensor_coalesced": "all_gather_into_tensor_coalesced", "all_gather_single_coalesced": "all_gather_into_tensor_coalesced",
    "scatter": "scatter", "reduce_scatter": "reduce_scatter", "_reduce_scatter_base": "reduce_scatter_tensor",
    "reduce_scatter_single": "reduce_scatter_tensor", "reduce_scatter_tensor_coalesced": "reduce_scatter_tensor_coalesced",
    "reduce_scatter_single_coalesced": "reduce_scatter_tensor_coalesced", "alltoall": "all_to_all", "alltoall_base": "all_to_all_single",
    "all_to_all_single": "all_to_all_single",
}
# Not counted: the members of a group send and receive different numbers, and what is coalesced was counted one by one.
UNCOUNTED = {"send": "send", "recv": "recv", "recv_anysource": "recv", "_end_coalescing": "coalesced collectives"}
MOST_UNWAITED = 10000  # Works that nobody waited for are forgotten beyond so many
MAKING_GROUPS = ("_new_process_group_helper", "_store_based_barrier")


class Collectives:
    """Wraps torch's collectives from `install()` to `uninstall()`. One at a time in a process.

    Args:
        names: people's name of a group -> its global ranks; the first that fits is taken.

    Attributes:
        moves: grows with each collective that is called and each that ends: a sign of life.
        waited: seconds that this process has waited in collectives (host clock; of CUDA, see `sample`).
    """

    def __init__(self, names: Mapping[str, Sequence[int]] | None = None):
        self.moves, self.waited = 0, 0.0
        self._names = {}
        for name, ranks in (names or {}).items():
            self._names.setdefault(tuple(sorted(ranks)), name)
        self._inside: dict[int, tuple | None] = {}  # thread -> (collective, group, number, peer in the group)
        self._issued: dict[object, int] = {}
        self._works: dict[int, tuple] = {}  # id of a Work that is alive -> the call that made it
        self._spans: list[tuple] | None = None
        self._event: Callable[[], object] = _cuda_event
        self._originals: list[tuple[type, str, object]] = []

    # ---------------------------------------------------------------- wrapping

    def install(self) -> None:
        """At the same place of the program on all ranks, with no collective in flight: the ranks compare how many they have called."""
        for method, collective in (*COLLECTIVES.items(), *UNCOUNTED.items()):
            if hasattr(ProcessGroup, method):
                self._replace(ProcessGroup, method, self._call(getattr(ProcessGroup, method), collective, method))
        self._replace(Work, "wait", self._wait(Work.wait))

    def uninstall(self) -> None:
        for owner, name, original in reversed(self._originals):
            setattr(owner, name, original)
        self._originals.clear()

    def _replace(self, owner: type, name: str, by: object) -> None:
        self._originals.append((owner, name, owner.__dict__[name]))  # getattr would give it unbound from its class
        setattr(owner, name, by)

    def _call(self, original, collective: str, method: str):
        inside, issued, works = self._inside, self._issued, self._works
        counted, transfer = method in COLLECTIVES, method in ("send", "recv")

        def call(group, *args, **kwargs):
            number, peer = 0, None
            if counted:
                number = issued[group] = issued.get(group, 0) + 1
            elif transfer:
                peer = args[1]
            thread = get_ident()
            record = inside[thread] = (collective, group, number, peer)
            self.moves += 1
            spans = self._spans
            began = None if spans is None else self._event()
            try:
                work = original(group, *args, **kwargs)
            finally:
                inside[thread] = None
            if began is not None:
                spans.append((began, self._event()))
            if work is not None:
                works[id(work)] = record
                if len(works) > MOST_UNWAITED:
                    works.clear()
            return work

        return call

    def _wait(self, original):
        inside, works = self._inside, self._works

        def wait(work, *args, **kwargs):
            thread = get_ident()
            inside[thread] = works.pop(id(work), _UNKNOWN)
            spans = self._spans
            began = perf_counter() if spans is None else self._event()
            try:
                return original(work, *args, **kwargs)
            finally:
                inside[thread] = None
                self.moves += 1
                if spans is None:
                    self.waited += perf_counter() - began
                else:
                    spans.append((began, self._event()))

        return wait

    # ---------------------------------------------------------------- what the watchdog asks, from its own thread

    def waiting(self) -> Waiting | None:
        """What the main thread is inside, or an autograd thread that it waits for."""
        main = main_thread().ident
        record = self._inside.get(main)
        frame = sys._current_frames().get(main)
        if record is None and frame is not None and "torch/autograd" in frame.f_code.co_filename:
            record = next((found for found in list(self._inside.values()) if found is not None), None)
        if record is None:
            return _making_a_group(frame)
        collective, group, number, peer = record
        if group is None:
            return Waiting(collective, "", "", ())
        ranks = _ranks(group)
        label = "world" if group is dist.group.WORLD else self.name(ranks)
        return Waiting(collective, group.group_name, label, ranks, number, ranks[peer] if peer is not None and peer < len(ranks) else None)

    def name(self, ranks: Sequence[int]) -> str:
        ranks = tuple(ranks)
        whole = dist.is_initialized() and len(ranks) == dist.get_world_size()
        return self._names.get(ranks) or ("world" if whole else "without a name")

    def issued(self) -> dict[str, int]:
        """Calls so far on each group of more than one rank, by torch's name of it."""
        return {group.group_name: number for group, number in list(self._issued.items()) if group.size() > 1}

    def recorded(self, group_name: str, sequence: int) -> tuple[tuple[int, ...], int]:
        """Ranks of a group that the flight recorder names, and the number here of the collective that has torch's `sequence` number there."""
        for group, number in list(self._issued.items()):
            if group.group_name == group_name:
                return _ranks(group), max(0, sequence - group._get_sequence_number_for_group() + number)
        return (), 0

    # ---------------------------------------------------------------- time, for stragglers.py

    def sample(self) -> None:
        """From here on time is taken by CUDA events, until `sampled()`."""
        self._spans = []

    def sampled(self) -> float:
        """Seconds for which the computing stream stood still in collectives since `sample()`. The device must be synchronised."""
        spans, self._spans = self._spans or [], None
        return sum(began.elapsed_time(ended) for began, ended in spans) / 1000


def group_names(grid: np.ndarray, rank: int) -> dict[str, tuple[int, ...]]:
    """The groups of a layout that `rank` belongs to, by the axes that they span: "tp", "dp", ..., "dp_cp", ... `grid`: its [PP, DP, CP, TP] ranks."""
    axes, here, found = ("pp", "dp", "cp", "tp"), np.argwhere(grid == rank)[0], {}
    for count in range(1, len(axes) + 1):
        for spanned in combinations(range(len(axes)), count):
            index = tuple(slice(None) if axis in spanned else here[axis] for axis in range(len(axes)))
            found["_".join(axes[axis] for axis in spanned)] = tuple(int(member) for member in grid[index].reshape(-1))
    return found


_UNKNOWN = ("wait", None, 0, None)


def _cuda_event():
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _ranks(group: ProcessGroup) -> tuple[int, ...]:
    try:
        return tuple(dist.get_process_group_ranks(group))
    except (KeyError, RuntimeError, ValueError):  # destroyed meanwhile
        return ()


def _making_a_group(frame) -> Waiting | None:
    """A thread that waits for the others to join a new process group, which is no collective but blocks like one."""
    while frame is not None:
        code = frame.f_code
        if code.co_name in MAKING_GROUPS and code.co_filename.endswith("torch/distributed/distributed_c10d.py"):
            ranks = tuple(frame.f_locals.get("global_ranks_in_group") or range(dist.get_world_size() if dist.is_initialized() else 0))
            return Waiting("new_group", "", "that is being made", ranks)
        frame = frame.f_back
    return None
