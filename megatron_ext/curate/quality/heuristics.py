"""Rules of Gopher and C4 for whole documents, for Korean and for English. Limits are data: each stands here once, with its source.

    judge(text, korean=True) -> None, or the reason to drop it

Sources
    Gopher    Rae et al., "Scaling language models: methods, analysis and insights from training Gopher" (2021), A.1.1 and table A1
    C4        Raffel et al., "Exploring the limits of transfer learning with a unified text-to-text transformer" (JMLR 2020), 2.2
    FineWeb   Penedo et al., "The FineWeb datasets" (2024), 3.6: shares of lines, measured against trained models
    FineWeb2  Penedo et al., "FineWeb2" (2025): the same rules with limits for each language; here configs/kor_Hang.yml of the project

FineWeb2 counts Korean words as the morphemes that Kiwi finds. We count eojeol, what spaces separate, because that needs no analyser and is
hundreds of times as fast; a limit on words is divided by MORPHEMES, the morphemes in an eojeol, a limit on the length of words multiplied by it.
docs/curate_quality.md has the measurement.
"""
import re
from dataclasses import dataclass

from megatron_ext.curate.quality.text import lines

MORPHEMES = 2.2
_BULLET = re.compile(r"[•‣▪◦∙·○●□■◆◇▶▷※*\-–—]\s*\S")
_ELLIPSIS = re.compile(r"(\.\.\.|…)\s*$")
_SYMBOL = re.compile(r"#|\.\.\.|…")
_HAS_LETTER = re.compile(r"[^\W\d_]")
_ENDS = re.compile(r"[.?!。？！…][\"'”’」』)\]]*\s*$")
_SENTENCE = re.compile(r"[.?!。？！…]+[\"'”’」』)\]]*(?=\s|$)")
# Formal Korean often ends a line with a nominal form and no full stop: 함, 음, 임, 것, 됨.
_ENDS_KOREAN = re.compile(r"(다|요|죠|까|함|음|임|됨|것|바람)[.?!]?[\"'”’」』)\]]*\s*$")


@dataclass(frozen=True)
class Rules:
    """Limits of one language. A document outside any of them is dropped; each reason is the field's name without min_ or max_.

    Attributes:
        min_words, max_words: words of a document.
        min_word_length, max_word_length: mean characters of a word.
        max_symbols: signs "#" and ellipses a word.
        max_bullets, max_ellipses: share of lines that begin with a bullet, or end with an ellipsis.
        min_letters: share of words with a letter in them.
        stop_words: words (English) or endings of words (Korean) that running text has; `min_stop_words` different ones must be there.
        min_ended_lines: share of lines that end as a sentence does.
        max_short_lines: share of lines of at most `short_line` characters.
        max_line_breaks: lines a word.
        min_sentences: of a document.
        max_run: share of the characters that stand in runs of at least 10 of the same sign.
        banned: texts, in small letters, that no document may hold.
    """

    min_words: int
    max_words: int
    min_word_length: float
    max_word_length: float
    stop_words: tuple[str, ...]
    min_ended_lines: float
    max_line_breaks: float
    min_letters: float
    max_symbols: float = 0.1  # Gopher
    max_bullets: float = 0.9  # Gopher
    max_ellipses: float = 0.3  # Gopher
    min_stop_words: int = 2  # Gopher
    max_short_lines: float = 0.67  # FineWeb
    short_line: int = 30  # FineWeb
    min_sentences: int = 3  # C4: pages of fewer than 3 sentences
    max_run: float = 0.3  # ours: bills of the National Assembly fill table cells with hyphens, up to a fifth of their text
    banned: tuple[str, ...] = ("lorem ipsum",)  # C4


