"""How far there is to go: records of each domain against targets such as 10,000 a domain and 50,000 in all."""
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.config.schema import CollectConfig
from megatron_ext.data.decompress import file_chunks, lines
from megatron_ext.errors import UserError
from rlhf.collect import agreement, ballots, tasks

COUNTED = ("sft.jsonl", "answers.jsonl", "passages.jsonl", "tasks.jsonl")


@dataclass(frozen=True)
class Targets:
    """total: in all. each: of a domain that `own` does not name."""

    total: int
    each: int
    own: Mapping[str, int]

    @classmethod
    def of(cls, settings: CollectConfig) -> "Targets":
        """Raises UserError: an entry of collect.targets that is not DOMAIN:NUMBER."""
        own = {}
        for entry in settings.targets:
            domain, _, number = entry.rpartition(":")
            if not number.isdecimal() or not domain.strip() or int(number) < 1:
                raise UserError("collect.targets", entry, "must be DOMAIN:NUMBER, such as education:10000")
            own[domain.strip()] = int(number)
        return cls(settings.target, settings.domain_target, own)

    def of_domain(self, domain: str) -> int:
        return self.own.get(domain, self.each)

    def share(self, domain: str, count: int) -> float:
        return count / self.of_domain(domain)

    def progress(self, done: Mapping[str, int], there: Mapping[str, int]) -> dict:
        """What the page and `collect status` show. there: what could be done, by domain. Domains that only have a target stand there with 0."""
        names = sorted({*done, *there, *self.own})
        return {"total": {"done": sum(done.values()), "there": sum(there.values()), "target": self.total},
                "domains": [{"domain": name, "done": done.get(name, 0), "there": there.get(name, 0), "target": self.of_domain(name)}
                            for name in names]}


def status(folder: Path, settings: CollectConfig) -> dict:
    """Everything that a directory of collected data holds, under it too: records by kind and domain, decisions, agreement. Raises UserError."""
    if not folder.is_dir():
        raise UserError("input", folder, "is not there; name a directory that `collect build`, `augment` or `serve` wrote into")
    targets = Targets.of(settings)
    counts = {name: Counter() for name in COUNTED}
    ranked: Counter[str] = Counter()
    people: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    seconds: list[float] = []
    orders: dict = {}
    for file in sorted(path for path in folder.rglob("*.jsonl") if path.name in COUNTED):
        counts[file.name] += domains_of(file)
        if file.name == "tasks.jsonl" and (file.parent / ballots.FILE).is_file():
            held, found = tasks.load(file), ballots.load(file.parent)
            ballots.fit(found, held)
            mine = found.orders(held)
            ranked += Counter(held[task].domain for task in mine)
            orders |= {f"{file.parent}\0{task}": of for task, of in mine.items()}
            for task in held:
                for name, choice in found.choices.get(task, {}).items():
                    people[name] += 1
                    if choice.order is None:
                        skipped[choice.reason] += 1
                    else:
                        seconds.append(choice.seconds)
    found = {name.removesuffix(".jsonl"): dict(sorted(count.items())) for name, count in counts.items() if count}
    return {
        "records": found, "sft": targets.progress(counts["sft.jsonl"], counts["sft.jsonl"]), "ranked": targets.progress(ranked, counts["tasks.jsonl"]),
        "decisions": people.total(), "annotators": dict(sorted(people.items())), "skipped": dict(sorted(skipped.items())),
        "median_seconds": sorted(seconds)[len(seconds) // 2] if seconds else None, "agreement": agreement.of_orders(orders),
    }


def domains_of(file: Path) -> Counter:
    """Records of a file by domain; lines that are none are passed over."""
    found: Counter[str] = Counter()
    for line in lines(file_chunks(file)):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found[str(value.get("domain") or "")] += 1
    return found


def text(found: dict) -> str:
    """As a person reads it."""
    names = [one["domain"] for one in found["ranked"]["domains"]]
    names += [one["domain"] for one in found["sft"]["domains"] if one["domain"] not in names]
    sft = {one["domain"]: one for one in found["sft"]["domains"]}
    ranked = {one["domain"]: one for one in found["ranked"]["domains"]}
    none = {"done": 0, "there": 0, "target": 0}
    rows = [("domain", "sft", "tasks", "ranked", "target", "ranked share")]
    for name in sorted(names):
        ours, theirs = sft.get(name, none), ranked.get(name, none)
        target = max(ours["target"], theirs["target"])
        rows.append((name or "(none)", *_cells(ours, theirs, target)))
    total = found["ranked"]["total"]
    rows.append(("all", *_cells(found["sft"]["total"], total, total["target"])))
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines_ = ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]) for row in rows]
    if found["decisions"]:
        by = ", ".join(f"{name} {count}" for name, count in found["annotators"].items())
        skipped = "".join(f", {reason} {count}" for reason, count in found["skipped"].items())
        median = f", median {found['median_seconds']:.0f} s" if found["median_seconds"] is not None else ""
        lines_ += ["", f"decisions   {found['decisions']:,}: {by}{median}" + (f"; skipped{skipped.removeprefix(',')}" if skipped else "")]
        lines_ += [f"agreement   {sentence(found['agreement'])}"]
        lines_ += [f"            {name}: {share:.0%} of {count} pairs as the others" for name, (share, count) in found["agreement"]["people"].items()]
    return "\n".join(lines_)


def _cells(sft: dict, ranked: dict, target: int) -> tuple[str, ...]:
    return f"{sft['done']:,}", f"{ranked['there']:,}", f"{ranked['done']:,}", f"{target:,}", f"{ranked['done'] / target:.1%}"


def sentence(found: dict) -> str:
    """The agreement in words."""
    if not found["tasks"]:
        return "not known yet: no task was ordered by two people"

    def shown(value: float | None, form: str) -> str:
        return "not defined" if value is None else format(value, form)

    return (f"{found['tasks']} tasks ordered by two or more: alpha {shown(found['order'], '.3f')} (order, ordinal), "
            f"{shown(found['best'], '.3f')} (best, nominal), {shown(found['pairs'], '.0%')} of {found['compared']} pairs alike")
