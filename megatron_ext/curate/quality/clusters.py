"""Pairs of near duplicates into clusters, of which the first document stays (lowest shard, then lowest place in it). No datatrove.

Duplicates of duplicates are one cluster: datatrove's MinhashDedupCluster does the same, but which document it keeps follows from the sizes
of the parts it merged.
"""
from pathlib import Path

import numpy as np

from megatron_ext.curate.quality.keep_first import write

PAIRS, GONE = "pairs", "gone"
PLACE = np.dtype([("place", "<u4"), ("first_shard", "<u4"), ("first_place", "<u4")])


def resolve(work: Path) -> int:
    """Reads all pairs (pairs/*.dups: little-endian uint32 shard, document, shard, document) and writes gone/SHARD.npy: the documents
    that go and which one stays for each; returns how many go."""
    files = sorted((work / PAIRS).glob("*.dups"))
    found = [np.fromfile(file, dtype="<u4").reshape(-1, 4).astype(np.int64) for file in files]
    pairs = np.concatenate([np.zeros((0, 4), dtype=np.int64), *found])
    # (shard, document) as one number, then numbered from 0 in order, so that a smaller number is an earlier document
    nodes, ends = np.unique(np.concatenate([pairs[:, 0] << 32 | pairs[:, 1], pairs[:, 2] << 32 | pairs[:, 3]]), return_inverse=True)
    first, second = ends[: len(pairs)], ends[len(pairs) :]
    root = np.arange(len(nodes))
    while True:  # each round halves the length of every chain; a cluster of n documents is done in about log2 n rounds
        low = np.minimum(root[first], root[second])
        before = root.copy()
        np.minimum.at(root, root[first], low)
        np.minimum.at(root, root[second], low)
        root = root[root]
        if np.array_equal(root, before):
            break
    goes = root != np.arange(len(nodes))
    gone, stays = nodes[goes], nodes[root[goes]]
    shards, places = gone >> 32, np.empty(len(gone), dtype=PLACE)
    places["place"], places["first_shard"], places["first_place"] = gone & 0xFFFFFFFF, stays >> 32, stays & 0xFFFFFFFF
    for shard in np.unique(shards).tolist():  # ascending, as the documents are
        start, end = np.searchsorted(shards, [shard, shard + 1])
        write(work / GONE / f"{shard:05d}.npy", places[start:end])
    return len(gone)


def firsts(work: Path, shard: int) -> dict[int, list[tuple[int, int]]]:
    """Of one shard the documents that go, each with the one (shard, document) that stays of its cluster."""
    path = work / GONE / f"{shard:05d}.npy"
    return {place: [(*first,)] for place, *first in np.load(path, allow_pickle=False).tolist()} if path.exists() else {}
