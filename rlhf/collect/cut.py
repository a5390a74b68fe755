"""Documents in pieces: articles of a statute, questions with answers, sections under a heading, passages of a given length. Plain functions
of the text.

Every piece is a part of the document as it stands (`text.find(piece.text) >= 0`), in its order; nothing is written anew.
"""
import re
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass

# 제1조, 제 12 조의2 (정의), Article 3. (Purpose); where a line begins
_ARTICLE = re.compile(r"^[ \t　]*(?P<label>제[ \t]*\d+[ \t]*조(?:[ \t]*의[ \t]*\d+)?|Article[ \t]+\d+)[.:]?"
                      r"[ \t]*(?:[(（](?P<title>[^)）\n]{1,60})[)）])?(?=[\s①-⑳])", re.MULTILINE)
# What ends an article without being one: chapters, sections, addenda.
_BREAK = re.compile(r"^[ \t　]*(?:제[ \t]*\d+[ \t]*(?:편|장|절|관)(?=[\s]|$)|부[ \t]*칙|별[ \t]*표|Chapter[ \t]+\w+|Addend(?:a|um))[^\n]*$", re.MULTILINE)
_QUESTION = re.compile(r"^[ \t]*(?:Q|질문|질의|문|Question)[ \t]*\d*[ \t]*[.:)：][ \t]*(?=\S)", re.MULTILINE)
_ANSWER = re.compile(r"^[ \t]*(?:A|답변|회신|답|Answer)[ \t]*\d*[ \t]*[.:)：][ \t]*(?=\S)", re.MULTILINE)
_MARKDOWN = re.compile(r"^#{1,6}[ \t]+(?P<title>[^\n#][^\n]*?)[ \t#]*$", re.MULTILINE)
_LINE = re.compile(r"(?:\A|\n[ \t]*\n)(?P<title>[^\n]{2,40})(?=\n[ \t]*\n)")  # a short line alone between blank ones
_SENTENCE = re.compile(r"(?<=[.!?。！？…])[\"'”’)\]]*\s+|\n+")
_PARAGRAPH = re.compile(r"\n[ \t]*\n+")


@dataclass(frozen=True)
class Piece:
    """A part of a document.

    Attributes:
        label: what names it ("제1조", a heading, a question). title: what an article is called, or None. text: its words.
    """

    label: str
    title: str | None
    text: str


def title_of(text: str) -> str | None:
    """The first line, where it is short enough to be a title and does not end like a sentence."""
    first = next((line.strip() for line in text.split("\n") if line.strip()), "").lstrip("# ").strip()
    return first if 0 < len(first) <= 60 and not first.endswith((".", "?", "!", "다", ",", ":")) else None


def articles(text: str) -> list[Piece]:
    """The articles of a statute: `제1조(목적) ...` to where the next one, a chapter or the addenda begin. The addenda, which count anew, are left out.

    A line of running text may begin with "제5조 및 ...": only what comes next in the count (three numbers may be missing) begins an article.
    """
    breaks = [(match.start(), match[0].strip().replace(" ", "")) for match in _BREAK.finditer(text)]
    addenda = next((place for place, words in breaks if words.startswith(("부칙", "Addend"))), len(text))
    starts, last = [], None
    for match in _ARTICLE.finditer(text, 0, addenda):
        number, _, part = match["label"].replace("조", "").replace("제", "").replace("Article", "").replace(" ", "").replace("\t", "").partition("의")
        count = (int(number), int(part or 1))
        if last is None or last < count and count[0] <= last[0] + 4:
            starts.append(match)
            last = count
    ends = sorted({*(match.start() for match in starts), *(place for place, _ in breaks), len(text)})
    found = []
    for match in starts:
        end = ends[bisect(ends, match.start())]
        label, body = re.sub(r"[ \t]+", " " if match["label"].startswith("A") else "", match["label"]), text[match.end() : end].strip()
        if body:
            found.append(Piece(label, match["title"].strip() if match["title"] else None, body))
    return found


def faq(text: str) -> list[Piece]:
    """Questions (as the label) and their answers, where the text marks both: Q. and A., 질문 and 답변, ..."""
    asks, answers = list(_QUESTION.finditer(text)), list(_ANSWER.finditer(text))
    marks = sorted([(match.start(), match.end(), "q") for match in asks] + [(match.start(), match.end(), "a") for match in answers])
    found = []
    for number, (_, begin, kind) in enumerate(marks[:-1]):
        start, answer_begin, next_kind = marks[number + 1]
        if kind == "q" and next_kind == "a":
            end = marks[number + 2][0] if number + 2 < len(marks) else len(text)
            question, answer = text[begin:start].strip(), text[answer_begin:end].strip()
            if question and answer:
                found.append(Piece(" ".join(question.split()), None, answer))
    return found


def sections(text: str) -> list[Piece]:
    """Headings (as the label) and what stands under each: Markdown's, or short lines alone between blank ones that do not end like a sentence."""
    starts = [(match.start(), match.end(), match["title"]) for match in _MARKDOWN.finditer(text)]
    if not starts:
        starts = [(match.start("title"), match.end(), match["title"]) for match in _LINE.finditer(text)
                  if not match["title"].rstrip().endswith((".", "?", "!", ",", ";", "다", "임", "함", "음")) and any(map(str.isalpha, match["title"]))]
    found = []
    for number, (_, begin, title) in enumerate(starts):
        end = starts[number + 1][0] if number + 1 < len(starts) else len(text)
        body = text[begin:end].strip()
        if body:
            found.append(Piece(" ".join(title.split()), None, body))
    return found


def passages(text: str, longest: int) -> list[str]:
    """The text in passages of at most `longest` characters: whole paragraphs together, a long one cut behind a sentence, a long sentence
    anywhere. No character but white space at the borders is lost."""
    found: list[str] = []
    begin, end = 0, 0  # of the passage that grows
    for start, stop in _units(text, longest):
        if end > begin and stop - begin > longest:
            found.append(text[begin:end])
            begin = start
        elif end == begin:
            begin = start
        end = stop
    if end > begin:
        found.append(text[begin:end])
    return found


def _units(text: str, longest: int) -> Iterator[tuple[int, int]]:
    """What is not cut where it need not be: (start, stop) of paragraphs, else sentences, else `longest` characters; without white space around."""
    for start, stop in _split(_PARAGRAPH, text, 0, len(text)):
        if stop - start <= longest:
            yield start, stop
            continue
        for first, last in _split(_SENTENCE, text, start, stop):
            while last - first > longest:
                yield from _stripped(text, first, first + longest)
                first += longest
                while first < last and text[first].isspace():
                    first += 1
            if last > first:
                yield first, last


def _split(border: re.Pattern, text: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
    place = start
    for match in border.finditer(text, start, stop):
        yield from _stripped(text, place, match.start())
        place = match.end()
    yield from _stripped(text, place, stop)


def _stripped(text: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
    while start < stop and text[start].isspace():
        start += 1
    while stop > start and text[stop - 1].isspace():
        stop -= 1
    if stop > start:
        yield start, stop
