"""Starts the ranks of a test on this machine, and ends all of them when one fails: the others would wait for it."""
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import forked

from megatron_ext.parallel.job import held_port

ROOT = Path(__file__).resolve().parent.parent


def spawn(arguments: Sequence[str], count: int, *, timeout: float, show: bool = False, **environment: str) -> list[str]:
    """`python ARGUMENTS` in `count` ranks, one thread each, under RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT.

    Args:
        timeout: seconds in which all must have ended.
        show: standard output goes where this process's goes, as the ranks write it.
        environment: further variables.
    Returns: what each rank wrote to standard output ("" with `show`).
    Raises: AssertionError with what the first rank to fail has said.
    """
    with held_port() as port, tempfile.TemporaryDirectory() as folder:
        shared = {
            **os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **environment,
        }
        # Files, not pipes: a rank that writes much must not wait for somebody to read.
        outs, errors = ([Path(folder) / f"{name}{rank}" for rank in range(count)] for name in ("out", "error"))
        ranks = [forked.start(arguments, env={**shared, "RANK": str(rank)}, out=None if show else outs[rank], error=errors[rank], quiet=True)
                 for rank in range(count)]
        first, deadline = None, time.monotonic() + timeout
        try:
            while any(rank.poll() is None for rank in ranks) and first is None and time.monotonic() < deadline:
                first = next((rank for rank in ranks if rank.poll()), None)
                time.sleep(0.05)
        finally:
            for rank in ranks:
                rank.kill()
        first = first or next((rank for rank in ranks if rank.wait()), None)
        if first is not None:
            number = ranks.index(first)
            raise AssertionError(f"rank {number} ended with {first.wait()} (-9: no end within {timeout} s)\n{errors[number].read_text()[-4000:]}")
        return ["" if show else out.read_text().strip() for out in outs]
