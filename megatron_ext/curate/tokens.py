"""The ledger beside the tokens: how many of which source and domain, and which document is which. Made while a directory is prepared, without reading text.

    curation.json   the manifest of the build, its hash, and tokens of each split by source and domain
    documents.idx   the indexes of all shards behind one another (index.py), sources and domains numbered by the tables in curation.json

Document k of a split in documents.idx is document k of that split's .idx.
"""
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ext.curate.documents import write_json
from megatron_ext.curate.index import ROW, read_index, split_codes
from megatron_ext.curate.ingest.licences import warnings
from megatron_ext.curate.manifest import Curated
from megatron_ext.data.index import TokenFile
from megatron_ext.data.prepared import SPLITS
from megatron_ext.errors import UserError

FILE, DOCUMENTS = "curation.json", "documents.idx"


@dataclass(frozen=True)
class Counted:
    """What `data.prepare` asks for files beside the tokens (`Beside` there)."""

    curated: Curated

    @property
    def identity(self) -> str:
        return self.curated.sha256

    def write(self, directory: Path, fractions: tuple[float, ...]) -> dict:
        """Writes both files into `directory`, where the tokens are. Returns what prepared.json says of it.

        Raises:
            UserError: the folder of documents has changed.
        """
        sources, domains = _Table(), _Table()
        lengths = [TokenFile(directory / name, key="output").lengths if (directory / f"{name}.idx").exists() else np.empty(0, np.int64) for name in SPLITS]
        used, totals = [0] * len(SPLITS), {}
        with (directory / DOCUMENTS).open("wb") as stream:
            for rows in self._rows(sources, domains):
                stream.write(rows.tobytes())
                codes = split_codes(rows, fractions)
                for code, name in enumerate(SPLITS):
                    of = rows[codes == code]
                    tokens = lengths[code][used[code] : used[code] + len(of)]
                    if len(tokens) != len(of):
                        raise UserError("input", self.curated.folder, "has other documents than tokens were made of; build it anew")
                    used[code] += len(of)
                    _add(totals, name, of, tokens)
        if used != [len(one) for one in lengths]:
            raise UserError("input", self.curated.folder, "has other documents than tokens were made of; build it anew")
        tokens = [{"split": split, "source": sources.names[source], "domain": domains.names[domain] or None, **numbers}
                  for (split, source, domain), numbers in sorted(totals.items(), key=lambda pair: (SPLITS.index(pair[0][0]), pair[0][1:]))]
        fields = self.curated.fields
        write_json(directory / FILE, {"manifest_sha256": self.curated.sha256, "manifest": fields, "sources": sources.names, "domains": domains.names,
                                      "tokens": tokens})
        return {"manifest_sha256": self.curated.sha256, "text": str(self.curated.folder.absolute()), "sources": fields["sources"],
                "warnings": warnings(fields["sources"], fields["settings"]["uses"] or ("commercial", "redistribute", "adapt")), "tokens": tokens}

    def _rows(self, sources: "_Table", domains: "_Table") -> Iterator[np.ndarray]:
        for shard in self.curated.fields["output"]["shards"]:
            rows = np.array(read_index(self.curated.folder / "index" / shard["index"]["name"]), ROW)
            if len(rows) != shard["documents"]:
                raise UserError("input", self.curated.folder, f"its index {shard['index']['name']} is damaged; build it anew")
            if len(rows):
                rows["source"] = np.array([sources.number(name) for name in shard["index"]["sources"]], np.uint16)[rows["source"]]
                rows["domain"] = np.array([domains.number(name) for name in shard["index"]["domains"]], np.uint16)[rows["domain"]]
            yield rows


class _Table:
    """Names in the order in which they come."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def number(self, name: str) -> int:
        if name not in self.names:
            self.names.append(name)
        return self.names.index(name)


def _add(totals: dict, split: str, rows: np.ndarray, tokens: np.ndarray) -> None:
    pairs = rows["source"].astype(np.int64) << 16 | rows["domain"]
    for pair in np.unique(pairs):
        of = pairs == pair
        found = totals.setdefault((split, int(pair >> 16), int(pair & 0xFFFF)), {"documents": 0, "tokens": 0, "bytes": 0})
        found["documents"] += int(of.sum())
        found["tokens"] += int(tokens[of].sum())
        found["bytes"] += int(rows["bytes"][of].astype(np.int64).sum())
