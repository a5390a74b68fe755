"""What a step allocates and sends, counted while it runs on tensors that have no memory.

Every operation's results pass by here; a storage counts from the operation that makes it until the last tensor that looks at it is gone, as torch's caching
allocator counts it. Collectives are noted with their bytes and their group, and not done.
"""
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_SENT = {"send": "send", "recv_": "receive", "allreduce_": "all-reduce", "_allgather_base_": "all-gather", "allgather_": "all-gather",
         "allgather_into_tensor_coalesced_": "all-gather", "_reduce_scatter_base_": "reduce-scatter", "reduce_scatter_": "reduce-scatter",
         "reduce_scatter_tensor_coalesced_": "reduce-scatter", "alltoall_base_": "all-to-all", "broadcast_": "broadcast", "barrier": "barrier"}


@dataclass(frozen=True)
class Collective:
    """What one kind of collective over one group moved: calls, and bytes of the whole (gathered, unscattered) tensors."""

    group: str
    kind: str
    calls: int
    bytes: int


class Ledger(TorchDispatchMode):
    """Lies over `FakeTensorMode`. `live` and `peak`: bytes of all storages that were made inside.

    Args:
        group_name: a process group -> what it is for, such as "tensor".
        chosen: share of elements that `nonzero` finds: the masked words of an encoder.
    """

    def __init__(self, group_name: Callable[[dist.ProcessGroup], str], chosen: float = 1.0):
        super().__init__()
        self._chosen = chosen
        self.live = self.peak = self.operations = 0
        self._group_name = group_name
        self._sizes: dict[int, tuple[weakref.ref, int]] = {}
        self._sent: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            return self._collective(func, args)
        if func is torch.ops.aten._local_scalar_dense.default:  # a number that decides something: every loss here is 1, and every check passes
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        if func is torch.ops.aten.nonzero.default:
            out = args[0].new_empty(max(1, int(self._chosen * args[0].numel())), args[0].dim(), dtype=torch.int64)
        else:
            out = func(*args, **(kwargs or {}))
        self.operations += 1
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor):
                self._see(value.untyped_storage())
        return out

    def restart_peak(self) -> int:
        """From here on `peak` is of what comes; returns what lives now."""
        self.peak = self.live
        return self.live

    def collectives(self) -> list[Collective]:
        kinds = sorted({key[:2] for key in self._sent})
        return [Collective(*key, self._sent[*key, "calls"], self._sent[*key, "bytes"]) for key in kinds]

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._sizes:
            return
        size = storage.nbytes()
        self._sizes[key] = weakref.ref(storage, lambda _: self._gone(key)), size
        self.live += size
        self.peak = max(self.peak, self.live)

    def _gone(self, key: int) -> None:
        _, size = self._sizes.pop(key)
        self.live -= size

    def _collective(self, func, args: tuple):
        from torch._C._distributed_c10d import FakeWork

        name = func._schema.name.partition("::")[2]
        group = next((dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())), None)
        kind = _SENT.get(name, name)
        # megatron-core takes more than one communicator for the pipeline; nothing else sends from rank to rank.
        key = ("pipeline" if kind in ("send", "receive") else "" if group is None else self._group_name(group), kind)
        self._sent[*key, "calls"] += 1
        self._sent[*key, "bytes"] += max(_bytes(args[0]), _bytes(args[1]) if len(args) > 1 else 0)
        found = [FakeWork().boxed() if "Work" in str(result.type) else args[0] for result in func._schema.returns]
        return found[0] if len(found) == 1 else tuple(found)


def _bytes(arg) -> int:
    return sum(t.numel() * t.element_size() for t in tree_iter(arg) if isinstance(t, torch.Tensor))
