"""The ranks of a check, before and after any collective: they tell rank 0 what they found through a TCP store, so that one that is missing is
seen to be missing. Nothing here waits without an end."""
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist


def node_name(environment: Mapping[str, str] = os.environ) -> str:
    """What this node is called: by Slurm where it runs, since that is what it takes out of a job; else by itself."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def expected_tasks(environment: Mapping[str, str] = os.environ) -> dict[str, int]:
    """Tasks of each node of this job step by Slurm's word; {} outside of one.

    SLURM_STEP_TASKS_PER_NODE is such as "8(x3),4": eight on each of the first three nodes, four on the next.
    """
    listed, counts = environment.get("SLURM_STEP_NODELIST"), environment.get("SLURM_STEP_TASKS_PER_NODE")
    if not listed or not counts:
        return {}
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", listed], capture_output=True, text=True, check=True, timeout=20)
        tasks: list[int] = []
        for part in counts.split(","):
            number, _, times = part.partition("(x")
            tasks += [int(number)] * int(times.rstrip(")") or 1)
        return dict(zip(done.stdout.split(), tasks, strict=True))
    except (OSError, subprocess.SubprocessError, ValueError):  # only what the message says of missing ranks depends on it
        return {}


class Session:
    """This rank among the others.

    Args:
        rank, ranks, host, port: of the job; rank 0 listens.
        seconds: in which rank 0 has to be reachable.
    Raises: dist.DistNetworkError (and other RuntimeErrors of torch) where it is not.
    """

    def __init__(self, rank: int, ranks: int, host: str, port: int, *, seconds: float):
        self.rank, self.ranks = rank, ranks
        self._host, self._limit = host, timedelta(seconds=seconds)
        listens = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # torchrun's own process listens already
        self._connection = dist.TCPStore(host, port, ranks, is_master=listens, timeout=self._limit, wait_for_workers=False)
        self.store = dist.PrefixStore("contact", self._connection)
        self._lock, self._posted = threading.Lock(), set()

    def another(self) -> dist.Store:
        """A connection of its own, for a process group: while one waits, nobody else can use it."""
        made = dist.TCPStore(self._host, self._connection.port, self.ranks, is_master=False, timeout=self._limit, wait_for_workers=False)
        return dist.PrefixStore("contact/ranks", made)

    def post(self, kind: str, value: object) -> bool:
        """Tells rank 0, once for each kind; False where that was done already (a guard's thread may be quicker than the step it watches)."""
        with self._lock:
            if kind in self._posted:
                return False
            self._posted.add(kind)
            self.store.set(f"{kind}/{self.rank}", json.dumps(value))
            self.store.add(f"{kind}/count", 1)
            return True

    def collect(self, kind: str, seconds: float, *, count: int | None = None) -> list:
        """Rank 0: what each rank posted; None for those that did not within that time. `count`: how many to wait for, None = all."""
        deadline = time.monotonic() + seconds
        while self.store.add(f"{kind}/count", 0) < (count or self.ranks) and time.monotonic() < deadline:
            time.sleep(0.05)
        return [json.loads(self.store.get(key)) if self.store.check([key := f"{kind}/{rank}"]) else None for rank in range(self.ranks)]

    def tell(self, name: str, value: object) -> None:
        """Rank 0: for `hear`."""
        self.store.set(name, json.dumps(value))

    def hear(self, name: str, seconds: float) -> object:
        """What rank 0 tells. Raises a RuntimeError of torch's when it does not within that time."""
        self.store.wait([name], timedelta(seconds=seconds))
        return json.loads(self.store.get(name))

    def leave(self, seconds: float = 3.0) -> None:
        """The last words: rank 0 keeps the store until the others have heard."""
        try:
            self.store.add("left", 1)
            deadline = time.monotonic() + seconds
            while self.rank == 0 and self.store.add("left", 0) < self.ranks and time.monotonic() < deadline:
                time.sleep(0.02)
        except RuntimeError:  # rank 0 is gone already: nothing left to say
            pass
