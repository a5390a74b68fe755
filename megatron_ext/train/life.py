"""One life of a run, as what watches over it sees it: the lease on its directory, the goodput ledger, the watchdog, slow ranks, signals.

A stage knows of it what `Life` has: whether the job was told to stop, and phases that it may name.
"""
import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from megatron_ext.config.schema import Config
from megatron_ext.errors import UserError
from megatron_ext.health.collectives import group_names
from megatron_ext.health.stragglers import Stragglers, same_work
from megatron_ext.health.votes import Votes
from megatron_ext.health.watchdog import Watchdog, hang_limit
from megatron_ext.observe.allocation import allocation_times
from megatron_ext.observe.events import read_events
from megatron_ext.observe.ledger import NAME, PHASES, Ledger
from megatron_ext.parallel.layout import Layout
from megatron_ext.parallel.signals import heard
from megatron_ext.platform import Platform
from megatron_ext.train.journal import Journal
from megatron_ext.train.stop import Stop


class Life:
    """What a stage may ask and say while it works. This one watches nothing: for a stage that is used without the loop."""

    def asked(self) -> bool:
        """Whether the job was told to stop. Collective: a step that takes long asks where it can be left, and raises Interrupted."""
        return False

    def phase(self, name: str) -> contextlib.AbstractContextManager:
        """Says what is being done inside: data | rollout | ..., see health/watchdog.py and observe/ledger.py."""
        return contextlib.nullcontext()


class Watched(Life):
    """The loop's. Made on every rank once all have met; `close` ends it.

    Args:
        run_dir: shared by all ranks.
    """

    def __init__(self, config: Config, layout: Layout, platform: Platform, run_dir: Path):
        self._config, rank, ranks = config, dist.get_rank(), dist.get_world_size()
        self.ledger = Ledger(run_dir / NAME if rank == 0 else None)
        if rank == 0:
            lives = sum(event.get("kind") in ("start", "resume") for event in read_events(run_dir / "events.jsonl"))
            submitted, started = allocation_times()
            self.ledger.begin(life=lives + 1, submitted=submitted, started=started, restart=lives > 0, held=True)
        self.watchdog = Watchdog(run_dir, rank=rank, ranks=ranks, timeout=hang_limit(config), groups=group_names(layout.grid, rank))
        self.watchdog.start()
        self._slow = Stragglers(self.watchdog.collectives, same_work(layout.grid), factor=config.health.straggler_factor,
                                window=config.health.straggler_window, cuda=platform.is_cuda)
        self._votes = Votes(timeout=config.launch.timeout)
        self._steps = 0  # of this life

    def asked(self) -> bool:
        return self._votes.now()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with self.watchdog.phase(name), self.ledger.phase(name) if name in PHASES else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def step(self, done: int) -> Iterator[None]:
        """Around a step, of which `done` went before in the run. The first one of a life compiles."""
        name = "step" if self._steps else "compile"
        self.watchdog.beat(done, name)
        with self.ledger.phase(name):
            self._slow.begin()
            yield

    def stepped(self, number: int, seconds: float, journal: Journal) -> None:
        """Step `number` is complete. Collective."""
        self._steps += 1
        self.ledger.step(number)
        self.watchdog.beat(number, "step")
        for found in self._slow.end(seconds):
            journal.event("straggler", step=number, rank=found.rank, host=found.host, factor=found.factor)
            journal.note(f"step {number}: {found}")

    def told(self) -> Stop | None:
        """After a step: whether the run is to save and leave. Collective."""
        if not self._votes.after_step():
            return None
        return Stop(f"told to stop by {heard() or 'a signal to another rank'}; unfinished, checkpoint.load=auto goes on", "signal")

    def failed(self, error: BaseException) -> None:
        """Ends the life by an exception."""
        if isinstance(error, UserError):
            self.ledger.refused()
        self.close(f"{type(error).__name__}: {error}".splitlines()[0], clean=False)

    def close(self, reason: str, *, clean: bool = True) -> None:
        self.ledger.close(reason, clean=clean)
        self.watchdog.close()
        if clean:
            self._votes.close()
