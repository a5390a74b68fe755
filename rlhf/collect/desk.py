"""The desk that hands tasks to people and takes their decisions: who sees what next, and what becomes of an answer that comes twice or too
late.

A task is to be ordered by `collect.votes` people; a share of them, chosen by a hash (`collect.shared`), by `collect.shared_votes`, so that
agreement is known. Whoever asks gets what is open on their screen; else what they put aside by undoing; else a task that others have begun;
else one of the domain that is furthest behind its target. A task on somebody's screen is kept for them for `collect.lease` seconds; afterwards
others may have it too.

No web in here: `server.py` asks, one call at a time.
"""
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from megatron_ext.config.schema import CollectConfig
from rlhf.collect import agreement
from rlhf.collect.ballots import SKIPS, Person, fit, replay
from rlhf.collect.log import AppendLog
from rlhf.collect.progress import Targets
from rlhf.collect.tasks import Task

OFTEN = 500  # tasks with several votes up to which agreement is counted after every decision; beyond, every AGE seconds
AGE = 10.0


class Refused(Exception):
    """An action that is not taken. code: of HTTP."""

    def __init__(self, code: int, reason: str):
        super().__init__(reason)
        self.code = code


@dataclass(frozen=True)
class _Agreement:
    actions: int
    at: float
    found: dict


