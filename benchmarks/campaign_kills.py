"""Twenty SIGKILLs over the life of one run, at seeded random moments, several while a checkpoint is being written: writes docs/resume.md.

    python benchmarks/campaign_kills.py [--kills 20] [--seed 1] [--page docs/resume.md] [key=value ...]

The run is the command line that a user types (`python -m megatron_ext train ... checkpoint.load=auto`), and a kill takes all processes of it at
once: the command, its ranks, their writers. After each one every checkpoint on disk is verified by hash, and the life that follows must go on
from the last one that was complete. At the end the losses and the last checkpoint must be those of a run that nobody touched, bit for bit.
Exit code 1 when any of this fails.

Moments are drawn from three kinds: at a step (some time into it), while a save is in flight (a `*.tmp-*` directory is there), and while
the command is still starting or loading.
"""
import argparse
import contextlib
import datetime
import importlib.metadata
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from small import environment, prepare_text, records

from megatron_ext.checkpoint.manifest import leftovers, step_name, steps, verify
from megatron_ext.errors import UserError

EVERY = 10
WORDS = (
    "model=micro_llama", "parallel=tp2", "launch.ranks=2", "data.sequence_length=64", "train.global_batch_size=8", "train.micro_batch_size=8",
    "optim.lr=0.002", "optim.warmup_steps=10", "validation.every=0", "validation.at_end=false", f"checkpoint.every={EVERY}",
    "checkpoint.keep=3", "checkpoint.background=true", "checkpoint.load=auto",
)
AHEAD = 11  # steps of a life, on average: longer than between two checkpoints, so that the run gets on


IN_STEPS, IN_SAVE = 0.3, 0.1  # seconds up to which a kill comes later than its step, or than the beginning of its save
LEAST = 4  # of 20 kills must hit a save, else the campaign shows too little


@dataclass
class Kill:
    """One kill. Steps count from 1; 0 where there is none yet."""

    moment: str
    step: int  # the last step whose line is in metrics.jsonl, or where this life had begun
    saving: str  # the save in flight, "" if there was none
    complete: int  # newest complete checkpoint when all was dead
    damaged: list[str]
    resumed: int | None = None  # step from which the next life went on; None while none has got that far


class Life:
    """One process of the command line with all that it starts. Its output goes to a file, for when it fails."""

    def __init__(self, words: list[str], log: Path):
        self.log = log
        with open(log, "wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "megatron_ext", "train", *words], env=environment(), stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=ROOT,
            )
        self.family: set[int] = set()

    def look_around(self) -> None:
        """Learns the processes of this life ahead: reading /proc takes as long as a small save does."""
        self.family = {self.process.pid, *descendants(self.process.pid)}

    def until(self, condition, *, limit: float = 600) -> None:
        deadline = time.monotonic() + limit
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the moment of the kill did not come (exit code {self.process.poll()}): {self.log.read_text()[-3000:]}")
            time.sleep(0.002)

    def kill(self) -> None:
        """SIGKILL to the command and all below it; returns when they are gone. Nothing where it has ended by itself."""
        if self.process.poll() is not None:
            return
        if not self.family:
            self.look_around()
        for pid in self.family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        while any(alive(pid) for pid in self.family):
            time.sleep(0.002)


