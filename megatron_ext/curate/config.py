"""Settings of curation, put together from those of its rooms. Imports nothing but them: `config/schema.py` reads this file.

Each room has `config.py` with frozen dataclasses of plain values (numbers, texts, tuples of them), `CHOICES` and `RANGES` in the notation of
`config/ranges.py` with keys below `curate.`, and optionally `problems(settings)`, which yields UserErrors for what no table can say.
"""
from dataclasses import dataclass, field

from megatron_ext.curate.ingest import config as ingest
from megatron_ext.curate.ingest.config import IngestConfig, SelectConfig
from megatron_ext.curate.privacy import config as privacy
from megatron_ext.curate.privacy.config import PrivacyConfig
from megatron_ext.curate.quality import config as quality
from megatron_ext.curate.quality.config import QualityConfig
from megatron_ext.curate.taxonomy import config as taxonomy
from megatron_ext.curate.taxonomy.config import TaxonomyConfig


@dataclass(frozen=True)
class CurateConfig:
    """`prepare` with curation: raw files to cleaned documents with a ledger, and then to tokens (docs/curate.md)."""

    steps: tuple[str, ...] = ()  # in this order (curate/blocks.py names them); empty = the input is prepared as it is
    output: str | None = None  # the folder of cleaned documents; null = that of the tokens with -text behind its name
    workers: int = 0  # processes; 0 = one a core
    task_bytes: int = 1 << 25  # of input in one task; what a killed build may lose is a task of each worker
    removals: str | None = None  # a list of documents that must not come in again (`ledger remove` writes it)
    uses: tuple[str, ...] = ()  # what the model is for: commercial, redistribute, adapt; sources whose licence forbids one are told
    forbidden: str = "warn"  # what becomes of such a source: warn | refuse | leave_out
    images: bool = False  # also write the documents with their images as WebDataset shards (tar), which megatron-energon reads
    ingest: IngestConfig = field(default_factory=IngestConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    taxonomy: TaxonomyConfig = field(default_factory=TaxonomyConfig)


ROOMS = (ingest, privacy, quality, taxonomy)
CHOICES: dict[str, tuple[str, ...]] = {"forbidden": ("warn", "refuse", "leave_out")} | {key: value for room in ROOMS for key, value in room.CHOICES.items()}
RANGES: dict[str, str] = {"workers": "[0,inf)", "task_bytes": "[1,inf)"} | {key: value for room in ROOMS for key, value in room.RANGES.items()}
