"""`python -m torch.distributed.run` on a fixed set of nodes, of which the first leaves last.

The agents of all nodes end together, at a barrier in a store that the first node's agent holds. Once that agent has seen the barrier full it leaves, and
the store with it; another whose process did not get a turn in that moment finds a closed connection, and writes a traceback behind a job that went well
(torch 2.13, `SimpleElasticAgent._exit_barrier`). Here the first node keeps the store until all the others have said that they are through.
"""
import contextlib
import sys
import time
from collections.abc import Sequence
from datetime import timedelta

from torch.distributed import DistError, TCPStore
from torch.distributed.run import main as torchrun
from torch.distributed.run import parse_args

LEFT = "megatron_ext/agents_left"
SECONDS = 10.0  # for the others; who has not come by then has gone another way, and Slurm ends it


def main(words: Sequence[str]) -> None:
    """Runs torchrun's command line; a job that fails ends as under torchrun itself.

    Args:
        words: what torchrun takes: --nnodes (a number), --node-rank (or PET_NODE_RANK), --master-addr and --master-port among them.
    """
    told = parse_args(list(words))
    nodes, place = int(told.nnodes), (told.master_addr, told.master_port)
    if nodes == 1:
        return torchrun(words)
    if told.node_rank:
        torchrun(words)
        with contextlib.suppress(DistError):
            TCPStore(*place, timeout=timedelta(seconds=SECONDS), wait_for_workers=False).add(LEFT, 1)
        return None
    held = TCPStore(*place, is_master=True, wait_for_workers=False, multi_tenant=True)  # stores of one process on one port are one
    torchrun(words)
    until = time.monotonic() + SECONDS
    while held.add(LEFT, 0) < nodes - 1 and time.monotonic() < until:
        time.sleep(0.05)
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