class Desk:
    """Args:
        tasks: by id, in the order in which they are handed out. log: of the actions, open. now: the clock, seconds of the epoch, which may be set back
            or forward at any time. ticks: seconds since any moment, which only go on: how long somebody has had a task is measured by it.
    Attributes: misfits: decisions that no longer fit their tasks, by reason (`ballots.fit`).
    Raises:
        UserError: a log that is not one.
    """

    def __init__(self, tasks: Mapping[str, Task], log: AppendLog, settings: CollectConfig, now: Callable[[], float] = time.time,
                 ticks: Callable[[], float] = time.monotonic):
        self.tasks, self.settings, self._log, self._now, self._ticks = tasks, settings, log, now, ticks
        self.ballots = replay(log.records(), log.path)
        self.misfits = fit(self.ballots, tasks)
        # Since when a person has had their task, by `ticks`; an earlier server's clock is believed as far as it lies in the past.
        self._since = {name: ticks() - max(0.0, now() - person.since) for name, person in self.ballots.people.items() if person.open is not None}
        self.targets = Targets.of(settings)
        self._sizes: dict[str, int] = {}
        # Tasks that want more votes, as ordered sets: untouched ones by domain, and those that somebody has voted on.
        self._fresh: dict[str, dict[str, None]] = {}
        self._begun: dict[str, None] = {}
        self._ranked: dict[str, int] = {}  # domain -> tasks with an order
        self._several: dict[str, None] = {}  # tasks that two or more people ordered
        self._agreement: _Agreement | None = None
        for task in tasks.values():
            self._sizes[task.domain] = self._sizes.get(task.domain, 0) + 1
            self._ranked.setdefault(task.domain, 0)
            self._ranked[task.domain] += self._is_ranked(task.id)
            self._place(task)

    # ---- what a person does --------------------------------------------------------------------------------------------------

    def decide(self, name: str, task_id: object, order: object) -> None:
        """Takes an order: groups of answers' ids, best first. The same one twice is taken once (its answer may have been lost on the way).
        Raises Refused; OSError where it cannot be written, and then nothing has changed."""
        task, person = self._task(task_id), self.ballots.person(name)
        groups = _groups(order, {answer.id for answer in task.answers})
        if self._again(name, person, task, groups):
            return
        self._must_be_open(person, task)
        self._act("decide", name, task, order=groups, shown=self.shown(name, task), seconds=self._seconds(name), of=task.digest)

    def skip(self, name: str, task_id: object, reason: object) -> None:
        """Raises as `decide`."""
        task, person = self._task(task_id), self.ballots.person(name)
        if reason not in SKIPS:
            raise Refused(422, f"reason is one of {', '.join(SKIPS)}")
        if self._again(name, person, task, None):
            return
        self._must_be_open(person, task)
        self._act("skip", name, task, reason=reason, seconds=self._seconds(name), of=task.digest)

    def undo(self, name: str) -> None:
        """Takes back the last decision or skip; again: the one before. Raises Refused where there is none."""
        person = self.ballots.person(name)
        last = next((task for task in person.done[-1:] if task in self.tasks), None)
        if last is None:
            raise Refused(409, "there is nothing to undo")
        self._act("undo", name, self.tasks[last])

    def current(self, name: str) -> Task | None:
        """The task on this person's screen, a new one where there is none; None where none is left for them."""
        person = self.ballots.person(name)
        if person.open in self.tasks:
            return self.tasks[person.open]
        task = next(self._candidates(name), None)
        if task is not None:
            self._act("open", name, task)
        return task

    # ---- what is shown -------------------------------------------------------------------------------------------------------

    def state(self, name: str) -> dict:
        """All that the page of this person shows, ready for JSON."""
        task, person = self.current(name), self.ballots.person(name)
        shown = None
        if task is not None:
            draft = person.drafts.get(task.id)
            texts = {answer.id: answer.text for answer in task.answers}
            shown = {"id": task.id, "domain": task.domain, "language": task.language, "prompt": [dict(message) for message in task.prompt],
                     "answers": [{"id": one, "text": texts[one]} for one in self.shown(name, task)],
                     "draft": [list(tied) for tied in draft] if draft else None}
        return {"annotator": name, "choose": self.settings.choose, "task": shown, "done": len(person.done), "undo": bool(person.done), "skips": SKIPS,
                "waiting": task is None and self._others_hold(name), "progress": self.progress(), "agreement": self.agreement()}

    def shown(self, name: str, task: Task) -> list[str]:
        """The answers' ids in the order in which this person sees them: another one for each person, the same at each reload."""
        return sorted((answer.id for answer in task.answers), key=lambda one: hashlib.sha256(f"{task.id}\0{name}\0{one}".encode()).digest())

    def progress(self) -> dict:
        """Tasks ordered by at least one person, against the targets."""
        return self.targets.progress(self._ranked, self._sizes)

    def agreement(self) -> dict:
        """See `agreement.of_orders`, without names."""
        held, now = self._agreement, self._ticks()
        if held is None or held.actions != self.ballots.actions and (held.found["tasks"] <= OFTEN or now - held.at > AGE):
            found = agreement.of_orders(self.ballots.orders(self._several))
            held = self._agreement = _Agreement(self.ballots.actions, now, {key: value for key, value in found.items() if key != "people"})
        return held.found

    # ---- inside --------------------------------------------------------------------------------------------------------------

    def _task(self, task_id: object) -> Task:
        task = self.tasks.get(task_id) if isinstance(task_id, str) else None
        if task is None:
            raise Refused(404, "there is no such task")
        return task

    def _again(self, name: str, person: Person, task: Task, groups: list | None) -> bool:
        if person.done[-1:] != [task.id] or person.open == task.id or name not in self.ballots.choices.get(task.id, {}):
            return False
        order = self.ballots.choices[task.id][name].order
        return (None if order is None else [list(tied) for tied in order]) == groups

    def _must_be_open(self, person: Person, task: Task) -> None:
        if person.open != task.id:
            raise Refused(409, "this task is not the one that is open for you: it was answered already, or another window went on")

    def _act(self, event: str, name: str, task: Task, **more: object) -> None:
        action = {"event": event, "annotator": name, "task": task.id, "at": round(self._now(), 3), **more}
        was = self._is_ranked(task.id)
        self._log.append(action)
        self.ballots.apply(action)
        if event in ("open", "undo"):
            self._since[name] = self._ticks()
        if event != "open":
            self._ranked[task.domain] += self._is_ranked(task.id) - was
            self._place(task)

    def _seconds(self, name: str) -> float:
        """For how long this person has had the task on their screen."""
        return round(self._ticks() - self._since[name], 1)

    def _is_ranked(self, task: str) -> bool:
        return any(choice.order is not None for choice in self.ballots.choices.get(task, {}).values())

    def _wanted(self, task: Task) -> int:
        share = int.from_bytes(hashlib.sha256(f"shared\0{task.id}".encode()).digest()[:8], "big") / 2**64
        return max(self.settings.votes, self.settings.shared_votes) if share < self.settings.shared else self.settings.votes

    def _place(self, task: Task) -> None:
        """Puts a task where its votes say."""
        choices = self.ballots.choices.get(task.id, {})
        votes = len(choices)
        self._several.pop(task.id, None)
        if sum(choice.order is not None for choice in choices.values()) > 1:
            self._several[task.id] = None
        self._fresh.setdefault(task.domain, {}).pop(task.id, None)
        self._begun.pop(task.id, None)
        if votes == 0:
            self._fresh[task.domain][task.id] = None
        elif votes < self._wanted(task):
            self._begun[task.id] = None

    def _candidates(self, name: str) -> Iterator[Task]:
        """Tasks that this person may have, the next one first."""
        held = self._held(name)
        for task_id in reversed(self.ballots.person(name).back):
            if task_id in self.tasks and self._free(self.tasks[task_id], name, held):
                yield self.tasks[task_id]
        for task_id in self._begun:
            if self._free(self.tasks[task_id], name, held):
                yield self.tasks[task_id]
        for domain in sorted(self._fresh, key=lambda one: (self.targets.share(one, self._ranked[one]), one)):
            for task_id in self._fresh[domain]:
                if self._free(self.tasks[task_id], name, held):
                    yield self.tasks[task_id]

    def _held(self, name: str) -> dict[str, int]:
        """task -> how many others have it on their screens, or put it aside."""
        found: dict[str, int] = {}
        for other, person in self.ballots.people.items():
            if other != name and person.open is not None and self._seconds(other) < self.settings.lease:
                for task in (person.open, *person.back):
                    found[task] = found.get(task, 0) + 1
        return found

    def _free(self, task: Task, name: str, held: Mapping[str, int]) -> bool:
        choices = self.ballots.choices.get(task.id, {})
        return name not in choices and len(choices) + held.get(task.id, 0) < self._wanted(task)

    def _others_hold(self, name: str) -> bool:
        """Whether something would be left for this person if nobody else were at the desk."""
        waiting = (*self._begun, *(task for tasks in self._fresh.values() for task in tasks))
        return any(self._free(self.tasks[task], name, {}) for task in waiting)


def _groups(order: object, ids: set[str]) -> list[list[str]]:
    """Raises Refused: not every answer once."""
    if not isinstance(order, list) or not all(isinstance(tied, list) and tied and all(isinstance(one, str) for one in tied) for tied in order):
        raise Refused(422, "order is a list of lists of answers' ids, best first")
    named = [one for tied in order for one in tied]
    if len(named) != len(ids) or set(named) != ids:
        raise Refused(422, "order names every answer of the task once")
    return [list(tied) for tied in order]
