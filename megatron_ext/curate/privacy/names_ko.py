"""Names of persons in Korean, in context: behind a label (성명: ...), before a title (... 씨), in a list of names, beside a number of a person, or as a word that
morphology takes for a name where a person would stand.

A word is a candidate when it begins with a surname, goes on with syllables of given names, and what follows is a particle, a title or no syllable at all.
"""
import re
from collections.abc import Iterable, Iterator

from megatron_ext.curate.privacy import kinds
from megatron_ext.curate.privacy import words_ko as words
from megatron_ext.curate.privacy.morphology import NAME, UNKNOWN, WORD, Morphology
from megatron_ext.curate.privacy.spans import Span

_SURNAME = "".join(sorted(words.SURNAMES))
_CLASS = f"[{_SURNAME}]"
_RUN = re.compile(rf"{_CLASS}(?<![가-힣].)[가-힣]{{1,11}}")
_LABELLED = re.compile(rf"(?:{words.LABELS})(?:은|는|이|인|의 (?:이름|성명)은)?(?P<sign>[ \n]{{0,3}}[:=|/)\]>\-][ \n]{{0,6}}|[ \n]{{1,4}}|(?={_CLASS}))(?=[가-힣A-Z])")
_SPACED_LABEL = re.compile(r"(?:성[ \n]{1,6}명|이[ \n]{1,6}름|성[ \n]{1,6}함)[ \n]{0,3}(?P<sign>[:=|]|(?=[ \n]))[ \n]{0,6}(?=[가-힣A-Z])")
_SPACED = re.compile(rf"{_CLASS}[ \n]{{1,4}}[가-힣](?:[ \n]{{0,4}}[가-힣])?(?![가-힣])")
_SPACED_TITLE = re.compile(rf"{_CLASS}(?<![가-힣].)[ \n]{{1,3}}[가-힣](?:[ \n]{{0,3}}[가-힣])?[ \n]{{0,3}}(?:씨|님|군|양)(?![가-힣])")
_TITLE = re.compile(rf"(?:{words.TITLES})")
_TITLE_BEHIND = re.compile(rf"[ \n]{{1,3}}(?:전[ \n]?)?(?P<title>{words.TITLES})(?P<rest>[가-힣]{{0,6}})")
_LATIN = re.compile(r"[A-Z][A-Za-z'-]{1,20}(?:,? [A-Z][A-Za-z'.-]{0,20}){1,3}")
_JOIN = re.compile(r"[ \n]{0,3}(?:[,·/、&]|및|와|과)[ \n]{0,3}$")
_AND = re.compile(r"(?:와|과|랑)?[ \n]{0,3}(?:[,·/、&]|및|와|과)?[ \n]{0,3}")
_LIST = re.compile(rf"{_CLASS}(?<![가-힣].)[가-힣]{{2}}(?:[ \n]{{0,3}}·[ \n]{{0,3}}{_CLASS}[가-힣]{{2}}(?![가-힣]{{3}})){{2,40}}")
_ONE = re.compile(rf"{_CLASS}[가-힣]{{2}}")
_BESIDE = re.compile(rf"{_CLASS}(?<![가-힣].)[가-힣]{{1,3}}(?=[ \n]{{0,2}}[(,:/|\-·\[][ \n(\[]{{0,2}}$|[ \n]{{1,2}}$)")
_BEHIND = re.compile(rf"[ \n]{{0,2}}[(,/|\-\[)][ \n(\[]{{0,3}}(?P<name>{_CLASS}[가-힣]{{1,2}})(?![가-힣])")
_BLANK = re.compile(r"[ \n]+")


def _is_rest(rest: str) -> bool:
    """Nothing, a particle, or a title with or without one."""
    if not rest or rest in words.PARTICLES:
        return True
    title = _TITLE.match(rest)
    return title is not None and (title.end() == len(rest) or rest[title.end():] in words.PARTICLES or rest[title.end():].startswith(("들", "께", "이", "과", "와", "님", "입")))


def shapes(run: str) -> Iterator[int]:
    """Lengths at which a run of Hangul may be a name and its particle or title, likely ones first."""
    lengths = (4, 3) if run[:2] in words.PAIRS else (3, 2, 4)
    for length in lengths:
        if len(run) >= length and _is_rest(run[length:]):
            given = run[2:length] if length == 4 and run[:2] in words.PAIRS else run[1:length]
            if all(syllable in words.GIVEN for syllable in given) and run[:length] not in words.NOT_NAMES and run[:2] not in (words.NOT_NAMES if length == 2 else ()):
                yield length


