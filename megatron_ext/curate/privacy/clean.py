"""Personal data out of texts: recognisers, rules and replacements put together from the settings. No datatrove.

    cleaner = Cleaner(PrivacyConfig(action="mask"))
    cleaner.clean("연락처는 010-1234-5678입니다.").text      # 연락처는 ***-****-****입니다.
"""
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_ext.curate.privacy import kinds
from megatron_ext.curate.privacy.config import PrivacyConfig, check
from megatron_ext.curate.privacy.find import Recogniser
from megatron_ext.curate.privacy.morphology import Morphology
from megatron_ext.curate.privacy.normal import Normal
from megatron_ext.curate.privacy.replace import Replacer
from megatron_ext.curate.privacy.rules import load
from megatron_ext.curate.privacy.spans import Span
from megatron_ext.curate.privacy.values import Values, variants

CLASSIFIED = "classified"  # the reason of a document that a mark drops
_FACTS = frozenset(("source", "sha256", "text_sha256", "derived_from"))  # of metadata: not looked at, ours
_SHORT = frozenset(("licence", "date", "language", "domain"))  # looked at for themselves
_CELLS = " | "
_ALONE = re.compile("(?<![가-힣])[가-힣]{3,4}(?![가-힣])")


@dataclass(frozen=True)
class Cleaned:
    """What became of a text.

    Attributes:
        text: without what was removed; "" of a dropped one.
        spans: in the text as it was, of what was removed.
        dropped: the reason, or "".
        mark: the position of the rule that dropped it ("ministry:0"), never the mark itself.
        values: what was removed, normalised, with its kind; for looking in what belongs to the text. Not shown.
    """

    text: str = field(repr=False)
    spans: tuple[Span, ...] = ()
    dropped: str = ""
    mark: str = ""
    values: Mapping[str, str] = field(default_factory=dict, repr=False)


