"""A course of checks that all ranks go through together: one line for each, and an end for one that hangs.

What a rank found goes to rank 0 through the store (session.py), never through a collective: those are what is being checked.
"""
import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from megatron_ext.files import write_whole


class Wrong(Exception):
    """A check that ran to its end on this rank and found something wrong."""


@dataclass(frozen=True)
class Line:
    """What a check came to. `what`: found, or wrong; `remedy`: what to do."""

    name: str
    good: bool
    what: str
    remedy: str = ""
    seconds: float = 0.0

    def text(self) -> str:
        end = f"; what to do: {self.remedy}" if self.remedy and not self.good else ""
        return f"{'good' if self.good else 'BAD ':<5} {self.name:<12} {self.what}{end}"


@dataclass(frozen=True)
class Check:
    """`body` is collective and says what it found; it raises `Wrong` at its end, so that no rank waits for another. `fatal`: where it is bad, nothing
    behind it can run."""

    name: str
    body: Callable[[], str]
    remedy: str
    fatal: bool = False


class Course:
    """The checks in order, on this rank; rank 0 prints."""

    def __init__(self, options: argparse.Namespace, session, checks: Sequence[Check]):
        self.options, self.session, self.checks = options, session, checks
        self.lines: list[Line] = []
        self._began = time.monotonic()
        self._current: Check | None = None

    def run(self) -> int:
        from megatron_ext.contact.guard import Guard

        guard = Guard(self._late)
        try:
            for check in self.checks:
                self._current, self._began = check, time.monotonic()
                with guard.expects(check.name, self.options.limit):
                    good, said = self._attempt(check)
                if not self.session.post(check.name, {"good": good, "said": said, "hung": False}):
                    time.sleep(8 * self.options.limit)  # the guard's thread has, and is ending this process
                if not self._go_on(check):
                    break
        finally:
            guard.close()
        return self._end()

    def _attempt(self, check: Check) -> tuple[bool, str]:
        try:
            return True, check.body()
        except Wrong as wrong:
            return False, str(wrong)
        except Exception as error:  # noqa: BLE001 whatever it is, it is what the check found
            if self.session.rank == 0 or self.options.json is False:
                traceback.print_exc(file=sys.stderr)
            return False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"

    def _go_on(self, check: Check) -> bool:
        """Whether there is anything behind this check, the same on every rank."""
        if self.session.rank == 0:
            self._judge(check)
            self.session.tell(f"after {check.name}", self.lines[-1].good or not check.fatal and "hung" not in self.lines[-1].what)
        return bool(self.session.hear(f"after {check.name}", 3 * self.options.limit))

    def _judge(self, check: Check) -> None:
        # A rank whose peers failed waits until its guard gives up: as long as the check may take.
        answers = self.session.collect(check.name, self.options.limit + 30)
        self.lines.append(line_of(check, answers, time.monotonic() - self._began))
        if not self.options.json:
            print(self.lines[-1].text(), flush=True)

    def _late(self, waiting) -> None:
        """In the guard's thread: the main one hangs for good."""
        check = self._current
        if self.session.post(check.name, {"good": False, "said": f"hung for {self.options.limit:g} s", "hung": True}):
            code = 1
            try:
                self._go_on(check)
                code = self._end()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(0 if "MEGATRON_EXT_PARENT" in os.environ else code)

    def _end(self) -> int:
        session, options = self.session, self.options
        if session.rank == 0:
            bad = [line.name for line in self.lines if not line.good]
            skipped = [check.name for check in self.checks[len(self.lines):]]
            good = not bad and not skipped
            if options.json:
                print(json.dumps({"good": good, "ranks": session.ranks, "checks": [asdict(line) for line in self.lines], "not_run": skipped}), flush=True)
            else:
                if skipped:
                    print(f"      not run: {', '.join(skipped)}", flush=True)
                print("acceptance: " + ("all good" if good else f"bad: {', '.join(bad)}"), flush=True)
            if options.result is not None:
                write_whole(options.result, json.dumps(good))
            session.tell("good", good)
        good = session.hear("good", 3 * options.limit)
        session.leave()
        return 0 if good else 1


def line_of(check: Check, answers: Sequence[dict | None], seconds: float) -> Line:
    """One line from what the ranks said."""
    silent = [rank for rank, answer in enumerate(answers) if answer is None]
    failed = {rank: answer["said"] for rank, answer in enumerate(answers) if answer is not None and not answer["good"] and not answer["hung"]}
    hung = {rank: answer["said"] for rank, answer in enumerate(answers) if answer is not None and answer["hung"]}
    if failed:  # who hangs waits for these
        said = list(failed.values())
        where = "" if len(failed) == len(answers) and len(set(said)) == 1 else f"rank {next(iter(failed))}: "
        more = f" (and {len(failed) - 1} more)" if where and len(failed) > 1 else ""
        return Line(check.name, False, where + said[0] + more, check.remedy, seconds)
    if silent:
        return Line(check.name, False, f"hung: rank(s) {_some(silent)} gave no answer", check.remedy, seconds)
    if hung:
        return Line(check.name, False, f"{next(iter(hung.values()))} on rank(s) {_some(list(hung))}", check.remedy, seconds)
    return Line(check.name, True, answers[0]["said"], check.remedy, seconds)


def _some(ranks: Sequence[int], most: int = 8) -> str:
    return ", ".join(map(str, ranks[:most])) + (f" and {len(ranks) - most} more" if len(ranks) > most else "")