ENGLISH = Rules(
    min_words=50, max_words=100_000, min_word_length=3, max_word_length=10, min_letters=0.8,  # Gopher
    stop_words=("the", "be", "to", "of", "and", "that", "have", "with"),  # Gopher
    min_ended_lines=0.12, max_line_breaks=0.3,  # FineWeb
)
KOREAN = Rules(
    min_words=round(50 / MORPHEMES), max_words=round(100_000 / MORPHEMES),  # Gopher's, in eojeol
    min_word_length=1.5,  # ours: FineWeb2 has 1 a morpheme; an eojeol that carries a particle has 2 syllables
    max_word_length=6 * MORPHEMES,  # FineWeb2: 6 a morpheme
    # FineWeb2's list (의 다 이 는 에 을 한 년 하 은 를 했 고 에서 가 있 으로 인 월 로 되), those of it that can end an eojeol
    stop_words=("의", "다", "이", "는", "에", "을", "한", "은", "를", "고", "에서", "가", "으로", "로"),
    min_ended_lines=0.062,  # FineWeb2
    max_line_breaks=0.196 * MORPHEMES,  # FineWeb2, in eojeol
    # ours: FineWeb2's 79.1 % is of morphemes; motions of the National Assembly with tables of costs have 73 to 76 % of eojeol
    min_letters=0.65,
    # ours: half of FineWeb's 30, since a syllable carries what two letters do, and a larger share: the same motions have 67 %
    short_line=15, max_short_lines=0.75,
)


def judge(text: str, *, korean: bool, rules: Rules | None = None) -> str | None:
    """The first rule that the document breaks, as a reason; None if it keeps all.

    Args:
        korean: whether particles and Korean endings count; also chooses the rules where none are given.
    """
    rules = rules or (KOREAN if korean else ENGLISH)
    words = text.split()
    count = len(words)
    if count < rules.min_words:
        return "too_short"
    if count > rules.max_words:
        return "too_long"
    if not rules.min_word_length <= sum(map(len, words)) / count <= rules.max_word_length:
        return "word_length"
    if len(_SYMBOL.findall(text)) / count > rules.max_symbols:
        return "symbols"
    if sum(map(bool, map(_HAS_LETTER.search, words))) / count < rules.min_letters:
        return "letters"
    if _stop_words(words, rules, korean) < rules.min_stop_words:
        return "stop_words"
    found = lines(text)
    reason = _judge_lines(found, count, rules, korean)
    if reason is None and _sentences(text, found, korean) < rules.min_sentences:
        reason = "sentences"
    if reason is None and _in_runs(text) > rules.max_run * len(text):
        reason = "runs"
    if reason is None and any(one in text.lower() for one in rules.banned):
        reason = "banned"
    return reason


def _judge_lines(found: list[str], words: int, rules: Rules, korean: bool) -> str | None:
    count = len(found)
    if sum(1 for line in found if _BULLET.match(line)) / count > rules.max_bullets:
        return "bullets"
    if sum(1 for line in found if _ELLIPSIS.search(line)) / count > rules.max_ellipses:
        return "ellipses"
    if sum(1 for line in found if _ends(line, korean)) / count < rules.min_ended_lines:
        return "ended_lines"
    if sum(1 for line in found if len(line) <= rules.short_line) / count > rules.max_short_lines:
        return "short_lines"
    if (count - 1) / words > rules.max_line_breaks:
        return "line_breaks"
    return None


def _sentences(text: str, found: list[str], korean: bool) -> int:
    """How many sentences there are, by the signs that end them; in Korean also lines that end in a formal ending without one."""
    count = len(_SENTENCE.findall(text))
    if korean:
        count += sum(1 for line in found if _ENDS_KOREAN.search(line) and not _ENDS.search(line))
    return count


def _ends(line: str, korean: bool) -> bool:
    return bool(_ENDS.search(line) or korean and _ENDS_KOREAN.search(line))


def _stop_words(words: list[str], rules: Rules, korean: bool) -> int:
    """How many different ones there are, up to the number that is needed."""
    found: set[str] = set()
    for word in words:
        word = word.strip(".,?!\"'()[]“”‘’").lower()
        if korean:
            # one syllable alone is a numeral or a list's letter as often as a particle
            found.update(ending for ending in rules.stop_words if len(word) > len(ending) and word.endswith(ending))
        elif word in rules.stop_words:
            found.add(word)
        if len(found) >= rules.min_stop_words:
            break
    return len(found)


_RUN = re.compile(r"([^\w\s])\1{9,}")


def _in_runs(text: str) -> int:
    return sum(match.end() - match.start() for match in _RUN.finditer(text))
