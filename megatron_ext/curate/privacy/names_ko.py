"""Names of persons in Korean, in context: behind a label (성명: ...), before a title (... 씨), in a list of names, beside a number of a person, or as a word that
morphology takes for a name where a person would stand.

A word is a candidate when it begins with a surname, goes on with syllables of given names, and what follows is a particle, a title or no syllable at all.
"""
import re
from collections.abc import Iterable, Iterator

from megatron_ext.curate.privacy import kinds
from megatron_ext.curate.privacy import words_ko as words
from megatron_ext.curate.privacy.morphology import COMMON, MIXED, NAME, UNKNOWN, Morphology
from megatron_ext.curate.privacy.spans import Span

_SURNAME = "".join(sorted(words.SURNAMES))
_CLASS = f"[{_SURNAME}]"
_SECOND = f"[{''.join(sorted(words.GIVEN | {pair[1] for pair in words.PAIRS}))}]"
_RUN = re.compile(rf"{_CLASS}(?<![가-힣].){_SECOND}[가-힣]{{0,10}}")
_LABELLED = re.compile(rf"(?:{words.LABELS})(?:(?<=[명함름자인])[은는])?(?:[ ]?\([^()\n]{{1,8}}\))?(?P<sign>[ \n]{{0,3}}[:=|/)\]>\-][ \n]{{0,6}}|[ \n]{{1,4}}|(?={_CLASS}))(?=[가-힣A-Z])")
_SPACED_LABEL = re.compile(r"(?:성[ \n]{1,6}명|이[ \n]{1,6}름|성[ \n]{1,6}함)[ \n]{0,3}(?P<sign>[:=|]|(?=[ \n]))[ \n]{0,6}(?=[가-힣A-Z])")
_SPACED = re.compile(rf"{_CLASS}[ \n]{{1,4}}[가-힣](?:[ \n]{{0,4}}[가-힣])?(?![가-힣])")
_SPACED_TITLE = re.compile(rf"{_CLASS}(?<![가-힣].)[ \n]{{1,3}}[가-힣](?:[ \n]{{0,3}}[가-힣])?[ \n]{{1,3}}(?:씨|님)(?![가-힣])")
_TITLE = re.compile(rf"(?:{words.TITLES})")
_TITLE_BEHIND = re.compile(rf"[ \n]{{1,3}}(?:전[ \n]?)?(?P<title>{words.TITLES})(?P<rest>[가-힣]{{0,6}})")
_LATIN = re.compile(r"[A-Z][A-Za-z'-]{1,20}(?:,? [A-Z][A-Za-z'.-]{0,20}){1,3}")
_AND = re.compile(r"(?:와|과|랑)?[ \n]{0,3}(?:[,·/、&]|및|와|과)?[ \n]{0,3}")
_LIST = re.compile(rf"{_CLASS}(?<![가-힣].)[가-힣]{{1,3}}(?:[ \n]{{0,3}}·[ \n]{{0,3}}{_CLASS}[가-힣]{{1,3}}(?![가-힣])){{2,40}}")
_ONE = re.compile(rf"{_CLASS}[가-힣]{{1,3}}")
_BESIDE = re.compile(rf"{_CLASS}(?<![가-힣].)[가-힣]{{1,3}}(?=[ \n]{{0,2}}[(,:/|\-·\[][ \n(\[]{{0,2}}$|[ \n]{{1,2}}$)")
_BEHIND = re.compile(rf"[ \n]{{0,2}}[(,/|\-\[)][ \n(\[]{{0,3}}(?P<name>{_CLASS}[가-힣]{{1,2}})(?![가-힣])")
_BEHIND_ACCOUNT = re.compile(rf"(?:[ \n]{{0,2}}[(,/|\-\[)][ \n(\[]{{0,3}}|[ ]{{1,3}})(?P<name>{_CLASS}[가-힣]{{1,2}})(?![가-힣])")  # 302-12-345678 홍길동
_HAN = re.compile("[一-鿿]")
_HANJA = re.compile(rf"{_CLASS}(?<![가-힣].)[가-힣]{{1,3}}[ ]?\((?P<hanja>[{words.HANJA}][一-鿿]{{1,3}})(?=[),·: ])")
_HANJA_ALONE = re.compile(rf"(?:한자|漢字)[ ]?[):=|]{{1,2}}[ ]{{0,3}}(?P<hanja>[{words.HANJA}][一-鿿]{{1,3}})(?![一-鿿])")
_OFFICE = re.compile(rf"(?:{words.OFFICES})[ \n]{{1,3}}(?={_CLASS})")
_AGE = re.compile(r"[ ]?\([ ]?\d{1,3}(?:세|살)?[ ]?[),·]")
_BLANK = re.compile(r"[ \n]+")


