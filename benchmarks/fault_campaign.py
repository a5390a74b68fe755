"""Random faults over short runs, each held against what fault_kinds.py declares of it: writes results/fault_campaign.json and docs/faults.md.

    python benchmarks/fault_campaign.py [--faults 100] [--seed 1] [--only KIND,...] [--page docs/faults.md] [--output FILE.json]

The runs are the command line that a user types (`python -m megatron_ext train ... checkpoint.load=auto`), a tiny model on one or two ranks. Several
faults hit one run, one a life; after each, every checkpoint is hashed, and the next life must go on from the newest one that is complete and
sound. At the end the run is compared with one that nobody touched. Needs root, for a small file system that fills. Exit code 1 when any
fault came out otherwise than declared.
"""
import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import fault_report
from campaign_kills import Life, Run
from fault_kinds import DECLARED, chains, drawn
from fault_runs import AFTER, AHEAD, LAYOUTS, LENGTH, LIMIT, MOVES, NEAR, SAMPLES, STEPS, Disk, Fault, Nodes, Runs, Started
from hang_trials import children
from small import records

from megatron_ext.checkpoint import manifest


class Campaign(Runs):
    """The faults."""

    # ---- several faults in one run

    def chain(self, name: str, layout: str, kinds: list[str]) -> None:
        run, words = Run(self.scratch / name), LAYOUTS[layout]
        disk = Disk(run.checkpoints) if "full_disk" in kinds else None
        faults: list[Fault] = []
        try:
            for kind in kinds:
                self.say(f"{name} ({layout}): {kind}")
                faults.append(Fault(kind, name))
                self.one(faults, run, words, disk)
            if kinds[-1] != "full_disk":
                life = Started(self.typed(run.directory, *words), self.scratch / "log.txt")
                try:
                    self.begun(life, run, faults, len(run.begins()))
                    code = life.process.wait(timeout=LIMIT)
                finally:
                    life.kill()
                faults[-1].expect(code == 0, f"the last life ended with exit code {code}: {life.log.read_text()[-500:]}")
            for problem in self.alike(run.directory, self.untouched(*words)):
                for fault in faults:
                    fault.problems.append(problem)
        except (RuntimeError, subprocess.TimeoutExpired) as error:  # what is left of this run cannot be held against anything
            faults[-1].problems.append(f"{type(error).__name__}: {error}")
            faults += [Fault(kind, name, problems=["not reached"]) for kind in kinds[len(faults):]]
        finally:
            self.faults += faults
            if disk is not None:
                disk.close()
        for fault in faults:
            if fault.problems:
                self.say(f"NOT AS DECLARED: {fault.kind} in {name}: {'; '.join(fault.problems)}")

    def begun(self, life: Life, run: Run, faults: list[Fault], lives: int) -> None:
        """Returns when a life takes its first step, which ends the fault before."""
        life.until(lambda: len(run.begins()) > lives, limit=LIMIT)
        begin, complete = run.begins()[-1], run.complete()
        life.until(lambda: run.step() > begin or begin >= self.steps, limit=LIMIT)
        earlier = [fault for fault in faults if fault.seconds is None and fault.hit]
        for fault in earlier:
            fault.seconds = round(time.monotonic() - fault.hit, 2)
        if earlier:
            earlier[-1].expect(begin >= self.newest_before, f"step {self.newest_before} was complete, but the run went on from {begin} (now {complete})")

    def one(self, faults: list[Fault], run: Run, words: tuple[str, ...], disk: "Disk | None") -> None:
        """One life and its fault."""
        fault, declared = faults[-1], DECLARED[faults[-1].kind]
        lives, spoiled = len(run.begins()), None
        if fault.kind in ("flipped", "truncated"):
            if len(manifest.steps(run.checkpoints)) < 2:
                self.prepare(run, words)
                lives = len(run.begins())
            spoiled = self.spoil(run, fault)
        typed, log = self.typed(run.directory, *words), self.scratch / "log.txt"
        life = Nodes(typed, log, lost=self.draw.randrange(2)) if fault.kind == "lost_node" else Started(typed, log)
        try:
            self.begun(life, run, faults, lives)
            first = run.complete()
            goal = run.begins()[-1] + self.draw.randint(2, AHEAD)
            life.until(lambda: run.step() >= goal and (spoiled is None or run.complete() > first), limit=LIMIT)
            life.look_around()
            time.sleep(self.draw.uniform(0, 0.1))
            fault.step, before = run.step(), set(manifest.steps(run.checkpoints))
            if fault.kind == "full_disk":
                self.fill(fault, life, run, disk)
            else:
                self.strike(fault, life, run)
            fault.code = life.process.poll()
        finally:
            life.kill()
        fault.expect(fault.code in declared.codes, f"exit code {fault.code}: {life.log.read_text()[-500:]}")
        fault.expect(not before or max(path.name for path in before) <= max((path.name for path in manifest.steps(run.checkpoints)), default=""),
                     "the newest checkpoint is gone")
        fault.problems += [f"damaged: {text}" for text in run.damaged()]
        if fault.kind in ("term", "usr1"):
            fault.expect(run.complete() == run.step(), f"told to stop at step {run.step()}, saved {run.complete()}")
        self.newest_before = run.complete()

    def prepare(self, run: Run, words: tuple[str, ...]) -> None:
        """Until there are two checkpoints; then killed, which is no fault that counts."""
        lives = len(run.begins())
        life = Started(self.typed(run.directory, *words), self.scratch / "log.txt")
        try:
            life.until(lambda: len(run.begins()) > lives and len(manifest.steps(run.checkpoints)) >= 2, limit=LIMIT)
            life.look_around()
        finally:
            life.kill()

    def spoil(self, run: Run, fault: Fault) -> Path:
        """Damages the newest checkpoint; the life that comes must take the one before."""
        good, newest = manifest.steps(run.checkpoints)[-2:]
        file = self.draw.choice(sorted(path for path in newest.iterdir() if path.stat().st_size))
        content = bytearray(file.read_bytes())
        if fault.kind == "truncated":
            content = content[: self.draw.randrange(len(content))]
        else:
            for _ in range(self.draw.randint(1, 3)):
                content[self.draw.randrange(len(content))] ^= 1 << self.draw.randrange(8)
        if bytes(content) == file.read_bytes():  # the same bit twice
            content[0] ^= 1
        file.write_bytes(content)
        self.newest_before, fault.hit = int(good.name.removeprefix("step_")), time.monotonic()
        self.spoiled, self.content = newest, (file.name, bytes(content))
        return newest

    def strike(self, fault: Fault, life: Started, run: Run) -> None:
        """The faults that end a life. Returns when it has ended."""
        declared, process = DECLARED[fault.kind], life.process
        ranks = children(process.pid)
        rank = self.draw.choice(sorted(ranks))
        if fault.kind in ("flipped", "truncated"):
            told = [event for event in records(run.directory, "events", growing=True) if event["kind"] == "checkpoint_damaged"]
            fault.expect(bool(told) and told[-1]["checkpoint"] == str(self.spoiled), "events.jsonl does not name the damaged checkpoint")
            kept = Path(told[-1]["set_aside"]) / self.content[0] if told else None
            fault.expect(kept is not None and kept.is_file() and kept.read_bytes() == self.content[1], "the damaged checkpoint was not kept")
            fault.expect("warning: " in life.log.read_text(), "nothing on the screen")
        began = time.monotonic()
        fault.hit = fault.hit if fault.seconds is not None else began
        if fault.kind == "kill_rank":
            os.kill(ranks[rank], signal.SIGKILL)
        elif fault.kind == "hang":
            os.kill(ranks[rank], signal.SIGSTOP)
        elif fault.kind == "lost_node":
            life.lose()
        elif fault.kind in ("term", "usr1"):
            os.kill(process.pid, signal.SIGTERM if fault.kind == "term" else signal.SIGUSR1)
        else:
            life.kill()
        taken = time.monotonic() - began + life.lasts(declared.end + 60)
        if process.poll() is None:
            fault.problems.append("the life did not end")
        fault.expect(taken <= declared.end, f"the life ended after {taken:.1f} s, declared are {declared.end:.0f} s")
        if fault.kind == "hang":
            hangs = [event for event in records(run.directory, "events") if event["kind"] == "hang"]
            fault.expect(bool(hangs) and [(one["rank"], one["pid"]) for one in hangs[-1]["suspects"]] == [(rank, ranks[rank])],
                         f"rank {rank} was stopped; named: {hangs[-1]['suspects'] if hangs else 'nobody'}")

    def fill(self, fault: Fault, life: Life, run: Run, disk: "Disk") -> None:
        """The disk is full until a save has failed; then there is room again, and the run goes to its end."""
        def told(kind: str) -> int:
            return sum(event["kind"] == kind for event in records(run.directory, "events", growing=True))

        fault.hit, failed = time.monotonic(), told("save_failed")
        disk.fill()
        life.until(lambda: told("save_failed") > failed, limit=LIMIT)
        saved = told("save")
        fault.expect(not run.damaged(), "a checkpoint was damaged by the full disk")
        disk.empty()
        life.until(lambda: told("save") > saved, limit=LIMIT)
        fault.seconds = round(time.monotonic() - fault.hit, 2)
        life.process.wait(timeout=LIMIT)

    # ---- runs of their own

    def moved(self, name: str, kind: str) -> None:
        """Killed in one layout, and on in another, for a few steps."""
        home, others = MOVES[kind]
        away, run, fault = self.draw.choice(others), Run(self.scratch / name), Fault(kind, name)
        self.say(f"{name} ({home} -> {away}): {kind}")
        self.faults.append(fault)
        try:
            self.one([fault], run, LAYOUTS[home], None)
            if not run.complete():  # killed before the first checkpoint
                self.prepare(run, LAYOUTS[home])
                self.newest_before = run.complete()
            last = self.newest_before + AFTER
            life = Started(self.typed(run.directory, *LAYOUTS[away], f"train.steps={last}"), self.scratch / "log.txt")
            try:
                self.begun(life, run, [fault], len(run.begins()))
                code = life.process.wait(timeout=LIMIT)
            finally:
                life.kill()
            fault.expect(code == 0, f"the life in the other layout ended with exit code {code}: {life.log.read_text()[-500:]}")
            theirs = {record["step"]: record["loss"] for record in records(self.untouched(*LAYOUTS[home]))}
            mine = {record["step"]: record["loss"] for record in records(run.directory)}
            fault.expect(sorted(mine) == list(range(1, last + 1)), f"steps {sorted(mine)[:1]} to {sorted(mine)[-1:]} instead of 1 to {last}")
            begin = run.begins()[-1]
            fault.expect(all(mine[step] == theirs[step] for step in mine if step <= begin), "losses before the change differ")
            worst = max(abs(mine[step] - theirs[step]) / theirs[step] for step in mine)
            fault.expect(worst <= NEAR, f"a loss differs by {worst:.1e}")
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            fault.problems.append(f"{type(error).__name__}: {error}")
        if fault.problems:
            self.say(f"NOT AS DECLARED: {kind} in {name}: {'; '.join(fault.problems)}")

    def nan(self, name: str, layout: str, count: int) -> None:
        """Some steps whose samples give a NaN, in one run; of two ranks on one alone."""
        self.say(f"{name} ({layout}): nan, {count} times")
        run = self.scratch / name
        at = sorted(self.draw.sample(range(3, self.steps - 5, 2), count))  # apart, so that train.max_bad_steps is not reached
        firsts = [SAMPLES * place for place in at]
        faults = [Fault("nan", name, step=place + 1 - number) for number, place in enumerate(at)]
        self.faults += faults
        words, bad, starter = LAYOUTS[layout], ",".join(map(str, firsts)), []
        if layout != "one":
            bad, starter = f"{bad}@{self.draw.randrange(2)}", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        typed = [sys.executable, *starter, str(ROOT / "tests" / "nan_batch.py"), bad, *self.typed(run, *words)[3:]]
        life = Started(typed, self.scratch / "log.txt")
        try:
            code = life.process.wait(timeout=LIMIT)
        finally:
            life.kill()
        skip = ",".join(f"{first}:{first + SAMPLES}" for first in firsts)
        events = records(run, "events")
        blamed = {event["samples"][0]: event for event in events if event["kind"] == "blame" and event["whom"] == "data"}
        problems = self.alike(run, self.untouched(*words, f"recovery.skip=[{skip}]")) if code == 0 else [f"exit code {code}: {life.log.read_text()[-500:]}"]
        for fault, first in zip(faults, firsts, strict=True):
            fault.code, fault.problems = code, list(problems)
            fault.expect(first in blamed and blamed[first]["step"] == fault.step, f"samples {first} were not blamed at step {fault.step}")
            fault.seconds = fault_report.between(events, "bad_step", "blame", first)
        if problems:
            self.say(f"NOT AS DECLARED: nan in {name}: {'; '.join(problems)}")


