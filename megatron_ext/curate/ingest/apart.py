"""Readers of hostile formats, in a process of their own: a file that crashes its reader or keeps it busy without end is set aside, and the build goes on.

The limit is on processor time, not on the clock, so that what is readable does not depend on how busy the machine is.
"""
import contextlib
import ctypes
import multiprocessing
import os
import signal
from typing import Any

from megatron_ext.curate.blocks import resolve
from megatron_ext.curate.ingest.items import Item, Unreadable
from megatron_ext.curate.ingest.records import Reading
from megatron_ext.errors import UserError

MEMORY = 8 << 30  # bytes of addresses that the process may take
PATIENCE = 20  # times the processor seconds that are waited for on a busy machine
_AGAIN = "its reader crashed or took too long (curate.ingest.max_seconds): damaged, or made to do so"


class Apart:
    """A process that reads files by functions `module:name` of (content, reading). Started when it is first needed, and again after a crash."""

    def __init__(self) -> None:
        self._process: Any = None
        self._pipe: Any = None

    def read(self, function: str, content: bytes, reading: Reading) -> Item:
        """What the function returns. Raises Unreadable, UserError."""
        seconds = reading.settings.max_seconds
        if self._process is None:
            self._start()
        try:
            self._pipe.send((function, content, reading, seconds))
            if not self._pipe.poll(PATIENCE * seconds):
                raise EOFError
            good, found = self._pipe.recv()
        except (EOFError, OSError):
            self.close()
            raise Unreadable(_AGAIN) from None
        if good:
            return found
        raise found

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, os.getpid()), daemon=True)
        self._process.start()
        theirs.close()

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None


def _serve(pipe: Any, parent: int) -> None:
    die_with(parent)
    _limit_memory()
    with contextlib.suppress(EOFError, OSError):
        while True:
            function, content, reading, seconds = pipe.recv()
            _limit_time(seconds)
            try:
                answer = True, resolve(function)(content, reading)
            except (Unreadable, UserError) as error:
                answer = False, error
            except MemoryError:
                answer = False, Unreadable("takes more memory than a reader may have")
            except Exception as error:  # noqa: BLE001 its message may hold text of the file
                answer = False, Unreadable(f"its reader failed ({type(error).__name__})")
            pipe.send(answer)


def die_with(parent: int) -> None:
    """This process ends when its parent does, however that ends. Linux."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)


def _limit_memory() -> None:
    import resource

    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _limit_time(seconds: int) -> None:
    """So many more seconds; the soft limit's signal ends the process."""
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + seconds + 1, resource.getrlimit(resource.RLIMIT_CPU)[1]))
