"""How far people agree: Krippendorff's alpha, and the share of pairs that two people order alike.

    alpha = 1 - D_o / D_e,    D_o = 1/n sum_ck o_ck d(c, k)^2,    D_e = 1/(n (n - 1)) sum_ck n_c n_k d(c, k)^2

o_ck counts how often a unit got the values c and k, each unit's pairs divided by (its values - 1); n_c = sum_k o_ck; n = sum_c n_c. Units
with fewer than two values do not count, so values may be missing. 1 is perfect agreement, 0 what chance would give, below 0 systematic
disagreement. (K. Krippendorff, Computing Krippendorff's Alpha-Reliability, 2011; Content Analysis, 4th ed. 2018, chapter 12)

Of decisions three figures are made. `order`: each answer of a task is a unit, its value the rank that a person gave it (ties: the mean of
their places), ordinal. `best`: each task is a unit, its value the answer chosen, nominal. `pairs`: of all pairs of answers that two people
both ordered strictly, the share they ordered alike (InstructGPT's labellers: 73 %, arXiv 2203.02155, section 3.4). The ranks of one task
sum to the same number whoever gives them, so alpha of the order of two answers is that of a coin's two sides; with more answers it weighs
distant ranks more, which `best` does not.
"""
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import combinations

METRICS = ("nominal", "ordinal", "interval", "ratio")


def alpha(units: Iterable[Sequence[Hashable]], metric: str) -> float | None:
    """Krippendorff's alpha.

    Args:
        units: for each unit the values that it got, in any order, missing ones left out.
        metric: nominal | ordinal | interval | ratio; numbers for all but nominal.
    Returns:
        At most 1; None where it is not defined: no unit with two values, or one value only.
    """
    if metric not in METRICS:
        raise ValueError(f"metric={metric}: one of {', '.join(METRICS)}")
    together: defaultdict[tuple, float] = defaultdict(float)
    for values in units:
        counts = Counter(values)
        size = counts.total()
        if size < 2:
            continue
        for c, of_c in counts.items():
            for k, of_k in counts.items():
                together[c, k] += of_c * (of_k - (c == k)) / (size - 1)
    totals: defaultdict[Hashable, float] = defaultdict(float)
    for (c, _), count in together.items():
        totals[c] += count
    distance = _distance(metric, totals)
    n = sum(totals.values())
    expected = sum(totals[c] * totals[k] * distance(c, k) for c in totals for k in totals)
    if not expected:
        return None
    observed = sum(count * distance(c, k) for (c, k), count in together.items())
    return 1 - (n - 1) * observed / expected


def _distance(metric: str, totals: Mapping[Hashable, float]):
    """d(c, k)^2 of two values."""
    if metric == "nominal":
        return lambda c, k: float(c != k)
    if metric == "interval":
        return lambda c, k: (c - k) ** 2
    if metric == "ratio":
        return lambda c, k: 0.0 if c == k else ((c - k) / (c + k)) ** 2
    below, running = {}, 0.0
    for value in sorted(totals):
        below[value] = running + totals[value] / 2  # up to the middle of this value's own
        running += totals[value]
    return lambda c, k: (below[c] - below[k]) ** 2


def ranks(order: Sequence[Sequence[str]]) -> dict[str, float]:
    """The rank of each answer, 1 is best; those that tie share the mean of their places: [[a], [b, c]] -> a 1, b and c 2.5."""
    found, place = {}, 1
    for tied in order:
        for one in tied:
            found[one] = place + (len(tied) - 1) / 2
        place += len(tied)
    return found


def of_orders(decided: Mapping[str, Mapping[str, Sequence[Sequence[str]]]]) -> dict:
    """What is shown of the agreement.

    Args:
        decided: task -> annotator -> order (groups of answers' ids, best first).
    Returns:
        tasks (ordered by two or more people), order and best (alpha, or None), pairs (a share, or None), compared (pairs that it is of),
        people ({name: [share of pairs ordered as the others did, pairs]}).
    """
    several = {task: orders for task, orders in decided.items() if len(orders) > 1}
    by_rank = {task: {name: ranks(order) for name, order in orders.items()} for task, orders in several.items()}
    units = [[found[answer] for found in people.values()] for people in by_rank.values() for answer in next(iter(people.values()))]
    alike: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    for people in by_rank.values():
        for (first, ours), (second, theirs) in combinations(people.items(), 2):
            for a, b in combinations(ours, 2):
                if ours[a] == ours[b] or theirs[a] == theirs[b]:
                    continue
                same = (ours[a] < ours[b]) == (theirs[a] < theirs[b])
                for name in ("", first, second):
                    seen[name] += 1
                    alike[name] += same
    chosen = [[_best(order) for order in orders.values()] for orders in several.values()]
    return {
        "tasks": len(several), "order": alpha(units, "ordinal"), "best": alpha(chosen, "nominal"),
        "pairs": alike[""] / seen[""] if seen[""] else None, "compared": seen[""],
        "people": {name: [alike[name] / count, count] for name, count in sorted(seen.items()) if name},
    }


def _best(order: Sequence[Sequence[str]]) -> tuple[str, ...]:
    return tuple(sorted(order[0]))
