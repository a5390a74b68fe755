"""A rank that does nothing but all_reduces under a watchdog, for tests/test_hangs.py and benchmarks/hang_trials.py: `watchdog_ranks.py RUN_DIR`.

Environment: HANG_TIMEOUT in seconds; STUCK_RANK: the rank that is stuck in Python at step 30; LONG_PHASE: seconds that rank 0 spends in a
checkpoint while the others wait for it.
"""
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_ext.health.evidence import record_flight
from megatron_ext.health.watchdog import Watchdog
from megatron_ext.parallel.launch import follow_parent


def stuck():
    while True:
        time.sleep(0.1)


def main() -> None:
    follow_parent()
    record_flight()
    dist.init_process_group("gloo")
    rank, ranks, timeout = dist.get_rank(), dist.get_world_size(), float(os.environ["HANG_TIMEOUT"])
    everyone = dist.new_group(range(ranks))
    dist.barrier()
    dog = Watchdog(Path(sys.argv[1]), rank=rank, ranks=ranks, timeout=timeout, groups={"dp": range(ranks)})
    dog.start()
    numbers, parts = torch.ones(1000), torch.ones(1000 * ranks)
    with dog.phase("checkpoint"):
        if rank == 0:
            time.sleep(float(os.environ.get("LONG_PHASE", "0")))
        dist.barrier()
    step = 0
    while True:
        dog.beat(step, "step")
        if rank == int(os.environ.get("STUCK_RANK", "-1")) and step == 30:
            stuck()
        handle = dist.all_gather_into_tensor(parts, numbers, group=everyone, async_op=True)
        time.sleep(0.002)
        handle.wait()
        dist.all_reduce(numbers)
        numbers.fill_(1.0)
        step += 1


if __name__ == "__main__":
    main()
