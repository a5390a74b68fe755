"""The steps of this room for the pipeline (megatron_ext/curate/blocks.py): quality, decontaminate, exact, near, paragraphs."""
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from megatron_ext.curate.blocks import CHANGE, DROP, KEPT, Document, Phase, Shards, Verdict, dropped
from megatron_ext.curate.quality import clusters, keep_first, lists
from megatron_ext.curate.quality.boilerplate import clean
from megatron_ext.curate.quality.config import QualityConfig
from megatron_ext.curate.quality.decontaminate import Index, cut
from megatron_ext.curate.quality.duplicates import without
from megatron_ext.curate.quality.heuristics import judge
from megatron_ext.curate.quality.judge import Judge
from megatron_ext.curate.quality.language_model import NgramModel
from megatron_ext.curate.quality.repetition import repeated
from megatron_ext.curate.quality.text import is_korean, solid


class Quality:
    """Boilerplate lines out, then heuristics, repetition, word lists, perplexity: the cheap ones first. Metadata that it writes: `flags`
    (list), `perplexity`, `word_order`.

    Raises:
        UserError: a model or list that cannot be read.
    """

    def __init__(self, settings: QualityConfig):
        self.settings = settings
        path = settings.language_model.path
        self.judge = Judge(NgramModel.load(path), settings.language_model) if path is not None else None
        self.lists = {name: lists.opened(*getattr(settings.lists, name)) for name in ("toxic", "bias") if getattr(settings.lists, name)}

    def process(self, document: Document) -> Verdict:
        settings, counts = self.settings, {}
        text, lines = clean(document.text) if settings.clean else (document.text, 0)
        if lines:
            counts["boilerplate_lines"] = lines
        korean = is_korean(text, document.metadata.get("language"))
        running = not any(fnmatchcase(document.metadata.get("source", ""), pattern) for pattern in settings.records)
        reason = judge(text, korean=korean) if settings.heuristics and running else None
        if reason is None and settings.repetition and running:
            reason = repeated(text, korean=korean)
        flags = []
        if reason is None:
            reason, flags = self._listed(text)
        judged = self.judge.look(text) if reason is None and self.judge is not None else None
        if judged is not None:
            reason = judged.reason
        if reason is not None:
            return dropped(reason, **counts)
        if flags:
            document.metadata["flags"] = sorted({*document.metadata.get("flags", ()), *flags})
            counts |= {f"flag_{flag}": 1 for flag in flags}
        if judged is not None:
            document.metadata["perplexity"] = round(judged.perplexity, 2)
            if judged.word_order is not None:
                document.metadata["word_order"] = round(judged.word_order, 3)
        document.text = text
        return Verdict(CHANGE, counts=counts) if lines or flags or judged is not None else KEPT

    def _listed(self, text: str) -> tuple[str | None, list[str]]:
        settings, flags = self.settings.lists, []
        for name, words in self.lists.items():
            found = words.find(text)
            if found.count >= getattr(settings, f"{name}_least") and found.per_thousand > getattr(settings, f"{name}_per_thousand"):
                if getattr(settings, f"{name}_action") == "drop":
                    return name, []
                flags.append(name)
        return None, flags


class Decontaminate:
    """Drops documents that hold n-grams of evaluation sets, or cuts these passages out. Raises UserError as Quality does."""

    def __init__(self, settings: QualityConfig):
        self.settings = settings.decontaminate
        self.index = Index.load(self.settings.index) if self.settings.index is not None else None

    def process(self, document: Document) -> Verdict:
        hits = self.index.hits(document.text) if self.index is not None else ()
        if len(hits) < self.settings.min_hits:
            return KEPT
        if self.settings.action == "drop":
            return dropped("contaminated", ngrams=len(hits))
        pieces = cut(document.text, hits, margin=self.settings.margin)
        if not pieces or len(pieces) > self.settings.max_pieces:
            return dropped("contaminated", ngrams=len(hits))
        document.text = "\n\n".join(pieces)
        return Verdict(CHANGE, counts={"ngrams": len(hits)})


