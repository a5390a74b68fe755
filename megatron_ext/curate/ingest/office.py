"""DOCX (Office Open XML, ECMA-376) and HWPX (OWPML, KS X 6101): text, tables, images, out of their XML. Both are zip files; neither needs a library.

Text stands in the order of the document: a paragraph is a line, a table its rows as lines with ` | ` between cells; footnotes and text in boxes follow where
they are anchored. Deleted text of tracked changes, headers and footers are left out.
"""
import io
import posixpath
import re
import xml.etree.ElementTree as ET
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from megatron_ext.curate.ingest import parts
from megatron_ext.curate.ingest.deliveries import local, parse_xml
from megatron_ext.curate.ingest.items import Item, Unreadable, sha256
from megatron_ext.curate.ingest.records import Reading

_DEEP = 200  # nested elements; a document has a few dozen


@dataclass
class _Body:
    """What a walk over a document collects."""

    lines: list[str] = field(default_factory=list)
    images: list[dict] = field(default_factory=list)
    tables: list[dict] = field(default_factory=list)
    found: dict[str, bytes] = field(default_factory=dict)
    picture: Callable[[str], tuple[str, bytes] | None] = lambda name: None

    def image(self, reference: str, caption: str | None, wanted: bool) -> None:
        place = self.picture(reference)
        if place is None:
            return
        name, content = place
        width, height = parts.size(content) or (None, None)
        entry = parts.image(name, sha256=sha256(content), media_type=parts.media_type(content), width=width, height=height, caption=caption, line=len(self.lines))
        self.images.append(entry)
        if wanted:
            self.found[entry["sha256"]] = content

    def item(self, content: bytes, metadata: dict[str, str]) -> Item:
        text = "\n".join(self.lines)
        if not text.strip():
            raise Unreadable("a document without text")
        return Item(text, sha256(content), "", metadata, tuple(self.images), tuple(self.tables), self.found)


class _Archive:
    """A zip file whose members are read with a limit on what comes out. Raises Unreadable."""

    def __init__(self, content: bytes, limit: int):
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(content))
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError):
            old = content.startswith(b"\xd0\xcf\x11\xe0")
            raise Unreadable("an older binary format, or locked by a password: save it anew as DOCX or HWPX" if old else "not a zip file that can be read") from None
        self._left = 4 * limit
        self.names = [entry.filename for entry in self._zip.infolist()]

    def read(self, name: str) -> bytes | None:
        """None where there is no such member."""
        try:
            entry = self._zip.getinfo(name)
        except KeyError:
            return None
        self._left -= entry.file_size  # what is read is never more than this, whatever the member holds
        if self._left < 0:
            raise Unreadable("holds more than four times curate.ingest.max_bytes once it is unpacked")
        try:
            with self._zip.open(entry) as stream:
                return stream.read(entry.file_size)
        except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, EOFError, OSError):
            raise Unreadable("damaged inside, or encrypted") from None


# ---- DOCX ---------------------------------------------------------------------------------------------------------------------------

def docx(content: bytes, reading: Reading) -> Item:
    """A DOCX as a document. Raises Unreadable."""
    archive = _Archive(content, reading.settings.max_bytes)
    main = archive.read("word/document.xml")
    if main is None:
        raise Unreadable("not a DOCX: it has no word/document.xml")
    links = _relations(archive.read("word/_rels/document.xml.rels"))
    notes = {kind: _notes(archive.read(f"word/{kind}s.xml"), kind) for kind in ("footnote", "endnote")}
    body = _Body(picture=lambda name: _member(archive, posixpath.normpath(posixpath.join("word", links.get(name, "")))))
    root = parse_xml(main)
    inner = next((one for one in root if local(one.tag) == "body"), root)
    _docx_blocks(inner, body, notes, reading.images)
    return body.item(content, _core(archive.read("docProps/core.xml")))


def _docx_blocks(element: ET.Element, body: _Body, notes: dict, wanted: bool, depth: int = 0) -> None:
    for child in element:
        kind = local(child.tag)
        if kind == "p":
            _docx_paragraph(child, body, notes, wanted)
        elif kind == "tbl":
            _table(child, body, "tr", "tc", lambda cell: _docx_cell(cell, notes))
        elif kind in ("sdt", "sdtContent", "smartTag", "customXml", "ins", "moveTo") and depth < _DEEP:
            _docx_blocks(child, body, notes, wanted, depth + 1)


def _docx_paragraph(paragraph: ET.Element, body: _Body, notes: dict, wanted: bool) -> None:
    text, asides, pictures = [], [], []
    for one in _docx_runs(paragraph):
        kind = local(one.tag)
        if kind == "t":
            text.append(one.text or "")
        elif kind in ("tab", "ptab"):
            text.append("\t")
        elif kind in ("br", "cr"):
            text.append("\n")
        elif kind == "noBreakHyphen":
            text.append("-")
        elif kind in ("footnoteReference", "endnoteReference"):
            asides.append(notes[kind.removesuffix("Reference")].get(_attribute(one, "id"), ""))
        elif kind == "blip":
            pictures.append(_attribute(one, "embed"))
        elif kind == "docPr":
            pictures.append((one.get("descr") or one.get("title") or "",))
    caption = None
    for one in pictures:
        if isinstance(one, tuple):
            caption = one[0] or None
        elif one:
            body.image(one, caption, wanted)
    body.lines += "".join(text).split("\n")
    body.lines += [aside for aside in asides if aside]


def _docx_runs(element: ET.Element, depth: int = 0) -> Iterator[ET.Element]:
    """Leaves of a paragraph in their order: without deleted text, and of a choice between two forms only the first."""
    for child in element:
        kind = local(child.tag)
        if kind in ("del", "moveFrom", "delText", "instrText", "Fallback", "pPr", "rPr") or depth > _DEEP:
            continue
        yield child
        yield from _docx_runs(child, depth + 1)


