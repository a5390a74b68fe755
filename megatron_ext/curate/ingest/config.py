"""Settings of ingest: what is read, and how. No imports: `config/schema.py` reads this file."""
from dataclasses import dataclass


@dataclass(frozen=True)
class IngestConfig:
    """Files to documents."""

    catalogue: str | None = None  # a YAML file of sources (docs/curate.md); null = everything in the input is one source of unknown licence
    text_fields: tuple[str, ...] = ()  # fields of records (JSON, CSV, Parquet, XML) that are the text; empty = the catalogue's, else the likely ones
    encoding: str = "auto"  # of text: auto (told from the bytes) | utf-8 | cp949 | utf-16
    html: str = "article"  # of a page: article (the main text, without menus) | all (everything that is shown)
    max_bytes: int = 1 << 26  # of a file that is read whole (text, pages, PDF, office files, members of archives); larger ones are set aside
    max_seconds: int = 120  # processor seconds that reading a PDF may take, after which it is set aside
    max_broken: float = 0.001  # share of the characters of a text that may be undecodable; more sets it aside
    min_characters: int = 1  # shorter documents are dropped


@dataclass(frozen=True)
class SelectConfig:
    """The step `select`: what a build is for. An empty list lets everything through."""

    domains: tuple[str, ...] = ()  # as `taxonomy` or the catalogue names them
    languages: tuple[str, ...] = ()  # ISO 639-1, such as ko
    sources: tuple[str, ...] = ()  # of the catalogue


CHOICES = {"ingest.encoding": ("auto", "utf-8", "cp949", "utf-16"), "ingest.html": ("article", "all")}
RANGES = {"ingest.max_bytes": "[1,inf)", "ingest.max_seconds": "[1,inf)", "ingest.max_broken": "[0,1)", "ingest.min_characters": "[0,inf)"}
