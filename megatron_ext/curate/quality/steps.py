"""datatrove's steps of the phases that duplicates need (block.py). Imported only where datatrove is."""
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets
from datatrove.utils.hashing import HashConfig

from megatron_ext.curate.quality import clusters, keep_first
from megatron_ext.curate.quality.config import DuplicatesConfig
from megatron_ext.curate.quality.duplicates import MinHash, exact_key, paragraph_keys

SIGNATURES = "signatures"


class _Step(PipelineStep):
    type = "duplicates"


class Keys(_Step):
    """Writes the keys of a shard: of documents (kind "exact") or of paragraphs."""

    name = "keys"

    def __init__(self, work: Path, settings: DuplicatesConfig, kind: str):
        super().__init__()
        self.work, self.settings, self.kind = Path(work), settings, kind

    def run(self, data, rank: int = 0, world_size: int = 1):
        with self.track_time():
            self.stat_update("keys", value=keep_first.collect(self._entries(data), self.work, rank))

    def _entries(self, data) -> Iterator[tuple[int, int, int]]:
        for place, document in enumerate(data):
            self.stat_update("total")
            if self.kind == "exact":
                yield exact_key(document.text), place, 0
                continue
            for part, key in enumerate(paragraph_keys(document.text, least=self.settings.min_paragraph)):
                if key is not None:
                    yield key, place, part


class Firsts(_Step):
    """Task p finds what goes among the keys of range p."""

    name = "firsts"

    def __init__(self, work: Path, shards: int):
        super().__init__()
        self.work, self.shards = Path(work), shards

    def run(self, data=None, rank: int = 0, world_size: int = 1):
        with self.track_time():
            self.stat_update("repeated", value=keep_first.resolve(self.work, rank, world_size, self.shards))


class Signatures(_Step):
    """datatrove's files of stage 1 (MinhashDedupSignature) with the signatures of duplicates.MinHash, sorted by numpy."""

    name = "signatures"

    def __init__(self, work: Path, settings: DuplicatesConfig):
        super().__init__()
        self.work, self.settings = Path(work), settings

    def run(self, data, rank: int = 0, world_size: int = 1):
        minhash, signatures, places = MinHash(self.settings), [], []
        with self.track_time():
            for place, document in enumerate(data):
                self.stat_update("total")
                shingles = minhash.shingles(document.text)
                if len(shingles):  # a text without letters and digits is like no other
                    signatures.append(minhash.signature(shingles))
                    places.append(place)
            buckets, hashes = self.settings.buckets, self.settings.hashes
            found = np.stack(signatures) if signatures else np.zeros((0, buckets, hashes), dtype=np.uint32)
            numbers = np.asarray(places, dtype="<u4")
            for bucket in range(buckets):
                columns = found[:, bucket]
                order = np.lexsort((numbers, *columns.T[::-1]))
                rows = np.concatenate([columns[order], numbers[order, None]], axis=1).astype("<u4")
                path = self.work / SIGNATURES / f"bucket_{bucket:03d}" / f"{rank:05d}.minhash.sig"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(rows.tobytes())


class Clusters(_Step):
    name = "clusters"

    def __init__(self, work: Path):
        super().__init__()
        self.work = Path(work)

    def run(self, data=None, rank: int = 0, world_size: int = 1):
        with self.track_time():
            self.stat_update("near_duplicates", value=clusters.resolve(self.work))


def buckets(work: Path, settings: DuplicatesConfig) -> MinhashDedupBuckets:
    """datatrove's stage 2: pairs of neighbours with the same tuple in a bucket."""
    config = MinhashConfig(num_buckets=settings.buckets, hashes_per_bucket=settings.hashes, hash_config=HashConfig(precision=32))
    return MinhashDedupBuckets(input_folder=str(Path(work) / SIGNATURES), output_folder=str(Path(work) / clusters.PAIRS), config=config)