def _docx_cell(cell: ET.Element, notes: dict) -> str:
    inner = _Body()
    _docx_blocks(cell, inner, notes, False)
    return "\n".join(inner.lines)


def _notes(content: bytes | None, kind: str) -> dict[str, str]:
    if content is None:
        return {}
    return {_attribute(note, "id"): " ".join("".join(one.text or "" for one in note.iter() if local(one.tag) == "t").split())
            for note in parse_xml(content) if local(note.tag) == kind and _attribute(note, "type") not in ("separator", "continuationSeparator")}


def _core(content: bytes | None) -> dict[str, str]:
    """Title and date; the names of authors are left: they are data of people."""
    if content is None:
        return {}
    found = {local(one.tag): (one.text or "").strip() for one in parse_xml(content)}
    return {key: found[name] for key, name in (("title", "title"), ("date", "modified")) if found.get(name)}


def _relations(content: bytes | None) -> dict[str, str]:
    return {} if content is None else {one.get("Id", ""): one.get("Target", "") for one in parse_xml(content) if one.get("TargetMode") != "External"}


# ---- HWPX ---------------------------------------------------------------------------------------------------------------------------

def hwpx(content: bytes, reading: Reading) -> Item:
    """A HWPX as a document. Raises Unreadable."""
    archive = _Archive(content, reading.settings.max_bytes)
    sections = sorted((name for name in archive.names if re.fullmatch(r"Contents/section\d+\.xml", name)), key=lambda name: int(re.findall(r"\d+", name)[0]))
    if not sections:
        raise Unreadable("not a HWPX: it has no Contents/section0.xml")
    metadata, items = _package(archive.read("Contents/content.hpf"))
    body = _Body(picture=lambda name: _member(archive, items.get(name, "")))
    for name in sections:
        _hwpx_blocks(parse_xml(archive.read(name) or b""), body, reading.images)
    return body.item(content, metadata)


def _hwpx_blocks(element: ET.Element, body: _Body, wanted: bool, depth: int = 0) -> None:
    for paragraph in element:
        if local(paragraph.tag) == "p":
            text: list[str] = []
            place, tables, images = len(body.lines), len(body.tables), len(body.images)
            body.lines.append("")
            _hwpx_runs(paragraph, text, body, wanted, depth)
            lines = "".join(text).split("\n")
            body.lines[place : place + 1] = lines
            for part in (*body.tables[tables:], *body.images[images:]):
                part["line"] += len(lines) - 1


def _hwpx_runs(element: ET.Element, text: list[str], body: _Body, wanted: bool, depth: int) -> None:
    """Text of a paragraph into `text`; what is anchored in it into the lines behind."""
    for child in element:
        kind = local(child.tag)
        if kind == "t":
            text.append(child.text or "")
            for inner in child:
                text.append({"lineBreak": "\n", "tab": "\t", "nbSpace": " ", "fwSpace": " ", "hyphen": "-"}.get(local(inner.tag), ""))
                text.append(inner.tail or "")
        elif kind == "tbl":
            _table(child, body, "tr", "tc", _hwpx_cell)
        elif kind == "pic":
            image = next((one for one in child.iter() if local(one.tag) == "img"), None)
            caption = next((one for one in child if local(one.tag) == "caption"), None)
            if image is not None:
                body.image(image.get("binaryItemIDRef", ""), _hwpx_cell(caption) or None if caption is not None else None, wanted)
        elif kind in ("footNote", "endNote", "rect", "ellipse", "container", "drawText", "subList", "ctrl", "run", "switch", "case", "line", "polygon") and depth < _DEEP:
            if kind == "subList":
                _hwpx_blocks(child, body, wanted, depth + 1)
            else:
                _hwpx_runs(child, text, body, wanted, depth + 1)


def _hwpx_cell(cell: ET.Element) -> str:
    inner = _Body()
    for one in cell:
        if local(one.tag) == "subList":
            _hwpx_blocks(one, inner, False)
    return "\n".join(line for line in inner.lines if line)


def _package(content: bytes | None) -> tuple[dict[str, str], dict[str, str]]:
    """(title and date, the files by the names that pictures use)."""
    if content is None:
        return {}, {}
    root = parse_xml(content)
    metadata = {local(one.tag): (one.text or "").strip() for one in root.iter() if local(one.tag) == "title"}
    for one in root.iter():
        if local(one.tag) == "meta" and one.get("name") == "ModifiedDate":
            metadata["date"] = (one.text or "").strip()
    return {key: value for key, value in metadata.items() if value}, {one.get("id", ""): one.get("href", "") for one in root.iter() if local(one.tag) == "item"}


# ---- both ---------------------------------------------------------------------------------------------------------------------------

def _table(element: ET.Element, body: _Body, row: str, cell: str, text: Callable[[ET.Element], str]) -> None:
    rows = [[text(one).strip() for one in line if local(one.tag) == cell] for line in element if local(line.tag) == row]
    rows = [line for line in rows if line]
    if len(rows) == 1 and len(rows[0]) == 1:  # a frame around text
        body.lines += rows[0][0].split("\n")
    elif rows:
        body.tables.append(parts.table(rows, line=len(body.lines)))
        body.lines += parts.table_text(rows).split("\n")


def _member(archive: _Archive, name: str) -> tuple[str, bytes] | None:
    content = archive.read(name) if name else None
    return None if content is None else (name, content)


def _attribute(element: ET.Element, name: str) -> str:
    """An attribute, whatever its namespace."""
    return next((value for key, value in element.attrib.items() if local(key) == name), "")