def campaign(scratch: Path, kinds: list[str], seed: int, say: Callable[[str], None], *, steps: int = STEPS) -> list[Fault]:
    """All faults, in runs under `scratch`."""
    found = Campaign(scratch, seed, say, steps=steps)
    layouts = ("tp2", "dp2", "pp2")
    for number, faults in enumerate(chains(kinds, LENGTH)):
        found.chain(f"run_{number}", layouts[number % len(layouts)], faults)
    for number, kind in enumerate(kind for kind in kinds if DECLARED[kind].where == "moved"):
        found.moved(f"moved_{number}", kind)
    count = kinds.count("nan")
    for name, layout, share in (("nan_0", "one", count - count // 2), ("nan_1", "dp2", count // 2)):
        if share:
            found.nan(name, layout, share)
    return found.faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default=",".join(DECLARED), help="kinds, by commas")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "faults.md")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "fault_campaign.json")
    options = parser.parse_args()
    only = options.only.split(",")
    if unknown := [kind for kind in only if kind not in DECLARED]:
        parser.error(f"--only {','.join(unknown)}: the kinds are {', '.join(DECLARED)}")
    if options.faults < 1:
        parser.error("--faults must be at least 1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else the life at hand would outlive this process
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fault_campaign_") as name:
        faults = campaign(Path(name), drawn(options.faults, options.seed, only), options.seed, lambda line: print(line, flush=True))
    changed = [f"--{name} {value}" for name, value in (("faults", options.faults), ("seed", options.seed), ("only", options.only))
               if value != parser.get_default(name)]
    typed = " ".join(["python benchmarks/fault_campaign.py", *changed])  # not where it writes to
    rows = [{name: value for name, value in asdict(fault).items() if name != "hit"} for fault in faults]
    fault_report.write(rows, command=typed, seconds=time.monotonic() - began, output=options.output, page=options.page)
    return 1 if any(row["problems"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
