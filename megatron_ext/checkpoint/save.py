"""Saving: a save that training does not wait for, that cannot damage what is there, and that may fail without ending the run.

    save():  tensors -> shared memory                                          (the loop stands still: a copy)
             each rank's writer: shard file, hash, fsync        phase "write"  |
             all ranks agree (votes)                               | while training goes on; `poll` moves it forward
             rank 0's writer: manifest, fsync, rename, retention phase "commit" |
"""
import json
import logging
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.checkpoint import manifest as m
from megatron_ext.checkpoint import plan
from megatron_ext.checkpoint.agree import Ranks
from megatron_ext.checkpoint.staging import Writer, offsets_of
from megatron_ext.checkpoint.writer import recover
from megatron_ext.errors import UserError
from megatron_ext.redact import redact

logger = logging.getLogger(__name__)
FORMATS = ("fully_reshardable", "dp_reshardable")


@dataclass
class Pending:
    """The save in flight."""

    step: int
    directory: Path  # temporary
    record: dict
    began: float
    stalled: float | None = None  # seconds that the loop stood still; None: until the end
    phase: str = "write"  # -> commit -> done, or -> discard -> failed
    answer: dict | None = None  # this rank's answer where it has no job of its own
    reason: str = ""


class Checkpoints:
    """The checkpoints of a run. Collective: every rank of `group` calls each method at the same point of the loop.

    Args:
        directory: `run.dir`/checkpoints; made when missing. What dead saves left there is cleared.
        keep: newest complete checkpoints kept, 0 = all.
        background: whether `save` returns before the files are written.
        sharding: the optimizer's format, recorded: fully_reshardable | dp_reshardable.
        events: has `write(kind, **fields)`; rank 0's is used.
        group: the ranks that share the checkpoints, None = all.
        timeout: seconds that one rank waits for another.

    Raises UserError when the directory cannot be made.
    """

    def __init__(self, directory: Path, *, keep: int, background: bool, sharding: str, events=None, group=None, timeout: float | None = None):
        if sharding not in FORMATS:
            raise UserError("checkpoint.format", sharding, f"must be one of {', '.join(FORMATS)}")
        self.directory = Path(directory).absolute()
        self.keep, self.background, self.sharding = keep, background, sharding
        self._events = events
        self._ranks = Ranks(group, timeout=timeout)
        self._writer = Writer()
        self._pending: Pending | None = None
        self._failed: Pending | None = None
        self._protected: set[Path] = set()
        self._chosen: Path | None = None
        self._pieces: list[plan.Piece] | None = None
        self._mine: list[int] = []
        self._attempt = 0
        self._nonce = self._prepare()

    def save(self, step: int, sharded_state: dict, record: dict, *, background: bool | None = None) -> None:
        """Starts (and without `background` finishes) the save of a step. A save still in flight is finished first.

        Args:
            sharded_state: as megatron-core makes it: ShardedTensors, ShardedObjects, factories, and values common to all ranks.
            record: JSON-able; `step`, `sharding` and `ranks` are added, secrets are taken out.

        A save that fails is logged and written to the events as `save_failed`; it raises nothing. TypeError for a record or state
        that cannot be written as JSON.
        """
        began = time.monotonic()
        self._finish()
        self._attempt += 1
        record = redact({**record, "step": step, "sharding": self.sharding, "ranks": self._ranks.size})
        m.canonical(record)
        directory = self.directory / f"{m.step_name(step)}.tmp-{self._nonce}-{self._attempt}"
        self._pending = Pending(step, directory, record, began)
        state = plan.take(sharded_state)
        self._assign(state)
        tensors = [state.tensors[number].data.detach() for number in self._mine]
        offsets, size = offsets_of(tensors)
        try:
            self._writer.memory.reserve(size)
        except OSError as error:
            self._pending.answer = {"error": f"no memory for a copy of {size} bytes: {error}"}
        else:
            self._writer.memory.fill(tensors, offsets)
            self._writer.send({
                "do": "write", "directory": str(directory), "rank": self._ranks.rank, "size": size,
                "index": json.dumps(plan.index_of(state, self._mine, offsets)),
                "common": json.dumps(state.common) if self._ranks.rank == 0 else None,
            })  # fmt: skip
        if self.background if background is None else background:
            self._pending.stalled = time.monotonic() - began
        else:
            self._finish()

    def poll(self) -> None:
        """Moves the save in flight forward, if there is one. Call it every step; it waits for nothing."""
        if self._pending is None:
            return
        if self._ranks.voting:
            self._advance(*self._ranks.count())
        if self._pending is not None:
            self._cast(wait=False)

    def wait(self) -> None:
        """Finishes the save in flight. Raises UserError when the newest save failed, naming the last good checkpoint."""
        self._finish()
        if self._failed is not None:
            newest = self.newest()
            good = f"the last good checkpoint is {newest}" if newest else "there is no good checkpoint"
            raise UserError("checkpoint", self.directory, f"the save of step {self._failed.step} failed: {self._failed.reason}; {good}")

    def newest(self) -> Path | None:
        """The complete checkpoint that was written last."""
        found = m.steps(self.directory)
        return found[-1] if found else None

    def protect(self, path: Path) -> None:
        """Never removes this checkpoint (one that is being read, or that a later stage starts from)."""
        self._protected.add(Path(path).absolute())

    def protect_step(self, step: int) -> bool:
        """Never removes the checkpoint of this step, in place of the one named before; False where there is none (its save failed)."""
        path = self.directory / m.step_name(step)
        if not (path / m.MANIFEST).is_file():
            return False
        self._protected.discard(self._chosen)
        self._chosen = path
        self._protected.add(path)
        return True

    @property
    def failed(self) -> int | None:
        """The step whose save failed, where none has succeeded since; the same on all ranks."""
        return self._failed.step if self._failed else None

    @property
    def pending(self) -> int | None:
        """The step of the save in flight."""
        return self._pending.step if self._pending else None

    @property
    def writer_pid(self) -> int | None:
        return self._writer.pid

    def close(self) -> None:
        """Ends the writer process and frees its memory. What is in flight is finished, not reported."""
        self._finish()
        self._writer.stop()
        self._writer.memory.close()
        self._ranks.close()

    def _prepare(self) -> str:
        problem, nonce = None, secrets.token_hex(4)
        if self._ranks.rank == 0:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                cleared = recover(self.directory)
                if cleared:
                    logger.warning("checkpoints: cleared what unfinished saves left: %s", ", ".join(cleared))
                    self._event("save_cleared", names=cleared)
            except OSError as error:
                problem = f"{error.strerror}: checkpoints cannot be written there"
        problem, nonce = self._ranks.gather((problem, nonce))[0]
        if problem:
            raise UserError("run.dir", self.directory.parent, problem)
        self._writer.start()
        return nonce

    def _assign(self, state: plan.State) -> None:
        """The pieces this rank writes: agreed anew only when some rank's pieces changed."""
        if not self._ranks.all(state.pieces == self._pieces):
            self._mine = plan.assign(self._ranks.gather(state.pieces))[self._ranks.rank]
            self._pieces = state.pieces

    def _finish(self) -> None:
        while self._pending is not None:
            if not self._ranks.voting:
                self._cast(wait=True)
            self._advance(*self._ranks.count())

    def _cast(self, *, wait: bool) -> None:
        answer = self._pending.answer if self._pending.answer is not None else self._writer.answer(wait=wait)
        self._ranks.cast(done=answer is not None, good=answer is None or "error" not in answer)

    def _advance(self, done: bool, good: bool) -> None:
        """To the next phase, when every rank is done with this one. All ranks do the same."""
        pending = self._pending
        if not done:
            return
        mine = pending.answer if pending.answer is not None else self._writer.answer()
        if pending.phase == "discard":
            self._pending, self._failed = None, pending
            logger.warning("checkpoints: the save of step %d failed: %s", pending.step, pending.reason)
            self._event("save_failed", step=pending.step, reason=pending.reason)
        elif not good:
            reasons = self._ranks.gather(mine.get("error"))
            pending.reason = next(f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason)
            self._next("discard", {"directory": str(pending.directory)})
        elif pending.phase == "write":
            self._next("commit", {
                "directory": str(pending.directory), "ranks": self._ranks.size, "record": pending.record,
                "keep": self.keep, "protect": [str(path) for path in self._protected],
            })  # fmt: skip
        else:
            self._pending = self._failed = None
            seconds = time.monotonic() - pending.began
            self._event(
                "save", step=pending.step, path=str(self.directory / m.step_name(pending.step)), bytes=mine.get("bytes"),
                hash=mine.get("hash"), stalled=round(seconds if pending.stalled is None else pending.stalled, 4), seconds=round(seconds, 4),
            )  # fmt: skip

    def _next(self, phase: str, job: dict) -> None:
        self._pending.phase, self._pending.answer = phase, {}
        if self._ranks.rank == 0:  # the others are done with this phase at once
            self._pending.answer = None
            self._writer.send({"do": phase, **job})

    def _event(self, kind: str, **fields) -> None:
        if self._events is not None and self._ranks.rank == 0:
            self._events.write(kind, **fields)
