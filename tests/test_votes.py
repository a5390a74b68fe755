"""The vote on stopping over two ranks: a signal that reaches one of them stops both, at the same step.

This file is also the rank: `python test_votes.py` under RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT.
"""
import json
import os
import signal
import sys

from spawn import spawn


def rank() -> None:
    import torch.distributed as dist

    from megatron_ext.health.votes import Votes
    from megatron_ext.parallel import signals
    from megatron_ext.platform import connect, install

    connect(install("cpu"), 60)
    signals.listen()
    first, second, third = Votes(), Votes(), Votes()
    found = {}

    def told(number: int) -> None:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), number)

    steps = []
    for step in range(1, 6):
        if step == 2:
            told(signal.SIGUSR1)
        steps.append(first.after_step())
    found["steps"], found["name"] = steps, signals.heard()
    signals._heard.clear()
    found["inside"] = [second.after_step(), second.now(), second.now()]
    told(signal.SIGTERM)
    found["inside"] += [second.now(), second.after_step(), second.now()]
    signals._heard.clear()
    found["nobody"] = [third.now(), third.after_step(), third.after_step()]
    for votes in (first, second, third):
        votes.close()
    print(json.dumps(found))
    dist.destroy_process_group()


def test_a_signal_to_one_rank_stops_both():
    one, other = (json.loads(out.splitlines()[-1]) for out in spawn([__file__], 2, timeout=120))
    for found in (one, other):
        assert found["steps"] == [False, False, True, True, True]  # the vote of step 2 is read after step 3
        assert found["inside"] == [False, False, False, True, True, True]
        assert found["nobody"] == [False, False, False]
    assert (one["name"], other["name"]) == (None, "SIGUSR1")


if __name__ == "__main__":
    sys.exit(rank())
