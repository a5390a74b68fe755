"""Agreement among ranks without stopping them.

Every rank must finish, fail and retry a save at the same step. While one is in flight each step casts a vote, an asynchronous
two-number all-reduce whose result is read a step later, when it has long arrived. The votes run over gloo, on the CPU: on GPUs
they neither queue behind kernels nor wait for them.
"""
from datetime import timedelta

import torch
import torch.distributed as dist


class Ranks:
    """The ranks that share a checkpoint.

    Args:
        group: their process group; None: the default group, or a single process where none is initialised.
        timeout: seconds after which a rank that waits for another gives up; None: torch's default.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, timeout: float | None = None):
        alone = group is None and not (dist.is_available() and dist.is_initialized())
        self.size = 1 if alone else dist.get_world_size(group)
        self.rank = 0 if alone else dist.get_rank(group)
        self._control, self._own = None, False
        self._vote: tuple[dist.Work | None, torch.Tensor] | None = None
        if self.size > 1 and dist.get_backend(group) == "gloo":
            self._control = group if group is not None else dist.group.WORLD
        elif self.size > 1:
            # torch names a locally made group by how many groups this rank has made so far, and waits for ever where ranks have made
            # different numbers (the ends of a pipeline make more): only a part of the ranks takes that way.
            ranks = None if self.size == dist.get_world_size() else dist.get_process_group_ranks(group)
            limit = None if timeout is None else timedelta(seconds=timeout)
            self._control = dist.new_group(ranks, backend="gloo", timeout=limit, use_local_synchronization=ranks is not None)
            self._own = True

    @property
    def voting(self) -> bool:
        return self._vote is not None

    def cast(self, *, done: bool, good: bool) -> None:
        """Starts a vote. The result is for `count`."""
        assert self._vote is None
        numbers = torch.tensor([done, good], dtype=torch.int32)
        work = dist.all_reduce(numbers, op=dist.ReduceOp.MIN, group=self._control, async_op=True) if self._control is not None else None
        self._vote = (work, numbers)

    def count(self) -> tuple[bool, bool]:
        """(all are done, all are good) of the vote cast before."""
        (work, numbers), self._vote = self._vote, None
        if work is not None:
            work.wait()
        done, good = numbers.tolist()
        return bool(done), bool(good)

    def all(self, flag: bool) -> bool:
        """Whether the flag is true on every rank."""
        self.cast(done=flag, good=True)
        return self.count()[0]

    def gather(self, value: object) -> list:
        """Every rank's value, in rank order."""
        values = [value] * self.size
        if self._control is not None:
            dist.all_gather_object(values, value, group=self._control)
        return values

    def close(self) -> None:
        if self._own:
            dist.destroy_process_group(self._control)
        self._control, self._own = None, False
