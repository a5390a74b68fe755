"""Exact duplicates over any number of shards: of all places with the same key the first one stays. No datatrove, flat memory.

    collect   a shard's keys, sorted, to SHARD.npy: 16 bytes a key
    resolve   task p of P takes the keys that begin with p's range from all shards, and writes for each shard which places go
    removals  what goes from one shard

The first place is that of the lowest shard, then of the lowest document, then of the lowest paragraph: it follows from the order of the
input, not from which worker was faster.
"""
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from megatron_ext.files import whole

ENTRY = np.dtype([("key", "<u8"), ("place", "<u4"), ("part", "<u4")])
PLACE = np.dtype([("place", "<u4"), ("part", "<u4"), ("first_shard", "<u4"), ("first_place", "<u4")])


def collect(entries: Iterable[tuple[int, int, int]], folder: Path, shard: int) -> int:
    """Writes (key, document of the shard, paragraph or 0) of one shard; returns how many."""
    found = np.fromiter(entries, dtype=ENTRY)
    found = found[np.lexsort((found["part"], found["place"], found["key"]))]
    write(folder / "keys" / f"{shard:05d}.npy", found)
    return len(found)


def resolve(folder: Path, part: int, parts: int, shards: int) -> int:
    """Finds what goes among the keys of range `part`; returns how many places."""
    low, high = (np.uint64(min(number * 2**64 // parts, 2**64 - 1)) for number in (part, part + 1))
    taken, owners = [], []
    for shard in range(shards):
        entries = np.load(folder / "keys" / f"{shard:05d}.npy", mmap_mode="r", allow_pickle=False)
        keys = entries["key"]
        start, end = np.searchsorted(keys, low), len(keys) if part + 1 == parts else np.searchsorted(keys, high)
        taken.append(np.array(entries[start:end]))
        owners.append(np.full(end - start, shard, dtype=np.uint32))
    entries, owner = np.concatenate(taken), np.concatenate(owners)
    order = np.argsort(entries["key"], kind="stable")  # shards came in order and are sorted inside: equal keys stay in order of place
    keys = entries["key"][order]
    again = np.zeros(len(keys), dtype=bool)
    again[1:] = keys[1:] == keys[:-1]
    gone, whose = entries[order[again]], owner[order[again]]
    first = order[np.maximum.accumulate(np.where(again, 0, np.arange(len(keys))))][again]  # where each key that goes stands first
    places = np.empty(len(gone), dtype=PLACE)
    places["place"], places["part"] = gone["place"], gone["part"]
    places["first_shard"], places["first_place"] = owner[first], entries["place"][first]
    by = np.argsort(whose, kind="stable")
    edges = np.searchsorted(whose[by], np.arange(shards + 1))
    for shard in range(shards):
        write(folder / "gone" / f"{shard:05d}_{part:04d}.npy", places[by[edges[shard] : edges[shard + 1]]])
    return len(gone)


def removals(folder: Path, shard: int, parts: int) -> tuple[dict[int, set[int]], dict[int, list[tuple[int, int]]]]:
    """Of one shard: document -> paragraphs that go (0 where keys were of documents); and document -> where these stand first, (shard, document), ascending, each once,
    without the document itself."""
    gone: dict[int, set[int]] = defaultdict(set)
    firsts: dict[int, set[tuple[int, int]]] = defaultdict(set)
    for part in range(parts):
        for place, number, *first in np.load(folder / "gone" / f"{shard:05d}_{part:04d}.npy", allow_pickle=False).tolist():
            gone[place].add(number)
            if tuple(first) != (shard, place):
                firsts[place].add((first[0], first[1]))
    return dict(gone), {place: sorted(of) for place, of in firsts.items()}


def write(path: Path, array: np.ndarray) -> None:
    with whole(path, sync=False) as file:  # a task that is killed leaves no half file under the name
        np.save(file, array, allow_pickle=False)
