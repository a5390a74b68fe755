"""Process groups that only their members make.

`torch.distributed.new_group` either wants every rank of the job, or (`use_local_synchronization`) names a group by its ranks and by how
many groups this rank has made so far: members that made different numbers of groups before wait for each other for ever. Here the name
is made of the ranks, of what the group is for, and of how often *that* was made, which all members agree on.
"""
import hashlib
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d

_made: Counter = Counter()


def new_group(ranks: Sequence[int], purpose: str = "", timeout: float | None = None) -> dist.ProcessGroup:
    """A group of `ranks`, called by exactly those.

    Args:
        ranks: global ranks, in any order; the group numbers them in ascending order.
        purpose: groups of the same ranks for different purposes have communicators of their own.
        timeout: seconds that a collective may take; None = torch's default for the backend.
    """
    key = (tuple(sorted(ranks)), purpose)
    _made[key] += 1
    name = hashlib.sha256(f"{key}/{_made[key]}".encode()).hexdigest()[:32]
    original = distributed_c10d._process_group_name
    distributed_c10d._process_group_name = lambda ranks, use_hashed_name: name
    try:
        return dist.new_group(
            list(key[0]), use_local_synchronization=True, timeout=None if timeout is None else timedelta(seconds=timeout),
        )
    finally:
        distributed_c10d._process_group_name = original
