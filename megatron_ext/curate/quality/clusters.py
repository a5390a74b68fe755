"""Pairs of near duplicates into clusters, of which the first document stays (lowest shard, then lowest place in it). No datatrove.

Duplicates of duplicates are one cluster: datatrove's MinhashDedupCluster does the same, but which document it keeps follows from the sizes
of the parts it merged.
"""
import os
from pathlib import Path

import numpy as np

PAIRS, GONE = "pairs", "gone"


def resolve(work: Path) -> int:
    """Reads all pairs (pairs/*.dups: little-endian uint32 shard, document, shard, document) and writes gone/SHARD.npy, uint32 documents;
    returns how many go."""
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
    gone = nodes[root != np.arange(len(nodes))]
    shards, documents = gone >> 32, (gone & 0xFFFFFFFF).astype("<u4")
    for shard in np.unique(shards).tolist():
        path = work / GONE / f"{shard:05d}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        with open(beside, "wb") as file:
            np.save(file, documents[shards == shard], allow_pickle=False)
        os.replace(beside, path)
    return len(gone)


def removals(work: Path, shard: int) -> dict[int, set[int]]:
    """Of one shard the documents that go, as keep_first.removals gives them."""
    path = work / GONE / f"{shard:05d}.npy"
    return {place: {0} for place in np.load(path, allow_pickle=False).tolist()} if path.exists() else {}
