"""The step `privacy` of curation."""
from megatron_ext.curate.blocks import CHANGE, KEPT, Document, Verdict, dropped
from megatron_ext.curate.privacy.clean import Cleaner
from megatron_ext.curate.privacy.config import PrivacyConfig
from megatron_ext.curate.privacy.report import Report


class PrivacyFailed(Exception):
    """A recogniser failed: the document's id and the type of what was raised, and no text of it."""


class Privacy:
    """Takes personal data out of the text and of what stands beside it. Counts are places by kind; a mark of a ministry's rules drops a document.

    Raises:
        UserError: settings, rules or key are wrong, kiwipiepy is missing.
    """

    def __init__(self, settings: PrivacyConfig):
        self.cleaner = Cleaner(settings)
        self._settings = settings
        self._report = Report(settings.samples)

    def process(self, document: Document) -> Verdict:
        failed = None
        try:
            return self._process(document)
        except Exception as error:  # noqa: BLE001 whatever it was, its message and its frames may hold the text
            failed = type(error).__name__
        raise PrivacyFailed(f"document {document.id}: {failed}")

    def _process(self, document: Document) -> Verdict:
        source, before = str(document.metadata.get("source", "")), document.text
        cleaned = self.cleaner.clean(before, source)
        if cleaned.dropped:
            self._report.drop(source, cleaned.mark)
            return dropped(cleaned.dropped)
        beside = self.cleaner.clean_metadata(document.metadata, cleaned.values, source) if self._settings.metadata else 0
        self._report.add(source, document.id, before, list(cleaned.spans))
        if not cleaned.spans and not beside:
            return KEPT
        document.text = cleaned.text
        counts: dict[str, int] = {"metadata": beside} if beside else {}
        for span in cleaned.spans:
            counts[span.kind] = counts.get(span.kind, 0) + 1
        return Verdict(CHANGE, counts=counts)

    def take_report(self) -> dict:
        """What was removed since the last call (`report.merged` adds up), with masked samples; the next one begins empty."""
        report, self._report = self._report, Report(self._settings.samples)
        return report.to_json()
