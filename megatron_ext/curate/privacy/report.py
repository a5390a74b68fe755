"""What was removed, told without telling it: counts by source and kind, and samples that are masked themselves.

A sample is "신청인 ○○○의 연락처는 ***-****-****": the found place as a mask, and around it only words that the recognisers know as labels and titles. Every other
letter of Hangul is ○, every other letter x, every digit #. So a name that was overlooked does not come out by way of the report either.

Which samples are kept follows from a hash of the document's id and the place, so reports of parts in any order add up to the same.
"""
import hashlib
import heapq
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from megatron_ext.curate.privacy import words_ko
from megatron_ext.curate.privacy.replace import mask
from megatron_ext.curate.privacy.spans import Span

_REACH = 24
_SHOWN = re.compile(
    rf"{words_ko.LABELS}|{words_ko.TITLES}|주민등록번호|외국인등록번호|여권번호|여권|운전면허번호|면허번호|사업자등록번호|법인등록번호|전화번호|전화|연락처|휴대폰|휴대전화|핸드폰|팩스|이메일|전자우편|메일|주소|거주지|소재지|"
    r"계좌번호|계좌|은행|카드번호|카드|차량번호|차량|번호|생년월일|접속|서버|입금|송금|"
    r"(?i:\b(?:name|phone|telephone|tel|fax|mobile|e-?mail|address|passport|driver'?s?|licen[cs]e|number|no|account|bank|card|social|security|ssn|dob|date|of|birth|born|"
    r"mr|mrs|ms|dr|patient|applicant|contact|call|signed|by|at|on|is|the|to|from|for|and|with|lives|ip|server|nhs|national|insurance)\b)")
_HANGUL, _LETTER, _FIGURE = re.compile("[가-힣ㄱ-ㆎ]"), re.compile(r"[^\W\d_]"), re.compile(r"\d")


def _covered(text: str) -> str:
    return _FIGURE.sub("#", re.sub(r"[^\W\d_○]", "x", _HANGUL.sub("○", text)))


def _shown(text: str) -> str:
    parts, at = [], 0
    for match in _SHOWN.finditer(text):
        parts += [_covered(text[at:match.start()]), match[0]]
        at = match.end()
    return "".join([*parts, _covered(text[at:])])


def sample(text: str, spans: list[Span], number: int) -> str:
    """The surroundings of spans[number] in one line, masked."""
    span = spans[number]
    left, right = max(0, span.start - _REACH), min(len(text), span.end + _REACH)
    parts, at = [], left
    for other in spans[max(0, number - 4):number + 5]:
        start, end = max(other.start, left), min(other.end, right)
        if start >= end:
            continue
        parts += [_shown(text[at:start]), mask(text[start:end])]
        at = end
    return " ".join("".join([*parts, _shown(text[at:right])]).split())


@dataclass
class Report:
    """Adds up over documents, and over reports.

    Attributes:
        counts: source -> kind -> places that were removed. documents, changed: source -> number.
        dropped: source -> mark -> documents. samples: source -> kind -> [(order, masked sample)], `most` of them, lowest order first.
    """

    most: int = 5
    documents: dict[str, int] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    samples: dict[str, dict[str, list[tuple[str, str]]]] = field(default_factory=dict)

    def add(self, source: str, identity: str, text: str, spans: list[Span]) -> None:
        """A document of `source` with what was removed from its text."""
        self.documents[source] = self.documents.get(source, 0) + 1
        if not spans:
            return
        self.changed[source] = self.changed.get(source, 0) + 1
        counts = self.counts.setdefault(source, {})
        for number, span in enumerate(spans):
            counts[span.kind] = counts.get(span.kind, 0) + 1
            if not self.most:
                continue
            kept = self.samples.setdefault(source, {}).setdefault(span.kind, [])
            order = hashlib.blake2b(f"{identity}\0{number}".encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
            if len(kept) < self.most or order < kept[-1][0]:
                kept[:] = heapq.nsmallest(self.most, [*kept, (order, sample(text, spans, number))])

    def drop(self, source: str, mark: str) -> None:
        """A document that was dropped for a classification mark."""
        self.documents[source] = self.documents.get(source, 0) + 1
        marks = self.dropped.setdefault(source, {})
        marks[mark] = marks.get(mark, 0) + 1

    def to_json(self) -> dict:
        """Plain values with sorted keys: the same report, the same bytes."""
        return {
            "documents": dict(sorted(self.documents.items())), "changed": dict(sorted(self.changed.items())),
            "dropped": {source: dict(sorted(marks.items())) for source, marks in sorted(self.dropped.items())},
            "counts": {source: dict(sorted(counts.items())) for source, counts in sorted(self.counts.items())},
            "samples": {source: {kind: [list(one) for one in kept] for kind, kept in sorted(kinds.items())} for source, kinds in sorted(self.samples.items())},
        }

    def markdown(self) -> str:
        """For people: a table of counts, and the samples."""
        kinds = sorted({kind for counts in self.counts.values() for kind in counts})
        lines = ["| source | documents | changed | dropped | " + " | ".join(kinds) + " |", "|" + "---|" * (4 + len(kinds))]
        for source, number in sorted(self.documents.items()):
            counts = self.counts.get(source, {})
            cells = [source, number, self.changed.get(source, 0), sum(self.dropped.get(source, {}).values()), *(counts.get(kind, 0) for kind in kinds)]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        for source, found in sorted(self.samples.items()):
            for kind, kept in sorted(found.items()):
                lines += ["", f"**{source}, {kind}**", *(f"- `{line.replace('`', '')}`" for _, line in kept)]
        return "\n".join(lines) + "\n"


def merged(reports: Iterable[Mapping], most: int) -> Report:
    """Reports of parts (`to_json`) as one; the order does not matter."""
    total = Report(most)
    for report in reports:
        for name in ("documents", "changed"):
            mine = getattr(total, name)
            for source, number in report[name].items():
                mine[source] = mine.get(source, 0) + number
        for name in ("dropped", "counts"):
            for source, counts in report[name].items():
                mine = getattr(total, name).setdefault(source, {})
                for kind, number in counts.items():
                    mine[kind] = mine.get(kind, 0) + number
        for source, found in report["samples"].items():
            mine = total.samples.setdefault(source, {})
            for kind, kept in found.items():
                mine[kind] = heapq.nsmallest(most, [*mine.get(kind, []), *map(tuple, kept)])
    return total
