"""How well places that were found agree with the true ones."""
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

STRUCTURED = {"KR_RRN", "KR_FRN", "PASSPORT", "DRIVER_LICENCE", "KR_BUSINESS", "KR_CORPORATE", "PHONE", "EMAIL", "BANK_ACCOUNT", "CARD", "PLATE", "IP", "US_SSN", "UK_NINO", "UK_NHS"}


@dataclass
class Score:
    """A true span counts as found when each of its letters and digits lies in found ones, of whatever kind; a found one as right when half of it and more lies in true ones."""

    true: Counter = field(default_factory=Counter)
    found: Counter = field(default_factory=Counter)
    named: Counter = field(default_factory=Counter)  # with its own kind
    said: Counter = field(default_factory=Counter)
    right: Counter = field(default_factory=Counter)
    missed: list = field(default_factory=list)
    wrong: list = field(default_factory=list)

    def add(self, text: str, true: Iterable[tuple[int, int, str]], found: Iterable[tuple]) -> None:
        true, found = list(true), [(one[0], one[1], one[2]) for one in found]
        for start, end, kind in true:
            self.true[kind] += 1
            if all(any(a <= place < b for a, b, _ in found) for place in range(start, end) if text[place].isalnum()):
                self.found[kind] += 1
                self.named[kind] += any(a < end and start < b and name == kind for a, b, name in found)
            else:
                self.missed.append((kind, text[max(0, start - 20):start] + "<<" + text[start:end] + ">>" + text[end:end + 12], [(text[a:b], k) for a, b, k in found if a < end and start < b]))
        for start, end, kind in found:
            self.said[kind] += 1
            covered = sum(any(a <= place < b for a, b, _ in true) for place in range(start, end))
            if covered * 2 >= end - start:
                self.right[kind] += 1
            else:
                self.wrong.append((kind, text[max(0, start - 20):start] + "<<" + text[start:end] + ">>" + text[end:end + 12]))

    def recall(self, kinds: Iterable[str]) -> float:
        kinds = set(kinds)
        return sum(self.found[kind] for kind in kinds) / max(1, sum(self.true[kind] for kind in kinds))

    def precision(self) -> float:
        return sum(self.right.values()) / max(1, sum(self.said.values()))


def scored(find: Callable[[str], Iterable[tuple]], items: Iterable) -> Score:
    score = Score()
    for item in items:
        score.add(item.text, item.spans, find(item.text))
    return score
