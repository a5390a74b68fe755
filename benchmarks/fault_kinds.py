"""The faults of fault_campaign.py and what is declared of each: the table that a campaign is held against, and how the faults are drawn."""
import random
from dataclasses import dataclass

HANG = 3.0  # seconds of health.hang_timeout
END = 10.0  # seconds in which a job with a dead rank is to end (issue 6)


@dataclass(frozen=True)
class Declared:
    """What a fault comes to.

    Attributes:
        codes: exit codes of the life that it hits, any of them; negative: killed by that signal.
        end: seconds after which that life is over at the latest; None: it goes on.
        final: how the whole run then compares: same (losses and last checkpoint of the undisturbed run, bit for bit) | near (losses to 2e-6, since the
            layout changes the order of sums) | skipped (those of a clean run with recovery.skip, bit for bit).
        where: ranks (a run of two) | solo (a run that nothing else hits) | moved (a run that is killed once and goes on elsewhere).
        share: of 100 faults.
    """

    text: str
    codes: tuple[int, ...]
    end: float | None
    final: str
    where: str
    share: int


DECLARED = {
    "kill_rank": Declared("SIGKILL of one rank", (137,), END, "same", "ranks", 16),
    "kill_job": Declared("SIGKILL of the command and all it started", (-9,), END, "same", "ranks", 10),
    # Two torchruns, as a batch script starts them on two nodes. Exit code: of the one that is left.
    "lost_node": Declared("one of two nodes lost (SIGKILL of all on it)", (1,), END, "same", "ranks", 8),
    # A limit, two looks of it, and what job.py leaves ranks before SIGKILL (benchmarks/hang_trials.py).
    "hang": Declared("SIGSTOP of one rank", (1,), 2 * HANG + 6 + END, "same", "ranks", 12),
    "term": Declared("SIGTERM", (75,), 60.0, "same", "ranks", 10),
    "usr1": Declared("SIGUSR1", (75,), 60.0, "same", "ranks", 8),
    "full_disk": Declared("full disk while saving", (0,), None, "same", "ranks", 6),
    "flipped": Declared("newest checkpoint: bytes flipped", (-9,), END, "same", "ranks", 8),
    "truncated": Declared("newest checkpoint: a file cut short", (-9,), END, "same", "ranks", 6),
    "nan": Declared("NaN in a batch (of two ranks: on one)", (0,), None, "skipped", "solo", 8),
    "other_layout": Declared("killed, goes on in another layout", (-9,), END, "near", "moved", 4),
    "other_ranks": Declared("killed, goes on with another number of ranks", (-9,), END, "near", "moved", 4),
}


def drawn(faults: int, seed: int, only: list[str]) -> list[str]:
    """Kinds in random order: each as often as its share says, to the nearest number, and at least once where there are enough faults."""
    total = sum(DECLARED[kind].share for kind in only)
    exact = {kind: faults * DECLARED[kind].share / total for kind in only}
    counts = {kind: max(int(exact[kind]), int(faults >= len(only))) for kind in only}
    by_rest = sorted(only, key=lambda kind: int(exact[kind]) - exact[kind])
    while (missing := faults - sum(counts.values())) != 0:
        if missing > 0:
            counts[by_rest[0]] += 1
            by_rest.append(by_rest.pop(0))
        else:
            counts[max(counts, key=counts.get)] -= 1
    kinds = [kind for kind in only for _ in range(counts[kind])]
    random.Random(seed).shuffle(kinds)
    return kinds


def chains(kinds: list[str], length: int) -> list[list[str]]:
    """Faults that hit one run each after the other. A full disk ends none of a run's lives: it hits the last one."""
    dying = [kind for kind in kinds if DECLARED[kind].where == "ranks" and kind != "full_disk"]
    found = [dying[start : start + length] for start in range(0, len(dying), length)]
    for number in range(kinds.count("full_disk")):
        if number < len(found):
            found[number].append("full_disk")
        else:
            found.append(["full_disk"])
    return found