class Names:
    """Args: morphology: None = names without a label, a title or a neighbour are not looked for."""

    def __init__(self, morphology: Morphology | None):
        self._morphology = morphology

    def find(self, text: str, others: Iterable[Span]) -> list[Span]:
        """Names in a normalised text; `others` are what else was found in it."""
        found = [*self._labelled(text), *self._lists(text), *self._runs(text), *self._beside(text, others)]
        found += [Span(*match.span(), kinds.PERSON, 0.8) for match in _SPACED_TITLE.finditer(text) if _given(_BLANK.sub("", match[0])[1:3])]
        return found + list(self._neighbours(text, found))

    def _labelled(self, text: str) -> Iterator[Span]:
        for label in (*_LABELLED.finditer(text), *_SPACED_LABEL.finditer(text)):
            sign, at = label["sign"].strip(), label.end()
            if sign and (latin := _LATIN.match(text, at)):
                yield Span(*latin.span(), kinds.PERSON, 0.9)
                continue
            if (spaced := _SPACED.match(text, at)) and (sign or label.re is _SPACED_LABEL) and _given(_BLANK.sub("", spaced[0])[1:]):
                yield Span(*spaced.span(), kinds.PERSON, 0.85)
                continue
            if label.start() and "가" <= text[label.start() - 1] <= "힣" and not sign:
                continue
            run = _RUN.match(text, at) or (_GLUED.match(text, at) if not label["sign"] else None)
            if run is None:
                continue
            for length in shapes(run[0]):
                judged = self._judge(text, at, at + length)
                if judged == WORD and not (sign and length == 3 and run[0][:3] not in words.NOT_NAMES and self._usual(run[0][:3])):
                    continue
                if judged is None and not sign and (length == 2 or not self._usual(run[0][:length])):
                    continue
                yield Span(at, at + length, kinds.PERSON, 0.92 if sign else 0.8 if judged == NAME or length == 3 else 0.6)
                break

    def _runs(self, text: str) -> Iterator[Span]:
        for match in _RUN.finditer(text):
            run, start = match[0], match.start()
            if run in words.NOT_NAMES:
                continue
            for length in shapes(run):
                name, rest = run[:length], run[length:]
                title = _TITLE.match(rest) if rest else None
                if title is None and not rest and (behind := _TITLE_BEHIND.match(text, match.end())) is not None:
                    after = behind["rest"]
                    if not after or after in words.PARTICLES or after.startswith(("들", "께", "이", "과", "와", "님", "입")):
                        title = behind
                if title is not None:
                    judged = self._judge(text, start, start + length)
                    if judged == WORD and not (length == 3 and self._usual(name) and run[:2] not in words.NOT_NAMES) or length == 2 and judged != NAME:
                        continue
                    yield Span(start, start + length, kinds.PERSON, 0.9 if judged == NAME else 0.75)
                    break
                if self._morphology is None or length != 3 or not self._usual(name) or name[0] not in words.FREQUENT:
                    continue
                if self._judge(text, start, start + 3) == NAME:
                    yield Span(start, start + 3, kinds.PERSON, 0.6)
                    break

    def _lists(self, text: str) -> Iterator[Span]:
        for match in _LIST.finditer(text):
            names = list(_ONE.finditer(text, match.start(), match.end()))
            if sum(self._usual(name[0]) and name[0] not in words.NOT_NAMES and self._judge(text, *name.span()) != WORD for name in names) * 2 > len(names):
                yield from (Span(*name.span(), kinds.PERSON, 0.85) for name in names)

    def _beside(self, text: str, others: Iterable[Span]) -> Iterator[Span]:
        for other in others:
            if other.kind not in kinds.OF_PERSONS:
                continue
            for match in _BESIDE.finditer(text, max(0, other.start - 12), other.start):
                if len(match[0]) in (2, 3, 4) and next(shapes(match[0]), 0) == len(match[0]) and self._judge(text, *match.span()) != WORD:
                    yield Span(*match.span(), kinds.PERSON, 0.7 if len(match[0]) == 3 else 0.55)
            if (match := _BEHIND.match(text, other.end)) and next(shapes(match["name"]), 0) == len(match["name"]) and self._judge(text, *match.span("name")) != WORD:
                yield Span(*match.span("name"), kinds.PERSON, 0.7)

    def _neighbours(self, text: str, found: list[Span]) -> Iterator[Span]:
        """Names that are joined to one: 김민수, 이영희와 박철수."""
        seen = {span.start for span in found}
        waiting = list(found)
        while waiting:
            span = waiting.pop()
            joined = _AND.match(text, span.end)
            if joined is None or joined.end() == span.end or not joined[0].strip():
                continue
            if (run := _RUN.match(text, joined.end())) and run.start() not in seen and (length := next(shapes(run[0]), 0)) == 3 \
                    and self._usual(run[0][:3]) and self._judge(text, run.start(), run.start() + 3) != WORD:
                made = Span(run.start(), run.start() + 3, kinds.PERSON, 0.7)
                seen.add(made.start)
                waiting.append(made)
                yield made

    def _judge(self, text: str, start: int, end: int) -> str | None:
        return None if self._morphology is None else self._morphology.judge(text, start, end)

    @staticmethod
    def _usual(name: str) -> bool:
        return len(name) == 3 and name[1] in words.USUAL_FIRST and name[2] in words.USUAL_SECOND or len(name) == 4 and name[:2] in words.PAIRS


_GLUED = re.compile(rf"{_CLASS}[가-힣]{{1,11}}")


def _given(syllables: str) -> bool:
    return bool(syllables) and all(syllable in words.GIVEN for syllable in syllables)
