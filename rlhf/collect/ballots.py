"""What people decided, as it follows from the log of their actions. The log is only ever appended to; undoing is an action too.

An action is {event, annotator, task, at, ...}:

    open      the task is on this person's screen (and stays there through reloads and restarts)
    decide    order: groups of answers' ids, best first, ties together; shown: the ids as they stood on the screen; seconds: how long it took;
              of: a hash of the prompt and answers that were ordered
    skip      reason: one of SKIPS
    undo      takes back this person's last decide or skip, which becomes the draft of that task, now open again; what was open waits behind it
"""
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ext.errors import UserError
from rlhf.collect import log
from rlhf.collect.tasks import Task

SKIPS = ("unclear", "all_bad", "harmful", "not_my_field", "other")
FILE = "decisions.log"


@dataclass(frozen=True)
class Choice:
    """A decision that stands. order: None where the task was skipped, and then the reason. of: `Task.digest` of what was ordered, if the log says it."""

    order: tuple[tuple[str, ...], ...] | None
    reason: str = ""
    seconds: float = 0.0
    of: str = ""


@dataclass
class Person:
    """Attributes: open: the task on the screen, since: when it came there (seconds of the epoch). done: tasks decided or skipped, the latest last.
    back: tasks that undoing put aside, the next one last. drafts: the orders that were undone, by task."""

    open: str | None = None
    since: float = 0.0
    done: list[str] = field(default_factory=list)
    back: list[str] = field(default_factory=list)
    drafts: dict[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)


class Ballots:
    """The state after some actions. `choices`: task -> annotator -> Choice."""

    def __init__(self, actions: Iterable[dict] = ()):
        self.choices: dict[str, dict[str, Choice]] = {}
        self.people: dict[str, Person] = {}
        self.actions = 0
        for action in actions:
            self.apply(action)

    def person(self, name: str) -> Person:
        return self.people.setdefault(name, Person())

    def apply(self, action: dict) -> None:
        """Raises KeyError, TypeError, ValueError: an action that is none."""
        event, name, task = action["event"], action["annotator"], action["task"]
        person = self.person(name)
        if event == "open":
            person.open, person.since = task, float(action["at"])
            if task in person.back:
                person.back.remove(task)
        elif event in ("decide", "skip"):
            order = tuple(tuple(tied) for tied in action["order"]) if event == "decide" else None
            self.choices.setdefault(task, {})[name] = Choice(order, action.get("reason", ""), float(action.get("seconds", 0)), action.get("of", ""))
            person.open = None
            person.drafts.pop(task, None)
            person.done.append(task)
        elif event == "undo":
            if not person.done or person.done[-1] != task:
                raise ValueError(f"undoes {task}, which is not what came last")
            person.done.pop()
            choice = self.choices.get(task, {}).pop(name, None)  # none: it did not fit its task any more (`fit`), or was taken back before
            if not self.choices.get(task, True):
                del self.choices[task]
            if person.open is not None:
                person.back.append(person.open)
            if choice is not None and choice.order is not None:
                person.drafts[task] = choice.order
            person.open, person.since = task, float(action["at"])
        else:
            raise ValueError(f"unknown event {event}")
        self.actions += 1

    def orders(self, tasks: Iterable[str] | None = None) -> dict[str, dict[str, tuple[tuple[str, ...], ...]]]:
        """task -> annotator -> order, without what was skipped."""
        wanted = self.choices if tasks is None else [task for task in tasks if task in self.choices]
        found = {task: {name: choice.order for name, choice in self.choices[task].items() if choice.order is not None} for task in wanted}
        return {task: orders for task, orders in found.items() if orders}


def fit(ballots: Ballots, tasks: Mapping[str, Task]) -> Counter[str]:
    """Takes off what no longer fits: decisions and drafts of tasks whose prompt or answers have changed since. Returns how many tasks are gone or
    changed, as reasons (`task_is_gone`, whose decisions stay for a file that has them again; `task_changed`)."""
    found: Counter[str] = Counter()
    for task_id in list(ballots.choices):
        if (task := tasks.get(task_id)) is None:
            found["task_is_gone"] += 1
            continue
        choices, ids, digest = ballots.choices[task_id], sorted(answer.id for answer in task.answers), task.digest
        stale = [name for name, choice in choices.items() if choice.of not in ("", digest) or choice.order is not None and not _is_of(choice.order, ids)]
        for name in stale:
            del choices[name]
        if stale:
            found["task_changed"] += 1
        if not choices:
            del ballots.choices[task_id]
    for person in ballots.people.values():
        for task_id in [one for one, order in person.drafts.items() if one in tasks and not _is_of(order, sorted(answer.id for answer in tasks[one].answers))]:
            del person.drafts[task_id]
    return found


def _is_of(order: tuple[tuple[str, ...], ...], ids: list[str]) -> bool:
    named = [one for tied in order for one in tied]
    return all(isinstance(one, str) for one in named) and sorted(named) == ids


def replay(records: Iterable[tuple[int, int, dict]], path: Path) -> Ballots:
    """The state that a log leads to. Raises UserError: a record that is no action."""
    ballots = Ballots()
    for number, (_, _, action) in enumerate(records, start=1):
        try:
            ballots.apply(action)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"is no action of an annotator ({type(error).__name__}); it is not this program's, or another version's"
            raise UserError("input", f"{path}:{number}", reason) from None
    return ballots


def load(folder: Path) -> Ballots:
    """What was decided in a directory so far; nothing where nobody began. A server may be appending meanwhile. Raises UserError."""
    path = folder / FILE
    return replay(log.read(path, key="input"), path) if path.is_file() else Ballots()