def _stat(pid: int) -> list[str]:
    """State and parent (and more) of a process; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return []


def alive(pid: int) -> bool:
    return _stat(pid)[:1] not in ([], ["Z"])


def descendants(pid: int) -> list[int]:
    parents = {int(path.name): int(stat[1]) for path in Path("/proc").glob("[0-9]*") if (stat := _stat(int(path.name)))}
    found, grown = {pid}, True
    while grown:
        more = {child for child, parent in parents.items() if parent in found} - found
        found, grown = found | more, bool(more)
    return sorted(found - {pid})


class Run:
    """What a run directory says, also while it is written."""

    def __init__(self, directory: Path):
        self.directory, self.checkpoints = directory, directory / "checkpoints"

    def step(self) -> int:
        """The last step of metrics.jsonl, from the end of the file: it is asked every 2 ms."""
        path = self.directory / "metrics.jsonl"
        if not path.exists():
            return 0
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 1500))
            lines = file.read().split(b"\n")[:-1]
        return int(lines[-1].split(b'"step": ')[1].split(b",")[0]) if lines and b'"step": ' in lines[-1] else 0

    def saves(self) -> list[Path]:
        """Saves in flight, or dead. An old checkpoint that is being removed has such a name too, of a step before the complete one."""
        with contextlib.suppress(FileNotFoundError):  # renamed or removed while we list
            return [path for path in leftovers(self.checkpoints) if path.name > step_name(self.complete()) + "."]
        return []

    def complete(self) -> int:
        found = steps(self.checkpoints)
        return int(found[-1].name.removeprefix("step_")) if found else 0

    def damaged(self) -> list[str]:
        """Every checkpoint hashed. What is wrong, if anything."""
        found = []
        for path in steps(self.checkpoints):
            try:
                verify(path)
            except UserError as error:
                found.append(str(error))
        return found

    def begins(self) -> list[int]:
        """The steps from which its lives went on, of those that got so far."""
        return [event["step"] for event in records(self.directory, "events", growing=True) if event["kind"] in ("start", "resume")]


def moments(kills: int, seed: int) -> list[str]:
    """Of 20: 8 at a step, 8 in a save, 4 while starting; in random order, the first at a step."""
    starting, saving = kills // 5, 2 * kills // 5
    kinds = ["starting"] * starting + ["saving"] * saving + ["step"] * (kills - starting - saving - 1)
    random.Random(seed).shuffle(kinds)
    return ["step", *kinds]


def live_and_die(run: Run, words: list[str], moment: str, draw: random.Random, log: Path) -> Kill:
    """One life up to its kill."""
    lives, before, stale = len(run.begins()), run.complete(), set(run.saves())  # stale: of the kill before, until this life clears it
    life = Life(words, log)
    try:
        if moment == "starting":
            time.sleep(draw.uniform(0.3, 9.0))
        else:
            life.until(lambda: len(run.begins()) > lives)
            goal = before + draw.randint(1, 2 * AHEAD - 1)
            life.until(lambda: run.step() >= goal)
            life.look_around()
            if moment == "saving":
                old = set(run.saves())
                life.until(lambda: set(run.saves()) - old)
            time.sleep(draw.uniform(0, IN_SAVE if moment == "saving" else IN_STEPS))
    finally:
        life.kill()
    saving = [path.name.split(".")[0] for path in run.saves() if path not in stale]
    begun = run.begins()
    reached = max(run.step(), begun[-1]) if len(begun) > lives else before
    return Kill(moment, reached, ", ".join(saving), run.complete(), run.damaged())


def campaign(data: Path, scratch: Path, kills: int, seed: int, words: list[str], say) -> tuple[list[Kill], list[str], int]:
    """The kills, what went wrong, and how many steps the run has."""
    draw, run, total = random.Random(seed), Run(scratch / "run"), (kills + 2) * AHEAD
    words = [*WORDS, f"data.path={data}", f"train.steps={total}", *words]
    here = [*words, f"run.dir={run.directory}"]
    found: list[Kill] = []
    for number, moment in enumerate(moments(kills, seed), 1):
        lives = len(run.begins())
        kill = live_and_die(run, here, moment, draw, scratch / "log.txt")
        for earlier in found:
            if earlier.resumed is None and len(run.begins()) > lives:
                earlier.resumed = run.begins()[lives]
        found.append(kill)
        say(f"kill {number} ({moment}): step {kill.step}, save in flight: {kill.saving or 'none'}, last complete {kill.complete}")
    lives = len(run.begins())
    finish(here, scratch / "log.txt")
    for kill in found:
        if kill.resumed is None:
            kill.resumed = run.begins()[lives]
    say("the run is through; now the one that nobody touches")
    untouched = Run(scratch / "untouched")
    finish([*words, f"run.dir={untouched.directory}"], scratch / "log.txt")
    return found, wrong(found, run, untouched, total), total


def finish(words: list[str], log: Path) -> None:
    life = Life(words, log)
    try:
        code = life.process.wait(timeout=1800)
    finally:
        life.kill()
    if code:
        raise RuntimeError(f"exit code {code}: {log.read_text()[-3000:]}")


def wrong(found: list[Kill], run: Run, untouched: Run, total: int) -> list[str]:
    """Every promise that was not kept."""
    problems = []
    for number, kill in enumerate(found, 1):
        problems += [f"kill {number} damaged a checkpoint: {text}" for text in kill.damaged]
        if kill.resumed < kill.complete:
            problems.append(f"kill {number}: step {kill.complete} was complete, but the run went on from {kill.resumed}")
    if (hit := sum(bool(kill.saving) for kill in found)) < LEAST * len(found) // 20:
        problems.append(f"only {hit} kills hit a save: nothing is shown about those; take another --seed")
    mine, theirs = records(run.directory), records(untouched.directory)
    if [record["step"] for record in mine] != list(range(1, total + 1)):
        problems.append("metrics.jsonl does not hold every step once")
    if [record["loss"] for record in mine] != [record["loss"] for record in theirs]:
        problems.append("the losses are not those of the untouched run")
    done = subprocess.run(
        [sys.executable, "-m", "megatron_ext.checkpoint.compare", str(run.directory), str(untouched.directory)],
        env=environment(), capture_output=True, text=True, check=False, cwd=ROOT,
    )
    if done.returncode or not done.stdout.rstrip().endswith("identical"):
        problems.append(f"the last checkpoints differ: {done.stdout[-300:]}{done.stderr[-300:]}")
    return problems


def page(found: list[Kill], problems: list[str], total: int, seconds: float, command: str, words: list[str]) -> str:
    import torch

    rows = "\n".join(
        f"| {number} | {kill.moment} | {kill.step} | {kill.saving or '-'} | {kill.complete or 'none'} | {kill.resumed} | {max(0, kill.step - kill.resumed)} |"
        for number, kill in enumerate(found, 1)
    )
    lost = [max(0, kill.step - kill.resumed) for kill in found]
    verdict = "**Failed:** " + "; ".join(problems) if problems else (
        f"Holds: {len(found)} kills, {sum(bool(kill.saving) for kill in found)} of them with a save in flight. No checkpoint was damaged, every life went "
        f"on from the last complete one, all {total} losses in metrics.jsonl are those of the untouched run bit for bit, "
        "and `python -m megatron_ext.checkpoint.compare` finds the last checkpoints identical."
    )
    typed = " ".join([*WORDS, f"train.steps={total}", *words])
    return f"""<!-- Written by `{command}`; not by hand. -->