class Cleaner:
    """Made once a process, used for any number of texts.

    Raises:
        UserError: settings, rules or the key are wrong; kiwipiepy is asked for and missing.
    """

    def __init__(self, settings: PrivacyConfig):
        check(settings)
        self.settings = settings
        self._rules = tuple(load(path) for path in settings.rules)
        self._replace = Replacer(settings, {kind: action for rules in self._rules for kind, action in rules.actions.items()})
        morphology = Morphology() if settings.morphology == "kiwi" else None
        self._recogniser = Recogniser(settings.kinds, self._rules, settings.threshold, morphology)
        self._marks = any(rules.marks for rules in self._rules)

    def find(self, text: str, source: str = "") -> list[Span]:
        """What would be removed: spans of kinds that are not kept."""
        return [span for span in self._recogniser.find(text, source) if self._replace.action(span.kind) != "keep"]

    def clean(self, text: str, source: str = "") -> Cleaned:
        """The text without personal data. Lines stay lines: what was removed across line ends leaves them behind it."""
        if self._marks and (mark := self._dropping(text, source)):
            return Cleaned("", dropped=CLASSIFIED, mark=mark)
        spans = self.find(text, source)
        if not spans:
            return Cleaned(text)
        values = {spelling: span.kind for span in spans for spelling in variants(Normal(text[span.start:span.end]).text, span.kind)}
        return Cleaned(self.replaced(text, spans), tuple(spans), values=values)

    def replaced(self, text: str, spans: Sequence[Span]) -> str:
        parts, at = [], 0
        for span in spans:
            value = text[span.start:span.end]
            masked = self._replace.action(span.kind) == "mask"
            parts += [text[at:span.start], self._replace(span.kind, value), "" if masked else "\n" * value.count("\n")]
            at = span.end
        return "".join([*parts, text[at:]])

    def clean_metadata(self, metadata: dict[str, Any], values: Mapping[str, str], source: str = "") -> int:
        """Texts inside (title, origin, captions, cells) in place. Returns how many places were removed.

        Args:
            values: `Cleaned.values` of the document's text: they are removed here too, whatever they stand beside.
        """
        known, nothing, removed = (Values(values), values), (Values(()), {}), 0
        for key, value in metadata.items():
            if key in _FACTS:
                continue
            if key == "origin" and isinstance(value, str):
                spans = self._known(value, known, source, self._in_name(value, source))
                metadata[key], count = self.replaced(value, spans), len(spans)
            else:
                metadata[key], count = self._inside(value, nothing if key in _SHORT else known, source)
            removed += count
        return removed

    def _inside(self, value: Any, known: tuple[Values, Mapping[str, str]], source: str) -> tuple[Any, int]:
        if isinstance(value, str):
            spans = self._known(value, known, source)
            return (self.replaced(value, spans), len(spans)) if spans else (value, 0)
        if isinstance(value, Mapping):
            made, removed = {}, 0
            for name, inner in value.items():
                if name == "rows" and _is_table(inner):
                    made[name], count = self._rows(inner, known, source)
                else:
                    made[name], count = (inner, 0) if name in ("sha256", "media_type") else self._inside(inner, known, source)
                removed += count
                if spans := self.find(name, source) if isinstance(name, str) else []:
                    made[self.replaced(name, spans)] = made.pop(name)
                    removed += len(spans)
            return made, removed
        if isinstance(value, list):
            pairs = [self._inside(inner, known, source) for inner in value]
            return [inner for inner, _ in pairs], sum(count for _, count in pairs)
        return value, 0

    def clean_name(self, text: str, source: str = "") -> str:
        """The name of a file, in which a person's stands for itself between signs: 홍길동_이력서.hwp."""
        return self.replaced(text, self._in_name(text, source))

    def _in_name(self, text: str, source: str) -> list[Span]:
        spans, normal = self.find(text, source), Normal(text)
        if self._replace.action(kinds.PERSON) == "keep" or not self._recogniser.wants(kinds.PERSON):
            return spans
        return _with(spans, (Span(*normal.original(*match.span()), kinds.PERSON, 0.7) for match in _ALONE.finditer(normal.text) if self._recogniser.is_name(match[0])))

    def _known(self, text: str, known: tuple[Values, Mapping[str, str]], source: str, spans: list[Span] | None = None) -> list[Span]:
        """Spans of a short text, with those of values that were found elsewhere."""
        spans = self.find(text, source) if spans is None else spans
        normal = Normal(text)
        return _with(spans, (Span(*normal.original(start, end), known[1][normal.text[start:end]], 1.0) for start, end in known[0].find(normal.text)))

    def _rows(self, rows: list[list[str]], known: tuple[Values, Mapping[str, str]], source: str) -> tuple[list[list[str]], int]:
        """A table as one text, so that a cell is read beside its neighbours; then each cell gets its part."""
        text = "\n".join(_CELLS.join(row) for row in rows)
        spans = self._known(text, known, source)
        if not spans:
            return rows, 0
        made, at, waiting = [], 0, 0
        for row in rows:
            cells = []
            for cell in row:
                end = at + len(cell)
                while waiting < len(spans) and spans[waiting].end <= at:
                    waiting += 1
                inner = [Span(max(span.start, at) - at, min(span.end, end) - at, span.kind, span.score)
                         for span in spans[waiting:waiting + len(cell) + 1] if span.start < end and span.end > at]
                cells.append(self.replaced(cell, inner) if inner else cell)
                at = end + len(_CELLS)
            at = at - len(_CELLS) + 1 if row else at + 1
            made.append(cells)
        return made, len(spans)

    def _dropping(self, text: str, source: str) -> str:
        normal = Normal(text).text
        for rules in self._rules:
            for number, mark in enumerate(rules.marks):
                if mark.action == "drop" and rules.serve(source) and self._recogniser.marked(mark, normal):
                    return f"{rules.name}:{number}"
        return ""


def _with(spans: list[Span], more: Iterable[Span]) -> list[Span]:
    """`spans` (in order), and those of `more` (in order) that overlap none of them, nor each other. In time that grows with both."""
    at, last, free = 0, 0, []
    for span in more:
        while at < len(spans) and spans[at].end <= span.start:
            at += 1
        if span.start >= last and (at == len(spans) or spans[at].start >= span.end):
            free.append(span)
            last = span.end
    return sorted([*spans, *free])


def _is_table(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(row, list) and all(isinstance(cell, str) for cell in row) for row in value)
