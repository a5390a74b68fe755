"""Who measures bandwidth with whom, and when. Pure.

Nodes meet as in a tournament (the circle method): in each round every node has one partner, and its ranks talk to the ranks of the same place
there, all at once, so that every pair of a kind shares its links with as many others. Rounds inside the nodes come first. Beyond FULL players
only partners at distances 1, 2, 4, ... meet: a thousand nodes take 18 rounds instead of 999. A bad cable is slow in one pair, a bad node in all
of its pairs.
"""
from collections.abc import Sequence

FULL = 16  # players up to which everybody meets everybody


def tournament(players: int) -> list[list[tuple[int, int]]]:
    """Rounds of disjoint pairs (a < b) of 0 .. players - 1."""
    if players > FULL:
        return [pairs for distance in _distances(players) for pairs in _at_distance(players, distance)]
    seats = [*range(players), *([None] if players % 2 else [])]
    rounds = []
    for _ in range(len(seats) - 1):
        pairs = zip(seats[: len(seats) // 2], reversed(seats[len(seats) // 2:]))
        rounds.append(sorted((min(pair), max(pair)) for pair in pairs if None not in pair))
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return [pairs for pairs in rounds if pairs]


def _distances(players: int) -> list[int]:
    return [1 << k for k in range((players - 1).bit_length()) if 1 << k <= players // 2]


def _at_distance(players: int, distance: int) -> list[list[tuple[int, int]]]:
    """Every player's neighbours at that distance, in two rounds."""
    first = [(a, a + distance) for a in range(players - distance) if a // distance % 2 == 0]
    second = [(a, a + distance) for a in range(players - distance) if a // distance % 2 == 1]
    return [pairs for pairs in (first, second) if pairs]


def rounds(nodes: Sequence[str]) -> list[tuple[str, list[tuple[int, int]]]]:
    """("inside" | "across", pairs of ranks) of each round. `nodes`: the node of each rank."""
    ranks: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        ranks.setdefault(node, []).append(rank)
    places = list(ranks.values())
    found = []
    for number in range(max(len(tournament(len(place))) for place in places)):
        playing = [(place, tournament(len(place))) for place in places]
        pairs = [(place[a], place[b]) for place, its in playing if number < len(its) for a, b in its[number]]
        found.append(("inside", pairs))
    for meeting in tournament(len(places)):
        found.append(("across", [pair for a, b in meeting for pair in zip(places[a], places[b])]))
    return found
