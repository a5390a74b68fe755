"""JSON and XML as public bodies deliver them: AI Hub, the public data portal (data.go.kr), the National Institute of Korean Language, libraries and archives.

A file is told by its shape: the first of SHAPES whose records are there and hold text. A catalogue that names `records` and `text` goes before.
"""
import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from megatron_ext.curate.documents import canonical
from megatron_ext.curate.ingest.encoding import decode
from megatron_ext.curate.ingest.items import Item, Problem, Unreadable, sha256
from megatron_ext.curate.ingest.records import Reading, item, texts, values

_ENTITIES = "declares XML entities, which are not followed"
ERROR = "the portal's answer is an error, not data"


@dataclass(frozen=True)
class Shape:
    """`records`: path of the records; `text`: paths in a record; `rows`: records that are rows of a table, written out whole."""

    name: str
    records: str
    text: tuple[str, ...] = ()
    title: str | None = None
    rows: bool = False


SHAPES = (
    Shape("AI Hub, summaries of documents", "documents[*]", ("text[*][*].sentence",), "title"),
    Shape("AI Hub, dialogues", "data[*]", ("body.dialogue[*].utterance",), "header.dialogueInfo.topic"),
    Shape("AI Hub, reading comprehension", "data[*]", ("paragraphs[*].context",), "title"),
    Shape("AI Hub, specialist texts", "named_entity[*]", ("title[*].sentence", "subtitle[*].sentence", "content[*].sentence"), "title[0].sentence"),
    Shape("AI Hub, specialist texts", "SJML.text[*]", ("content",), "title"),
    Shape("AI Hub, one document", "dataset.context[*]", ("text",), "title"),
    Shape("NIKL, written language", "document[*]", ("paragraph[*].form",), "metadata.title"),
    Shape("NIKL, sentences", "document[*]", ("sentence[*].form",), "metadata.title"),
    Shape("NIKL, spoken language", "document[*]", ("utterance[*].form",), "metadata.title"),
    Shape("public data portal", "response.body.items.item[*]", rows=True),
    Shape("public data portal, one record", "response.body.items.item", rows=True),
    Shape("public data portal", "response.body.items[*]", rows=True),
    Shape("public data portal, standard data", "records[*]", rows=True),
    Shape("public data portal, files", "data[*]", rows=True),
    Shape("public data portal, files", "DATA[*]", rows=True),
    Shape("a list", "[*]", rows=True),
)


