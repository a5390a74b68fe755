"""`python -m torch.distributed.run` on a fixed set of nodes, of which the first leaves last.

The agents of all nodes end together, at a barrier in a store that the first node's agent holds. Once that agent has seen the barrier full it leaves, and
the store with it; another whose process did not get a turn in that moment finds a closed connection, and writes a traceback behind a job that went well
(torch 2.13, `SimpleElasticAgent._exit_barrier`). Here the first node keeps the store until all the others have said that they are through.

A rank that fails has said why itself. torchrun adds a traceback of its own and a table, which here are one line.
"""
import contextlib
import sys
import time
from collections.abc import Sequence
from datetime import timedelta

from torch.distributed import DistError, TCPStore
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

LEFT = "megatron_ext/agents_left"
SECONDS = 30.0  # for the others; who has not come by then has gone another way, and Slurm ends it


def main(words: Sequence[str]) -> int:
    """Runs torchrun's command line.

    Args:
        words: what torchrun takes: --nnodes (a number), --node-rank (or PET_NODE_RANK), --master-addr and --master-port among them.

    Returns:
        0; the exit code of the rank of this node that failed first, 128 + the number of the signal that ended it or torchrun.
    """
    told = parse_args(list(words))
    try:
        _run(told, int(told.nnodes), (told.master_addr, told.master_port))
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        how = f"ended with exit code {failure.exitcode}" if failure.exitcode > 0 else f"was ended by {failure.signal_name()}"
        print(f"torchrun: rank {rank} (node {told.node_rank}, local rank {failure.local_rank}, pid {failure.pid}) {how}", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as ended:
        print(f"torchrun: ended by {ended.sigval.name}", file=sys.stderr)
        return 128 + ended.sigval
    return 0


def _run(told, nodes: int, place: tuple[str, int]) -> None:
    if nodes == 1:
        return run(told)
    if told.node_rank:
        run(told)
        with contextlib.suppress(DistError):
            TCPStore(*place, timeout=timedelta(seconds=SECONDS), wait_for_workers=False).add(LEFT, 1)
        return None
    held = TCPStore(*place, is_master=True, wait_for_workers=False, multi_tenant=True)  # stores of one process on one port are one
    run(told)
    until = time.monotonic() + SECONDS
    while held.add(LEFT, 0) < nodes - 1 and time.monotonic() < until:
        time.sleep(0.05)
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
