"""Told to stop: SIGUSR1 (Slurm's warning before the time limit) and SIGTERM (pre-emption, `scancel`). No torch.

A run that hears one finishes its step, saves, and leaves with exit code 75: unfinished, to be gone on with. The ranks vote on it (health/votes.py).
What was heard belongs to the process, as signals do, so it stands in this module.
"""
import contextlib
import signal

STOPS = (signal.SIGUSR1, signal.SIGTERM)
UNFINISHED = 75  # EX_TEMPFAIL of sysexits.h

_heard: list[int] = []


class Interrupted(Exception):
    """Raised inside a step, on every rank at the same place, when the job was told to stop: the models are as they were before the step."""


def listen() -> None:
    """From now on the signals are noted, not obeyed. Main thread only."""
    for number in STOPS:
        signal.signal(number, lambda number, frame: _heard.append(number))


def heard() -> str | None:
    """The name of the first signal that this process was sent, such as SIGUSR1."""
    return signal.Signals(_heard[0]).name if _heard else None


@contextlib.contextmanager
def held_back():
    """Inside, the signals wait; in a process that is started here they do until it calls `let_through`, so that none ends it before it listens."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def let_through() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
