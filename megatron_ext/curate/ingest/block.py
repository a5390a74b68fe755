"""The steps of ingest: normalise, language, select."""
import re
import unicodedata

from megatron_ext.curate.blocks import CHANGED, KEPT, Document, Verdict, dropped
from megatron_ext.curate.ingest.config import IngestConfig, SelectConfig
from megatron_ext.curate.ingest.language import identify

# Controls but tab and line feed, marks of byte order, soft hyphens, invisible joiners of Latin text, half pairs; what stands for undecodable bytes stays.
_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u200b\u2060\ufeff\ud800-\udfff]")
_ENDS = re.compile("\r\n?|\u2028|\u2029|\x85")
_TRAILING = re.compile(r"[ \t\u00a0\u3000]+(?=\n|$)")
_BLANK = re.compile(r"\n{4,}")


def normalised(text: str) -> str:
    """NFC, lines that end in \\n, nothing invisible, no blanks at the end of a line, at most two empty lines in a row, none at either end."""
    text = _UNSEEN.sub("", _ENDS.sub("\n", text))
    text = _BLANK.sub("\n\n\n", _TRAILING.sub("", text)).strip("\n")
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


class Normalise:
    """Text as every later step expects it; texts beside it (title, captions, cells) too. Drops what is shorter than `min_characters`."""

    def __init__(self, settings: IngestConfig):
        self._shortest = settings.min_characters

    def process(self, document: Document) -> Verdict:
        before, document.text = document.text, normalised(document.text)
        changed = document.text != before
        for key in ("title", "owner", "date", "origin"):
            if isinstance(value := document.metadata.get(key), str):
                document.metadata[key] = " ".join(normalised(value).split())
        for part in (*document.metadata.get("images", ()), *document.metadata.get("tables", ())):
            if isinstance(part.get("caption"), str):
                part["caption"] = normalised(part["caption"])
            if "rows" in part:
                part["rows"] = [[normalised(cell) for cell in row] for row in part["rows"]]
        length = len(document.text.strip())
        if length < max(self._shortest, 1):
            return dropped("too_short" if length else "empty")
        return CHANGED if changed else KEPT


class Language:
    """Writes `language` where the source has not said it."""

    def __init__(self, settings: IngestConfig):
        pass

    def process(self, document: Document) -> Verdict:
        if not document.metadata.get("language"):
            document.metadata["language"] = identify(document.text)
        return Verdict(counts={f"language_{document.metadata['language']}": 1})


class Select:
    """Keeps what the build is for."""

    def __init__(self, settings: SelectConfig):
        self._wanted = {"domain": settings.domains, "language": settings.languages, "source": settings.sources}

    def process(self, document: Document) -> Verdict:
        for key, wanted in self._wanted.items():
            if wanted and document.metadata.get(key) not in wanted:
                return dropped(f"other_{key}")
        return KEPT
