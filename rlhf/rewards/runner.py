"""Runs the reward functions of a configuration over the responses of an iteration. No torch here.

    with Functions(config.rewards) as functions:
        values, failures = functions(prompts, responses, records, references)

Functions run in processes of their own (pool.py): the first starts with the first scoring, more follow while there is work that lasts, and all wait
for the next iteration. Scores do not depend on how many there are. The rules for what goes wrong:

1. A function that raises, returns what is no finite number, takes longer than `rewards.timeout` for one response or ends its process has no value for
   that response. Where a value is missing stands the mean of the function's other values of this scoring, or 0 where it has none. Every missing
   value is counted, with function and reason.
2. A process that ran out of time is killed and replaced. After five that a function has lost in one scoring, it is not asked for the rest of it.
3. A function without any value in three scorings in a row ends the run: it would teach nothing, and nobody would notice.
"""
import math
import os
import selectors
import tempfile
import time
import weakref
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

from megatron_ext.config.schema import RewardsConfig
from megatron_ext.errors import RunFailed
from rlhf.rewards import sandbox
from rlhf.rewards.pool import Worker, ended
from rlhf.rewards.registry import check

MOST_LOST = 5  # processes that a function may lose in a scoring
MOST_BARREN = 3  # scorings in a row without a value
MOST_WORKERS = 8
LASTING = 0.25  # seconds of work after which another process is worth its start


class Scores(NamedTuple):
    """values: by name, in the configuration's order, one for each response, all finite. failures: (function, reason, how many values it cost)."""

    values: dict[str, list[float]]
    failures: list[tuple[str, str, int]]


