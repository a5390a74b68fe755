"""`collect export`: what people decided, as the reward stage reads it (`ranking` of `rlhf/data/records.py`), as pairs, or as SFT examples.

Several people's orders of one task become one by the mean of the ranks they gave (`collect.merge=mean`; equal means tie), or stay records
of their own (`each`). A task that was only skipped, or whose answers all tie, teaches nothing and is left out and counted, as is a decision
of a task that has changed or gone since. Names of annotators are not exported.
"""
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path

from megatron_ext.config.schema import Config
from megatron_ext.errors import UserError
from rlhf.collect import agreement, ballots, output
from rlhf.collect import tasks as task_files
from rlhf.collect.rights import Gate
from rlhf.collect.tasks import DEMONSTRATION, Task

Order = tuple[tuple[str, ...], ...]
FILES = {"ranking": "rankings.jsonl", "preference": "preferences.jsonl", "sft": "best.jsonl"}


def export(config: Config) -> dict:
    """Reads tasks.jsonl and decisions.log of `input`, writes into `output` (where it is null, the same directory). Returns the manifest.

    Raises:
        UserError: they are not there, or nothing was decided.
    """
    if config.input is None:
        raise UserError("input", "null", "name the directory that `collect serve` wrote into")
    source, wanted = Path(config.input), config.collect.format
    tasks, decided = task_files.load(source / "tasks.jsonl"), ballots.load(source)
    folder = output.directory(config.output or source)
    left_out, gate = ballots.fit(decided, tasks), Gate(config)
    origins: dict[str, Counter] = {}
    used: list[str] = []
    with output.Records(folder / FILES[wanted]) as records:
        for task in tasks.values():
            if not gate.admits(task.source):
                continue
            used.append(task.id)
            choices = decided.choices.get(task.id, {})
            orders = [choice.order for choice in choices.values() if choice.order is not None]
            if not orders:
                left_out["skipped" if choices else "not_decided"] += 1
                continue
            _count(origins, task, orders)
            for order, votes in [(merged(orders), len(orders))] if config.collect.merge == "mean" else [(one, 1) for one in orders]:
                if len(order) < 2:
                    left_out["all_tie"] += 1
                    continue
                for record in FORMS[wanted](task, order):
                    records.write(record | {"votes": votes, "domain": task.domain or None, "language": task.language or None, "source": task.source})
    left_out += gate.left_out
    if not records.count:
        reasons = ", ".join(f"{reason} {count}" for reason, count in left_out.items())
        raise UserError("input", config.input, f"holds no decision to export: {reasons or 'none'}")
    found = agreement.of_orders(decided.orders(used))
    return output.manifest(
        folder / "export.yaml", config, inputs=[source / "tasks.jsonl", source / ballots.FILE], outputs=[records.facts()], left_out=left_out,
        agreement={key: value for key, value in found.items() if key != "people"}, origins={name: _told(one) for name, one in sorted(origins.items())},
        **gate.facts(),
    )


def merged(orders: Sequence[Order]) -> Order:
    """One order of several people's: by the mean rank of each answer; equal means tie."""
    if len(orders) == 1:
        return orders[0]
    found = [agreement.ranks(order) for order in orders]
    sums = {answer: sum(one[answer] for one in found) for answer in sorted(found[0])}  # halves: exact in floats
    return tuple(tuple(answer for answer, total in sums.items() if total == value) for value in sorted(set(sums.values())))


def _ranking(task: Task, order: Order) -> Iterator[dict]:
    record = {"id": task.id, "prompt": task.record()["prompt"], "responses": [{"id": one.id, "text": one.text} for one in task.answers],
              "ranking": [list(tied) for tied in order]}
    shown = [one.id for one in task.answers if one.origin == DEMONSTRATION]
    yield record | ({"demonstrations": shown} if shown else {})


def _preferences(task: Task, order: Order) -> Iterator[dict]:
    texts = {one.id: one.text for one in task.answers}
    for better, worse in combinations(order, 2):
        for chosen in better:
            for rejected in worse:
                yield {"id": output.identity("pair", task.id, chosen, rejected), "prompt": task.record()["prompt"],
                       "chosen": texts[chosen], "rejected": texts[rejected]}


def _best(task: Task, order: Order) -> Iterator[dict]:
    texts = {one.id: one.text for one in task.answers}
    for chosen in order[0]:
        yield {"id": output.identity("best", task.id, chosen), "prompt": task.record()["prompt"], "response": texts[chosen]}


FORMS = {"ranking": _ranking, "preference": _preferences, "sft": _best}


def _count(origins: dict[str, Counter], task: Task, orders: Sequence[Order]) -> None:
    names: Mapping[str, str] = {one.id: one.origin for one in task.answers}
    for order in orders:
        for answer, rank in agreement.ranks(order).items():
            counted = origins.setdefault(names[answer] or "(unknown)", Counter())
            counted["answers"] += 1
            counted["ranks"] += rank
            counted["best"] += answer in order[0]


def _told(counted: Counter) -> dict:
    return {"answers": counted["answers"], "best": counted["best"], "mean_rank": round(counted["ranks"] / counted["answers"], 3)}
