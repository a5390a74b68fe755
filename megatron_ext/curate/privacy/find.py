"""All recognisers over one text."""
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache

from megatron_ext.curate.privacy import addresses, electronic, english, kinds, letters, numbers, phones, tables
from megatron_ext.curate.privacy.morphology import Morphology
from megatron_ext.curate.privacy.names_ko import Names
from megatron_ext.curate.privacy.normal import Normal
from megatron_ext.curate.privacy.rules import CLASSIFIED, Allow, Mark, Rules, squeezed
from megatron_ext.curate.privacy.spans import Span, resolve
from megatron_ext.curate.privacy.values import Values, variants

_AGAIN = 3  # characters from which on a value is looked for in the rest of its text: shorter ones are also words
_HANGUL = ("가", "힣")
_DIGIT = re.compile("[0-9]")


def _hangul(character: str) -> bool:
    return _HANGUL[0] <= character <= _HANGUL[1]

_PATTERNS = numbers.PATTERNS + phones.PATTERNS

class Recogniser:
    """What is personal in a text. A function of the text and the arguments alone; made once, used for any number of texts.

    Args:
        wanted: kinds; empty = all. Kinds of rules are always looked for.
        rules: of ministries.
        threshold: spans that are less sure are left out.
        morphology: tells Korean names from words; None = names need a label, a title or a neighbour.
    """

    def __init__(self, wanted: Iterable[str] = (), rules: Iterable[Rules] = (), threshold: float = 0.5, morphology: Morphology | None = None):
        self._wanted = frozenset(wanted) or frozenset(kinds.KINDS)
        self._rules, self._threshold = tuple(rules), threshold
        self._names = Names(morphology)
        self._words = {id(words): Values(words.words) for each in self._rules for words in each.words}

    def find(self, text: str, source: str = "") -> list[Span]:
        """Spans of `text` in its own offsets, in order, none overlapping. O(len(text))."""
        if not text:
            return []
        normal = Normal(text)
        spans = self.normalised(normal.text, source, normal.tabbed(text))
        return [Span(*normal.original(span.start, span.end), span.kind, span.score) for span in spans]

    def normalised(self, text: str, source: str, tabbed: str) -> list[Span]:
        """The same in a text that is normalised; `tabbed`: with its tabs."""
        serving = [each for each in self._rules if each.serve(source)]
        found = [span for span in self._general(text, tabbed) if span.score >= self._threshold and span.kind in self._wanted]
        for each in serving:
            found += [span for span in self._own(each, text) if span.score >= self._threshold]
        spans = resolve(found)
        allowed = [allow for each in serving for allow in each.allow]
        if allowed:
            spans = [span for span in spans if not any(_allowed(allow, span, text) for allow in allowed)]
        return self._again(text, spans)

    def wants(self, kind: str) -> bool:
        return kind in self._wanted

    def is_name(self, word: str) -> bool:
        """Whether a word that stands for itself is a name."""
        return self._names.alone(word)

    @staticmethod
    def marked(mark: Mark, text: str) -> bool:
        """Whether a classification mark stands in a normalised text where it counts."""
        return next(_marked(mark, text), None) is not None

    def _general(self, text: str, tabbed: str) -> list[Span]:
        found = self._plain(text)
        return [*found, *tables.find(text, tabbed, self._plain)] if "\n" in text else found

    def _plain(self, text: str) -> list[Span]:
        found: list[Span] = []
        if _DIGIT.search(text):
            runs = numbers.runs(text)
            found += numbers.tried(text, _PATTERNS, runs)
            found += numbers.find(text, runs)
            found += letters.find(text)
            found += electronic.addresses(text)
            found += addresses.find(text)
            found += english.addresses(text)
        found += phones.spelt(text)
        found += electronic.mails(text)
        others = [span for span in found if span.score >= self._threshold]
        if kinds.PERSON in self._wanted:
            if not text.isascii():
                found += self._names.find(text, others)
            found += english.names(text, others)
        return found

    def _own(self, rules: Rules, text: str) -> Iterator[Span]:
        for pattern in rules.patterns:
            for match in pattern.regex.finditer(text):
                if not pattern.near or any(word in text[max(0, match.start() - 32):match.start()].lower().replace(" ", "") for word in pattern.near):
                    yield Span(*match.span(), pattern.kind, pattern.score)
        for words in rules.words:
            for start, end in self._words[id(words)].find(text):
                if not words.whole or _whole(text, start, end):
                    yield Span(start, end, words.kind, words.score)
        for mark in rules.marks:
            if mark.action == "tag":
                yield from (Span(start, end, CLASSIFIED, 1.0) for start, end in _marked(mark, text))

    def _again(self, text: str, spans: list[Span]) -> list[Span]:
        """With the other places where what was found stands too: the same account without its label, the same name without its title."""
        kind_of: dict[str, Span] = {}
        for span in spans:
            value = text[span.start:span.end]
            if len(value) >= (_AGAIN if span.kind == kinds.PERSON else 6):
                for spelling in variants(value, span.kind):
                    kind_of.setdefault(spelling, span)
        if not kind_of:
            return spans
        more = []
        for start, end in Values(kind_of).find(text):
            if _whole(text, start, end):
                span = kind_of[text[start:end]]
                more.append(Span(start, end, span.kind, span.score))
        return resolve([*spans, *more])


def _whole(text: str, start: int, end: int) -> bool:
    """Whether start .. end is no part of a longer word or number."""
    first, last = text[start], text[end - 1]
    before, after = text[start - 1] if start else " ", text[end] if end < len(text) else " "
    if first.isdigit() and before.isdigit() or last.isdigit() and after.isdigit():
        return False
    if _hangul(first):
        return not _hangul(before)
    return not (first.isascii() and first.isalpha() and before.isascii() and before.isalnum() or last.isascii() and last.isalpha() and after.isascii() and after.isalnum())


def _allowed(allow: Allow, span: Span, text: str) -> bool:
    value = text[span.start:span.end]
    if allow.kind is not None and allow.kind != span.kind:
        return False
    return squeezed(value) in allow.values or allow.regex is not None and allow.regex.fullmatch(value) is not None


def _marked(mark: Mark, text: str) -> Iterator[tuple[int, int]]:
    """Where a mark stands. In the head it has to stand for itself: alone on its line, or in brackets; 대외비가 아니다 is no mark."""
    pattern = _mark_pattern(mark.mark)
    if mark.where == "anywhere":
        yield from (match.span() for match in pattern.finditer(text))
        return
    end = 0
    for _ in range(mark.lines):
        if (end := text.find("\n", end) + 1) == 0:
            end = len(text)
            break
    for match in pattern.finditer(text, 0, end):
        start, stop = match.span()
        before = text[text.rfind("\n", 0, start) + 1:start].strip(" *#-■□◆◇※")
        line_end = text.find("\n", stop)
        after = text[stop:len(text) if line_end < 0 else line_end].strip(" *#-■□◆◇※")
        if not before and not after or before[-1:] in "([{<【〔「" and before and after[:1] and after[0] in ")]}>】〕」":
            yield start, stop


@lru_cache(maxsize=256)
def _mark_pattern(mark: str) -> re.Pattern:
    """Blanks may stand between its characters."""
    return re.compile("[ \n]{0,3}".join(re.escape(character) for character in mark if not character.isspace()))