def _is_rest(rest: str) -> bool:
    """Nothing, a particle, or a title with or without one."""
    if not rest or rest in words.PARTICLES:
        return True
    title = _TITLE.match(rest)
    return title is not None and (title.end() == len(rest) or _is_ending(rest[title.end():]))


def _is_ending(rest: str) -> bool:
    """Of a word behind a title."""
    return rest in words.PARTICLES or rest.startswith(("들", "께", "이", "과", "와", "님", "입"))


def shapes(run: str) -> list[int]:
    """Lengths at which a run of Hangul may be a name and its particle or title, likely ones first."""
    pair, found, size = run[:2] in words.PAIRS, [], len(run)
    for length in (4, 3) if pair else (3, 2, 4):
        if size < length or not words.GIVEN.issuperset(run[2 if pair and length == 4 else 1:length]):
            continue
        if run[:length] not in words.NOT_NAMES and _is_rest(run[length:]):
            found.append(length)
    return found


def _first(run: str) -> int:
    return next(iter(shapes(run)), 0)


class Names:
    """Args: morphology: None = names without a label, a title or a neighbour are not looked for."""

    def __init__(self, morphology: Morphology | None):
        self._morphology = morphology

    def find(self, text: str, others: Iterable[Span]) -> list[Span]:
        """Names in a normalised text; `others` are what else was found in it."""
        found = [*self._labelled(text), *self._lists(text), *self._runs(text), *self._beside(text, others)]
        found += self._hanja(text) if _HAN.search(text) else ()
        found += [Span(*match.span(), kinds.PERSON, 0.8) for match in _SPACED_TITLE.finditer(text) if _given(_BLANK.sub("", match[0])[1:3])]
        return found + list(self._neighbours(text, found))

    def alone(self, word: str) -> bool:
        """A word without anything around it, as in the name of a file."""
        judged = self._judge(word, len(word))
        return _first(word) == len(word) >= 3 and (judged == NAME or judged in (UNKNOWN, None) and self._usual(word))

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
            run = _RUN.match(text, at) or (_GLUED.match(text, at) if sign or not label["sign"] else None)
            if run is None:
                continue
            for length in shapes(run[0]) or (self._announced(run[0]) if sign else ()):
                judged, usual = self._judge(run[0], length), self._usual(run[0][:length])
                if judged == COMMON and not (sign and usual) or not sign and (judged == MIXED or judged is None) and not usual:
                    continue
                yield Span(at, at + length, kinds.PERSON, 0.92 if sign else 0.8 if judged == NAME or length >= 3 else 0.6)
                break
        for office in _OFFICE.finditer(text):
            run = _RUN.match(text, office.end())
            length = _first(run[0]) if run else 0
            if length < 3:
                continue
            judged = self._judge(run[0], length)
            if judged == NAME or judged in (UNKNOWN, None) and self._usual(run[0][:length]):
                yield Span(run.start(), run.start() + length, kinds.PERSON, 0.75)

    def _runs(self, text: str) -> Iterator[Span]:
        for match in _RUN.finditer(text):
            run, start = match[0], match.start()
            if run in words.NOT_NAMES:
                continue
            for length in shapes(run):
                if score := self._in_sentence(text, match, length):
                    yield Span(start, start + length, kinds.PERSON, score)
                    break

    def _in_sentence(self, text: str, match: re.Match, length: int) -> float:
        """How surely the first syllables of a word are a name, by what follows."""
        run, name, rest = match[0], match[0][:length], match[0][length:]
        title = _TITLE.match(rest) if rest else _TITLE_BEHIND.match(text, match.end())
        if title is not None and not rest and title["rest"] and not _is_ending(title["rest"]):
            title = None
        usual = self._usual(name)
        if title is not None:
            judged = self._judge(run, length)
            if judged == NAME:
                return 0.9
            if length == 2:
                return 0.6 if judged in (UNKNOWN, MIXED) and (title[0].strip() == "씨") and name[0] in words.FREQUENT else 0
            return 0.75 if judged in (UNKNOWN, None) or judged == MIXED and usual else 0.6 if usual and run[:2] not in words.NOT_NAMES and judged != COMMON else 0
        if not rest and length >= 3 and _AGE.match(text, match.end()):
            return 0.8 if usual or self._judge(run, length) in (NAME, UNKNOWN) else 0
        if length < 3 or not usual or name[0] not in words.FREQUENT and length == 3:
            return 0
        if rest in words.ANIMATE:
            judged = self._judge(run, length)
            return 0.65 if judged in (NAME, UNKNOWN, None) or judged == MIXED and not rest.endswith("랑") else 0  # 이상형이랑, 장기자랑
        if self._morphology is None:
            return 0
        return {NAME: 0.6, UNKNOWN: 0.55}.get(self._judge(run, length), 0)

    def _announced(self, run: str) -> tuple[int, ...]:
        """Behind `성명:` a name may have any syllables, if no dictionary has it."""
        fits = len(run) >= 3 and run[:3] not in words.NOT_NAMES and _is_rest(run[3:])
        return (3,) if fits and self._judge(run, 3) in (NAME, UNKNOWN) else ()

    @staticmethod
    def _hanja(text: str) -> Iterator[Span]:
        """홍길동(洪吉童, ...): as many Chinese characters as syllables, the first one a surname's."""
        for match in _HANJA.finditer(text):
            hangul = match[0].partition("(")[0].rstrip()
            if len(hangul) == len(match["hanja"]):
                yield Span(match.start(), match.start() + len(hangul), kinds.PERSON, 0.9)
                yield Span(*match.span("hanja"), kinds.PERSON, 0.9)
        yield from (Span(*match.span("hanja"), kinds.PERSON, 0.9) for match in _HANJA_ALONE.finditer(text))

    def _lists(self, text: str) -> Iterator[Span]:
        for match in _LIST.finditer(text):
            names = list(_ONE.finditer(text, match.start(), match.end()))
            sure = sum(self._usual(name[0]) and name[0] not in words.NOT_NAMES and self._judge(name[0], len(name[0])) != COMMON for name in names)
            if sure * 2 > len(names):
                yield from (Span(*name.span(), kinds.PERSON, 0.85) for name in names)

    def _beside(self, text: str, others: Iterable[Span]) -> Iterator[Span]:
        for other in others:
            if other.kind not in kinds.OF_PERSONS:
                continue
            for match in _BESIDE.finditer(text, max(0, other.start - 12), other.start):
                if len(match[0]) in (2, 3, 4) and _first(match[0]) == len(match[0]) and self._fits(match[0]):
                    yield Span(*match.span(), kinds.PERSON, 0.7 if len(match[0]) == 3 else 0.55)
            behind = _BEHIND_ACCOUNT if other.kind == kinds.ACCOUNT else _BEHIND
            if (match := behind.match(text, other.end)) and _first(match["name"]) == len(match["name"]) and self._fits(match["name"]):
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
            if (run := _RUN.match(text, joined.end())) and run.start() not in seen and (length := _first(run[0])) and self._joins(run[0], length):
                made = Span(run.start(), run.start() + length, kinds.PERSON, 0.7)
                seen.add(made.start)
                waiting.append(made)
                yield made

    def _fits(self, name: str) -> bool:
        """A word by itself beside a number of a person."""
        judged = self._judge(name, len(name))
        return judged in (NAME, UNKNOWN) or judged is None and len(name) == 3 or judged != COMMON and self._usual(name)

    def _joins(self, run: str, length: int) -> bool:
        judged = self._judge(run, length)
        return judged == NAME or length >= 3 and judged != COMMON and (judged == UNKNOWN or self._usual(run[:length]))

    def _judge(self, word: str, length: int) -> str | None:
        return None if self._morphology is None else self._morphology.judge(word, length)

    @staticmethod
    def _usual(name: str) -> bool:
        return len(name) == 3 and name[1] in words.USUAL_FIRST and name[2] in words.USUAL_SECOND or len(name) == 4 and name[:2] in words.PAIRS


_GLUED = re.compile(rf"{_CLASS}[가-힣]{{1,11}}")


def _given(syllables: str) -> bool:
    return bool(syllables) and all(syllable in words.GIVEN for syllable in syllables)