class Functions:
    """The functions of `rewards.functions`.

    Args:
        workers: processes at most; None = as many as there are cores, and at most 8.
    Raises:
        UserError: what `check` refuses.
    """

    def __init__(self, rewards: RewardsConfig, *, workers: int | None = None):
        self._asked, self._timeout = check(rewards), rewards.timeout
        self._most = workers or min(MOST_WORKERS, len(os.sched_getaffinity(0)))
        self._workers: list[Worker] = []
        self._barren = Counter()
        self._scratch = tempfile.mkdtemp(prefix="rewards-")
        self._close = weakref.finalize(self, _close, self._workers, self._scratch)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes. A second call does nothing."""
        self._close()

    @property
    def names(self) -> tuple[str, ...]:
        """Of the columns, as the configuration orders them."""
        return tuple(one.name for one in self._asked)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], records: Sequence[Mapping], references: Sequence[str | None]) -> Scores:
        """All functions over all responses.

        Raises:
            RunFailed: a function has failed on everything for the third time in a row; its module cannot be imported any more.
            ValueError: the arguments differ in length, or the functions are closed.
        """
        if not self._close.alive:
            raise ValueError("these reward functions are closed")
        items = [
            {"prompt": prompt, "response": response, "record": dict(record), "reference": reference}
            for prompt, response, record, reference in zip(prompts, responses, records, references, strict=True)
        ]
        answers = _Scoring(self._asked, items, self._timeout).run(self._workers, most=self._most, scratch=self._scratch)
        values, failures = {}, []
        for number, asked in enumerate(self._asked):
            column = [answers[number, index] for index in range(len(items))]
            known = [one["value"] for one in column if "value" in one]
            stand_in = math.fsum(known) / len(known) if known else 0.0
            values[asked.name] = [one.get("value", stand_in) for one in column]
            reasons = Counter(one["failed"] for one in column if "failed" in one)
            failures += [(asked.name, reason, count) for reason, count in reasons.most_common()]
            if items:
                self._count(asked.name, barren=not known, reasons=reasons)
        return Scores(values, failures)

    def _count(self, name: str, *, barren: bool, reasons: Counter) -> None:
        self._barren[name] = self._barren[name] + 1 if barren else 0
        if self._barren[name] >= MOST_BARREN:
            raise RunFailed(f"reward function {name} has failed on every response of {MOST_BARREN} scorings in a row: "
                            f"{'; '.join(f'{reason} ({count} times)' for reason, count in reasons.most_common(3))}. Mend it, or take it out of "
                            "rewards.functions")


class _Scoring:
    """One pass of all functions over all responses. Answers are {"value": float} or {"failed": reason}, by (function, response)."""

    def __init__(self, asked: Sequence, items: Sequence[dict], timeout: float):
        self._asked, self._items, self._timeout = asked, items, timeout
        self._waiting = deque((number, index) for index in range(len(items)) for number in range(len(asked)))
        self._lost, self._returned = Counter(), Counter()
        self.answers: dict[tuple[int, int], dict] = {}

    def run(self, workers: list[Worker], *, most: int, scratch: str) -> dict[tuple[int, int], dict]:
        """Takes `workers` as they are, and leaves in the list those that live; none where it is interrupted."""
        for worker in [worker for worker in workers if worker.dead]:
            workers.remove(worker)
            worker.end()
        with selectors.DefaultSelector() as events:
            for worker in workers:
                events.register(worker, selectors.EVENT_READ)
            try:
                self._run(workers, events, most, scratch)
            except BaseException:
                while workers:
                    workers.pop().end()
                raise
        return self.answers

    def _run(self, workers: list[Worker], events: selectors.BaseSelector, most: int, scratch: str) -> None:
        started = time.monotonic()
        while True:
            self._hand_out(workers, events)
            if not self._waiting and not any(worker.task for worker in workers):
                return
            now = time.monotonic()
            enough = most if now - started > LASTING else 1
            if self._waiting and len(workers) < enough and all(worker.ready for worker in workers):
                workers.append(Worker([one.entry for one in self._asked], scratch=scratch))
                events.register(workers[-1], selectors.EVENT_READ)
            soon = min((worker.deadline for worker in workers), default=now)
            if self._waiting and len(workers) < most:
                soon = min(soon, max(now, started + LASTING) + 0.01)
            for key, _ in events.select(max(0.0, soon - now)):
                self._hear(key.fileobj, workers, events)
            for worker in [worker for worker in workers if worker.deadline <= time.monotonic()]:
                self._late(worker, workers, events)

    def _hand_out(self, workers: list[Worker], events: selectors.BaseSelector) -> None:
        for worker in [worker for worker in workers if worker.idle]:
            while self._waiting and self._lost[self._waiting[0][0]] >= MOST_LOST:
                self.answers[self._waiting.popleft()] = {"failed": f"was not asked after it had lost {MOST_LOST} processes"}
            if not self._waiting:
                return
            task = self._waiting.popleft()
            if not worker.ask(task, {"function": task[0], **self._items[task[1]]}, seconds=self._timeout):
                self._gone(worker, workers, events, asked=False)

    def _hear(self, worker: Worker, workers: list[Worker], events: selectors.BaseSelector) -> None:
        task, answer = worker.task, worker.answer()
        if answer is None:
            self._gone(worker, workers, events, asked=True)
        elif answer:
            self.answers[task] = answer

    def _late(self, worker: Worker, workers: list[Worker], events: selectors.BaseSelector) -> None:
        if not worker.ready:
            raise RunFailed("the process for reward functions did not get ready: a module of rewards.functions hangs when it is imported")
        self._lost[worker.task[0]] += 1
        self.answers[worker.task] = {"failed": f"took longer than rewards.timeout={self._timeout:g} s"}
        self._remove(worker, workers, events)

    def _gone(self, worker: Worker, workers: list[Worker], events: selectors.BaseSelector, *, asked: bool) -> None:
        """A process has ended by itself. If that was before it could have read the question, somebody else gets the question, once."""
        task, code = worker.task, self._remove(worker, workers, events)
        if task is None:
            return
        self._returned[task] += 1
        if not asked and self._returned[task] == 1:
            self._waiting.appendleft(task)
            return
        self._lost[task[0]] += 1
        self.answers[task] = {"failed": f"ended its process ({ended(code)})"}

    def _remove(self, worker: Worker, workers: list[Worker], events: selectors.BaseSelector) -> int:
        events.unregister(worker)
        workers.remove(worker)
        return worker.end()


def _close(workers: list[Worker], scratch: str) -> None:
    """A folder that cannot be deleted stays: no reason for a run to fail at its end."""
    while workers:
        workers.pop().end()
    for _ in range(20):  # code that ran in a process just ended may be writing until its supervisor is gone too
        try:
            return sandbox.remove(scratch)
        except OSError:
            time.sleep(0.1)