class _Numbered:
    """Decides by the document's number in its shard.

    Args:
        gone: document -> paragraphs that go. firsts: document -> where they stay, (shard, document).
    """

    def __init__(self, gone: Collection[int], firsts: Mapping[int, list[tuple[int, int]]], shards: Shards, reason: str):
        self.gone, self.reason, self.number = gone, reason, -1
        places = sorted({place for of in firsts.values() for place in of}) if shards.ids is not None else []
        ids = dict(zip(places, shards.ids(places))) if shards.ids is not None else {}
        self.of = {number: tuple(ids[place] for place in of if place in ids) for number, of in firsts.items()}

    def process(self, document: Document) -> Verdict:
        self.number += 1
        return Verdict(DROP, self.reason, of=self.of.get(self.number, ())) if self.number in self.gone else KEPT


class _Paragraphs(_Numbered):
    def __init__(self, gone: Mapping[int, set[int]], firsts: Mapping[int, list[tuple[int, int]]], shards: Shards, least: int):
        super().__init__(gone, firsts, shards, "paragraphs_only")
        self.least = least

    def process(self, document: Document) -> Verdict:
        self.number += 1
        gone = self.gone.get(self.number)
        if not gone:
            return KEPT
        document.text = without(document.text, gone)
        counts, of = {"repeated_paragraphs": len(gone)}, self.of.get(self.number, ())
        return Verdict(DROP, self.reason, counts, of) if len(solid(document.text)) < max(self.least, 1) else Verdict(CHANGE, counts=counts, of=of)


class ExactDuplicates:
    """Of documents with the same letters and digits the first one stays ("exact_duplicate")."""

    def __init__(self, settings: QualityConfig):
        self.settings = settings.duplicates

    kind = "exact"

    def phases(self, shards: Shards) -> Sequence[Phase]:
        parts = self.settings.parts

        def keys():
            from megatron_ext.curate.quality.steps import Keys

            return [shards.reader(), Keys(shards.work, self.settings, self.kind)]

        def firsts():
            from megatron_ext.curate.quality.steps import Firsts

            return [Firsts(shards.work, shards.count)]

        return [Phase(f"{self.kind}_keys", shards.count, keys), Phase(f"{self.kind}_firsts", parts, firsts)]

    def decide(self, shards: Shards, rank: int) -> _Numbered:
        where = Path(shards.work), rank, self.settings.parts
        return _Numbered(*keep_first.removals(*where), shards, "exact_duplicate")


class ParagraphDuplicates(ExactDuplicates):
    """Of paragraphs with the same letters and digits, in one document or in several, the first one stays; the text goes on without the
    others."""

    kind = "paragraphs"

    def decide(self, shards: Shards, rank: int) -> _Numbered:
        where = Path(shards.work), rank, self.settings.parts
        return _Paragraphs(*keep_first.removals(*where), shards, self.settings.min_characters)


class NearDuplicates:
    """datatrove's MinHash with the signatures of duplicates.py: of each cluster of near duplicates one stays ("near_duplicate")."""

    def __init__(self, settings: QualityConfig):
        self.settings = settings.duplicates

    def phases(self, shards: Shards) -> Sequence[Phase]:
        def signatures():
            from megatron_ext.curate.quality.steps import Signatures

            return [shards.reader(), Signatures(shards.work, self.settings)]

        def buckets():
            from megatron_ext.curate.quality.steps import buckets as step

            return [step(shards.work, self.settings)]

        def merged():
            from megatron_ext.curate.quality.steps import Clusters

            return [Clusters(shards.work)]

        return [
            Phase("near_signatures", shards.count, signatures),
            Phase("near_buckets", self.settings.buckets, buckets),
            Phase("near_clusters", 1, merged),
        ]

    def decide(self, shards: Shards, rank: int) -> _Numbered:
        firsts = clusters.firsts(Path(shards.work), rank)
        return _Numbered(firsts, firsts, shards, "near_duplicate")