def json_file(content: bytes, reading: Reading) -> Iterator[Item | Problem]:
    """Documents of a JSON file. Raises Unreadable: no JSON, or of a shape that is not known."""
    text, _, _ = decode(content, wanted=reading.encoding)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise Unreadable(f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except (ValueError, RecursionError):
        raise Unreadable("not JSON that can be read") from None
    yield from _documents(value, content, reading)


def xml_file(content: bytes, reading: Reading) -> Iterator[Item | Problem]:
    """Documents of an XML file: the portal's items, MARC and Dublin Core records, or `records` and `text` of the catalogue. Raises Unreadable."""
    root = parse_xml(content)
    marc = [one for one in root.iter() if local(one.tag) == "record" and any(local(part.tag) == "datafield" for part in one)]
    if marc and reading.records is None:
        yield from (_catalogued(number, *_marc(one), reading) for number, one in enumerate(marc, 1))
        return
    core = [one for one in root.iter() if local(one.tag) in ("dc", "qualifieddc") or local(one.tag) == "record" and any(local(part.tag) == "title" for part in one)]
    if core and reading.records is None:
        yield from (_catalogued(number, *_dublin_core(one), reading) for number, one in enumerate(core, 1))
        return
    yield from _documents({local(root.tag): _value(root)}, content, reading)


def parse_xml(content: bytes) -> ET.Element:
    """Raises Unreadable: no XML, or one that declares entities, which can be made to grow without bound."""
    if b"<!ENTITY" in content or "<!ENTITY".encode("utf-16-le") in content or "<!ENTITY".encode("utf-16-be") in content:
        raise Unreadable(_ENTITIES)
    try:
        return ET.fromstring(content)
    except ET.ParseError as error:
        line, column = error.position
        reason = f"not XML: {str(error).split(':')[0]} at line {line}, column {column}"
    except (ValueError, LookupError):
        reason = "not XML that can be read"
    try:  # Python's parser knows few encodings: EUC-KR is not among them
        text = decode(content, declared=declared(content))[0]
    except Unreadable:
        raise Unreadable(reason) from None
    if "<!ENTITY" in text:
        raise Unreadable(_ENTITIES)
    try:
        return ET.fromstring(text.split("?>", 1)[-1].strip())
    except (ET.ParseError, ValueError):
        raise Unreadable(reason) from None


def declared(content: bytes) -> str | None:
    """The encoding that an XML file names in its first line."""
    head = content[:200].partition(b"?>")[0]
    _, found, rest = head.partition(b"encoding=")
    return rest[1:].partition(rest[:1])[0].decode("ascii", "replace") if found else None


def local(tag: object) -> str:
    """A tag without its namespace."""
    return tag.rpartition("}")[2] if isinstance(tag, str) else ""


def _documents(value: object, content: bytes, reading: Reading) -> Iterator[Item | Problem]:
    if reading.records is not None:
        # an element of XML that does not repeat is no list
        records = values(value, reading.records) or values(value, reading.records.removesuffix("[*]"))
        if not records:
            raise Unreadable(f"has nothing at {reading.records}, where the catalogue says that its records are")
        yield from _each(records, reading, rows=not reading.text)
        return
    for shape in SHAPES:
        records = [one for one in values(value, shape.records) if isinstance(one, Mapping)]
        if records and (shape.rows or any(texts(records[0], path) for path in shape.text)):
            own = reading if reading.text or not shape.text else replace(reading, text=shape.text)
            if shape.title and not any(key == "title" for key, _ in own.fields):
                own = replace(own, fields=(*own.fields, ("title", shape.title)))
            yield from _each(records, own, rows=shape.rows)
            return
    if isinstance(value, Mapping):
        found = item(value, "", sha256(content), reading)
        if isinstance(found, Item):
            yield found
            return
        if values(value, "response.header.resultCode") or values(value, "OpenAPI_ServiceResponse.cmmMsgHeader"):
            raise Unreadable(ERROR)
    raise Unreadable("JSON or XML of a shape that is not known; name records and text in the catalogue")


def _each(records: list, reading: Reading, *, rows: bool) -> Iterator[Item | Problem]:
    for number, record in enumerate(records, 1):
        if isinstance(record, Mapping):
            try:
                digest = sha256(canonical(record))
            except (ValueError, UnicodeEncodeError):  # NaN, half pairs
                digest = sha256(repr(record).encode("utf-8", "replace"))
            yield item(record, str(number), digest, reading, rows=rows)
        else:
            yield Problem(str(number), f"not an object but {type(record).__name__}")


def _value(element: ET.Element) -> object:
    """An element as JSON would have it: children that repeat are a list, one without children is its text."""
    if not len(element):
        return (element.text or "").strip()
    found: dict[str, object] = {}
    for child in element:
        if not isinstance(child.tag, str):
            continue
        name, value = local(child.tag), _value(child)
        if name not in found:
            found[name] = value
        elif isinstance(found[name], list):
            found[name].append(value)
        else:
            found[name] = [found[name], value]
    return found


# ---- libraries and archives ---------------------------------------------------------------------------------------------------------

def _catalogued(number: int, text: list[str], metadata: dict[str, str], reading: Reading) -> Item | Problem:
    if not text:
        return Problem(str(number), "a catalogue record without title and description")
    return Item("\n".join(text), sha256("\n".join(text).encode()), str(number), metadata)


def _marc(record: ET.Element) -> tuple[list[str], dict[str, str]]:
    """MARC 21: 245 title, 1xx and 7xx names, 260 and 264 imprint, 505 contents, 520 summary, 5xx notes, 6xx subjects."""
    lines, metadata = [], {}
    for entry in record:
        if local(entry.tag) != "datafield":
            continue
        tag = entry.get("tag", "")
        parts = [(one.get("code"), (one.text or "").strip()) for one in entry if local(one.tag) == "subfield"]
        said = " ".join(part for code, part in parts if part and code and code.isalpha())
        if tag == "245":
            metadata["title"] = said
        if tag in ("260", "264") and (year := next((part.strip("[].c ©") for code, part in parts if code == "c"), None)):
            metadata["date"] = year
        if said and tag in ("245", "260", "264", "500", "502", "504", "505", "520", "545") or said and tag[:1] in ("1", "6", "7") and tag.isdigit():
            lines.append(said)
    return lines, metadata


def _dublin_core(record: ET.Element) -> tuple[list[str], dict[str, str]]:
    order = ("title", "alternative", "creator", "contributor", "publisher", "date", "subject", "abstract", "description", "tableofcontents", "coverage")
    found: dict[str, list[str]] = {}
    for part in record.iter():
        if part.text and part.text.strip():
            found.setdefault(local(part.tag).lower(), []).append(part.text.strip())
    lines = [text for name in order for text in found.get(name, ())]
    metadata = {name: found[key][0] for name, key in (("title", "title"), ("date", "date"), ("licence", "rights"), ("owner", "publisher")) if key in found}
    if len(code := found.get("language", [""])[0]) in (2, 3):
        metadata["language"] = {"kor": "ko", "eng": "en", "jpn": "ja", "chi": "zh", "zho": "zh"}.get(code.lower(), code.lower()[:2])
    return lines, metadata