# Resume: {len(found)} kills in the life of one run

    {command}

The run is what a user types, with a checkpoint every {EVERY} steps, written in the background:

    python -m megatron_ext train {typed}

SIGKILL goes to the command, its ranks and their writers at once, then the same command is started again. Moments (seeded): at a step; while
a save is in flight, up to {IN_SAVE} s into it (it may be through by then); while the command is still starting or loading, up to 9 s after its start.

| kill | moment | step at the kill | save in flight | last complete checkpoint | resumed at | steps lost |
|---|---|---|---|---|---|---|
{rows}

{verdict}

How to read it: a save in flight at the kill is lost, whatever was complete before is not. The steps lost are those since the last complete
checkpoint: at most {max(lost)} here, {sum(lost) / len(lost):.1f} on average. That can be more than the {EVERY} between two checkpoints, since training goes
on while one is written. "step at the kill" is the last one in metrics.jsonl; a life that was killed while starting stands where the one before it
left its last checkpoint.

Python {platform.python_version()}, torch {torch.__version__}, megatron-core {importlib.metadata.version('megatron-core')}, {os.cpu_count()} cores,
{datetime.datetime.now(datetime.UTC):%Y-%m-%d}; {seconds / 60:.0f} minutes.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "resume.md")
    parser.add_argument("words", nargs="*", metavar="key=value", help="of the command line, added to those of every life")
    options = parser.parse_args()
    if options.kills < 1:
        parser.error("--kills must be at least 1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else the life at hand would outlive this process
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="campaign_kills") as name:
        scratch = Path(name)
        data = prepare_text(scratch)
        found, problems, total = campaign(data, scratch, options.kills, options.seed, options.words, lambda line: print(line, flush=True))
    changed = [f"--kills {options.kills}"] * (options.kills != 20) + [f"--seed {options.seed}"] * (options.seed != 1) + options.words
    command = " ".join(["python benchmarks/campaign_kills.py", *changed])
    text = page(found, problems, total, time.monotonic() - began, command, options.words)
    options.page.write_text(text, encoding="utf-8")
    print(text)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
