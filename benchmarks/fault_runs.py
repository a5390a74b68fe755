"""What the runs of fault_campaign.py are made of: the command line, a life, the run that nobody touches, a disk that fills."""
import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from campaign_kills import ROOT, Life, descendants
from fault_kinds import HANG
from small import TINY, command, environment, newest, prepare_text, records

from megatron_ext.parallel.job import held_port

STEPS, EVERY, AHEAD, LENGTH = 150, 4, 9, 6  # steps of a run, between checkpoints, of a life at most; faults of a run
AFTER = 4  # steps compared after a change of layout: rounding grows with every step
NEAR = 2e-6
LIMIT = 240.0  # seconds for a life to come to its fault, or to its end
ROOM = 64  # MiB for the checkpoints of a run whose disk will fill
SAMPLES = 8  # a step
WORDS = (
    *(word for word in TINY if "train.steps" not in word), "log.wandb=disabled", "log.every=1000",
    "launch.device=cpu", f"checkpoint.every={EVERY}", "checkpoint.keep=4", "checkpoint.load=auto", f"health.hang_timeout={HANG:.0f}",
)
LAYOUTS = {
    "tp2": ("parallel.tp=2", "launch.ranks=2"), "dp2": ("launch.ranks=2",), "pp2": ("parallel.pp=2", "launch.ranks=2"), "one": (),
}
MOVES = {"other_layout": ("tp2", ("pp2", "dp2")), "other_ranks": ("tp2", ("one",))}


@dataclass
class Fault:
    """One fault and what came of it. `seconds`: until the first new step (of the next life, where this one died); full_disk: until a save."""

    kind: str
    run: str
    step: int = 0
    code: int | None = None
    seconds: float | None = None
    problems: list[str] = field(default_factory=list)
    hit: float = 0.0  # monotonic time

    def expect(self, condition: bool, text: str) -> None:
        if not condition:
            self.problems.append(text)


class Started(Life):
    """A life of any command."""

    def __init__(self, typed: list[str], log: Path):
        self.log, self.family = log, set()
        log.write_bytes(b"")
        self.process = self.start(typed)

    def start(self, typed: list[str]) -> subprocess.Popen:
        with open(self.log, "ab") as out:
            return subprocess.Popen(typed, env=environment(), stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=ROOT)

    def lasts(self, limit: float) -> float:
        """Seconds from now until it has ended, `limit` at most, counted by ticks as the watchdog does: while the whole machine stands still, no job can end."""
        taken, last = 0.0, time.monotonic()
        while self.process.poll() is None and taken < limit:
            time.sleep(0.02)
            now = time.monotonic()
            taken, last = taken + min(now - last, 0.5), now
        return taken


class Nodes(Started):
    """A life of a command on two nodes: on each a torchrun, which starts one rank. `process` is the torchrun of one node, `other` that of the other.

    Args:
        typed: the interpreter and its arguments.
        lost: the node (0 or 1) that `lose` takes away.
    """

    def __init__(self, typed: list[str], log: Path, *, lost: int):
        self.held = contextlib.ExitStack()
        port = self.held.enter_context(held_port())

        def agent(node: int) -> list[str]:
            return [typed[0], "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", f"--node-rank={node}", "--master-addr=127.0.0.1",
                    f"--master-port={port}", *typed[1:]]

        super().__init__(agent(1 - lost), log)
        self.other = self.start(agent(lost))

    def lose(self) -> None:
        """Everything on one node at once."""
        for pid in (self.other.pid, *descendants(self.other.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.other.wait()

    def kill(self) -> None:
        self.lose()
        super().kill()
        self.held.close()


class Runs:
    """What all runs of a campaign share."""

    def __init__(self, scratch: Path, seed: int, say: Callable[[str], None], *, steps: int = STEPS):
        self.scratch, self.draw, self.say, self.steps = scratch, random.Random(seed), say, steps  # draw: what is hit, and when
        self.data = prepare_text(scratch)
        self.faults: list[Fault] = []
        self._untouched: dict[tuple, Path] = {}
        self.newest_before = 0  # the newest sound checkpoint when the life at hand began
        self.spoiled, self.content = Path(), ("", b"")  # the checkpoint that was damaged last; which file, and what it held then

    def typed(self, run: Path, *words: str) -> list[str]:
        return command(run, self.data, *WORDS, f"train.steps={self.steps}", f"optim.decay_steps={self.steps}", *words)

    def untouched(self, *words: str) -> Path:
        """The run that nobody touches, made once."""
        if words not in self._untouched:
            run = self.scratch / f"untouched_{len(self._untouched)}"
            self.finish(self.typed(run, *words))
            self._untouched[words] = run
        return self._untouched[words]

    def finish(self, typed: list[str]) -> None:
        life = Started(typed, self.scratch / "log.txt")
        try:
            code = life.process.wait(timeout=LIMIT)
        finally:
            life.kill()
        if code:
            raise RuntimeError(f"exit code {code}: {life.log.read_text()[-3000:]}")

    def alike(self, run: Path, other: Path) -> list[str]:
        """What differs between two runs that are to be the same bit for bit."""
        from megatron_ext.checkpoint.compare import compare

        mine, theirs = ([(record["step"], record["loss"]) for record in records(path)] for path in (run, other))
        found = [] if mine == theirs and len(mine) == self.steps else ["the losses are not those of the undisturbed run"]
        found += [f"the last checkpoints differ: {text}" for text in compare(newest(run), newest(other))[:3]]
        return found


class Disk:
    """A small file system for the checkpoints of a run. Raises RuntimeError where it cannot be mounted."""

    def __init__(self, directory: Path):
        self.directory, self._filler = directory, directory / "filler"
        directory.mkdir(parents=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}m", "fault_campaign", str(directory)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"no file system can be mounted (root is needed): {done.stderr.strip()}")

    def fill(self) -> None:
        with open(self._filler, "wb", buffering=0) as file:
            try:
                while file.write(bytes(1 << 16)):
                    pass
            except OSError:
                return

    def empty(self) -> None:
        self._filler.unlink()

    def close(self) -> None:
        subprocess.run(["umount", str(self.directory)], check=True)
