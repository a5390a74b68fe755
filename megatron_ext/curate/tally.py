"""What each step did, added up by source: the numbers of the ledger. Additions commute, so the order of tasks does not matter."""
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from megatron_ext.curate.blocks import CHANGE, DROP, Verdict

NUMBERS = ("in", "out", "changed", "characters_in", "characters_out")


@dataclass
class Tally:
    """Of one step: source -> {"in", "out", "changed", "characters_in", "characters_out", "dropped": {reason: n}, "counts": {name: n}}."""

    step: str
    sources: dict[str, dict] = field(default_factory=dict)

    def add(self, source: str, verdict: Verdict, before: int, after: int) -> None:
        """One document: characters before and after."""
        row = self._row(source)
        row["in"] += 1
        row["characters_in"] += before
        if verdict.action == DROP:
            row["dropped"][verdict.reason] = row["dropped"].get(verdict.reason, 0) + 1
        else:
            row["out"] += 1
            row["changed"] += verdict.action == CHANGE
            row["characters_out"] += after
        for name, count in verdict.counts.items():
            row["counts"][name] = row["counts"].get(name, 0) + count

    def count(self, source: str, name: str, number: int = 1) -> None:
        """What is no decision about a document."""
        row = self._row(source)
        row["counts"][name] = row["counts"].get(name, 0) + number

    def _row(self, source: str) -> dict:
        if source not in self.sources:
            self.sources[source] = dict.fromkeys(NUMBERS, 0) | {"dropped": {}, "counts": {}}
        return self.sources[source]

    def to_json(self) -> dict:
        return {"step": self.step, "sources": self.sources}


def added(tallies: Iterable[Mapping]) -> list[dict]:
    """Tallies of many tasks (`to_json`) as one for each step, in the order in which steps come first; with the sum of the sources beside them."""
    found: dict[str, dict[str, dict]] = {}
    for tally in tallies:
        sources = found.setdefault(tally["step"], {})
        for source, row in tally["sources"].items():
            sources[source] = plus(sources[source], row) if source in sources else row
    rows = []
    for step, sources in found.items():
        total = dict.fromkeys(NUMBERS, 0) | {"dropped": {}, "counts": {}}
        for row in sources.values():
            total = plus(total, row)
        rows.append({"step": step, **total, "sources": sources})
    return rows


def plus(one: Mapping, other: Mapping) -> dict:
    """Two rows, number by number."""
    return {name: one[name] + other[name] for name in NUMBERS} | {
        name: {key: one[name].get(key, 0) + other[name].get(key, 0) for key in sorted(one[name].keys() | other[name].keys())} for name in ("dropped", "counts")}
