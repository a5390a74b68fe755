"""Readers that misbehave, for test_curate_ingest.py and test_curate_build.py."""
import os
import signal

from megatron_ext.curate.ingest.items import Item, sha256


def crash(content, reading):
    os.kill(os.getpid(), signal.SIGSEGV)


def spin(content, reading):
    while True:
        pass


def fail(content, reading):
    raise ValueError(content)


def fine(content, reading):
    return Item(content.decode(), sha256(content))


def leave(work, phase, rank):
    """In the place of a task: the worker is gone, as when the kernel ends it for want of memory."""
    os.kill(os.getpid(), signal.SIGKILL)
