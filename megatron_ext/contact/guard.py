"""A watch over steps that may hang for ever: where one takes longer than it may, what it waited for is told, and the process ends.

A collective over a broken network neither returns nor raises within any useful time, and cannot be interrupted. So a thread looks at the clock.
"""
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Waiting:
    """What this process waits for: in words, and where it is one rank, which and in which round."""

    what: str
    until: float  # of time.monotonic()
    peer: int | None = None
    round: int | None = None

    def facts(self) -> dict:
        return {"what": self.what, "peer": self.peer, "round": self.round}


class Guard:
    """Calls `late(waiting)` once, in a thread of its own, when a step is late. It has to end the process: the step cannot be ended.

    Attributes:
        fired: whether it was.
    """

    def __init__(self, late: Callable[[Waiting], None], *, every: float = 0.2):
        self._late, self._every = late, every
        self._waiting: Waiting | None = None
        self.fired = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def expects(self, what: str, seconds: float, *, peer: int | None = None, round: int | None = None) -> Iterator[None]:
        """The body may take that long."""
        self._waiting = Waiting(what, time.monotonic() + seconds, peer, round)
        try:
            yield
        finally:
            self._waiting = None

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(self._every):
            waiting = self._waiting
            if waiting is not None and time.monotonic() > waiting.until:
                self.fired = True
                self._late(waiting)
                return
