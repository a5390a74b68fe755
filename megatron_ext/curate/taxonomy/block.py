"""The step `taxonomy` of the pipeline (megatron_ext/curate/blocks.py)."""
from megatron_ext.curate.blocks import CHANGE, KEPT, Document, Verdict, dropped
from megatron_ext.curate.taxonomy.classifier import NONE, Classifier
from megatron_ext.curate.taxonomy.config import TaxonomyConfig


class Taxonomy:
    """Writes `domain`, `domain_score` and `domains` into the metadata. Raises UserError for a model that cannot be read."""

    def __init__(self, settings: TaxonomyConfig):
        self.settings = settings
        self.model = Classifier.load(settings.path) if settings.path is not None else None

    def process(self, document: Document) -> Verdict:
        if self.model is None:
            return KEPT
        answer = self.model.classify(document.text[: self.settings.max_characters], threshold=self.settings.threshold)
        given = document.metadata.get("domain") if self.settings.trust_given else None
        domain = given or answer.domain
        document.metadata.update(domain=domain, domain_score=round(answer.score, 4), domains=list(answer.domains))
        if domain == NONE and self.settings.drop_none:
            return dropped("no_domain")
        # domains are names of the model's own list, constant words like any reason
        return Verdict(CHANGE, counts={f"domain_{domain}": 1} if not given else {"domain_given": 1})
