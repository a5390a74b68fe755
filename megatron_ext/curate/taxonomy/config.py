"""Settings of this room: `Config.curate.taxonomy`. No imports: `config/schema.py` reads this file."""
from dataclasses import dataclass


@dataclass(frozen=True)
class TaxonomyConfig:
    """The step `taxonomy` writes metadata `domain` (a name, or "none"), `domain_score` and `domains` (all above the threshold)."""

    path: str | None = None  # a model that `python -m megatron_ext.curate.taxonomy train` wrote; null = the step has no effect
    threshold: float | None = None  # probability that a domain needs; null = the model's own, chosen on held-out examples
    drop_none: bool = False  # whether documents of none of our domains are dropped ("no_domain")
    trust_given: bool = True  # whether a domain that the catalogue gave (metadata `domain`) stays
    max_characters: int = 20_000  # of a document that are looked at, from its beginning


CHOICES: dict[str, tuple[str, ...]] = {}
RANGES = {"taxonomy.threshold": "(0,1)", "taxonomy.max_characters": "[100,inf)"}
