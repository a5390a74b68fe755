"""Records (JSON objects, rows) to documents: which fields are text, and which are kept beside it."""
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_ext.curate.ingest.config import IngestConfig
from megatron_ext.curate.ingest.items import Item, Problem

# Fields that hold the text where nobody has said which; the first that is there.
LIKELY = ("text", "content", "contents", "body", "document", "article", "passage", "context", "본문", "내용", "원문", "본문내용", "문서내용", "text_ko", "sentence")
TITLES = ("title", "제목", "subject", "명칭")
CARRIED = ("title", "date", "domain", "language", "owner", "licence", "derived_from", "images", "tables")  # of records that this program wrote
_STEP = re.compile(r"([^.\[\]]+)|\[(\*|\d+)\]")


@dataclass(frozen=True)
class Reading:
    """How a file is to be read: the settings, with what the catalogue says of its source.

    Attributes:
        text, records, fields: as in catalogue.py. encoding: "auto", or one that is known.
        images: whether content of images is wanted.
    """

    settings: IngestConfig
    text: tuple[str, ...] = ()
    records: str | None = None
    fields: tuple[tuple[str, str], ...] = ()
    encoding: str = "auto"
    images: bool = False


def values(record: Any, path: str) -> list[Any]:
    """What lies at a path such as `body.dialogue[*].utterance`; [] where there is nothing. A key with dots in it is found as it is, too."""
    if isinstance(record, Mapping) and path in record:
        return [record[path]]
    found = [record]
    for name, index in _STEP.findall(path):
        if name:
            found = [one[name] for one in found if isinstance(one, Mapping) and name in one]
        elif index == "*":
            found = [inner for one in found if isinstance(one, list) for inner in one]
        else:
            found = [one[int(index)] for one in found if isinstance(one, list) and int(index) < len(one)]
    return found


def texts(record: Any, path: str) -> list[str]:
    """The texts at a path; lists of texts are taken apart, numbers are written out."""
    return [text for value in values(record, path) for text in _flat(value)]


def _flat(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if value.strip():
            yield value
    elif isinstance(value, bool) or value is None:
        return
    elif isinstance(value, int | float):
        yield str(value)
    elif isinstance(value, list):
        for inner in value:
            yield from _flat(inner)


def item(record: Mapping, position: str, digest: str, reading: Reading, *, rows: bool = False) -> Item | Problem:
    """A record as a document.

    Args:
        rows: a record of which no field is known to be the text is written out whole, `field: value` a line.
    """
    try:
        return _item(record, position, digest, reading, rows)
    except RecursionError:
        return Problem(position, "nested too deeply")


def _item(record: Mapping, position: str, digest: str, reading: Reading, rows: bool) -> Item | Problem:
    text = _text(record, reading, rows)
    if text is None:
        asked = f" {', '.join(reading.text)}" if reading.text else ""
        return Problem(position, f"no text field{asked}; name it in curate.ingest.text_fields or in the catalogue")
    if not text.isascii():
        text = text.encode("utf-8", "replace").decode("utf-8")  # JSON may hold half pairs
    metadata = {key: record[key] for key in CARRIED if key in record and not isinstance(record[key], Mapping)}
    inner = record.get("metadata")
    if isinstance(inner, Mapping):
        metadata |= {key: inner[key] for key in CARRIED if key in inner}
    for key, path in reading.fields:
        if found := texts(record, path):
            metadata[key] = found[0]
    if "title" not in metadata and (title := next((record[key] for key in TITLES if isinstance(record.get(key), str)), None)):
        metadata["title"] = title
    derived, whence = metadata.pop("derived_from", None), record.get("source")
    if derived is None and isinstance(whence, Mapping):  # as rlhf/collect says what a record was made of
        derived = whence.get("id")
    if isinstance(derived, str | list):
        metadata["derived_from"] = [one for one in ([derived] if isinstance(derived, str) else derived) if isinstance(one, str)]
    images, tables = metadata.pop("images", []), metadata.pop("tables", [])
    kept = {key: str(value) if isinstance(value, int | float) else _encodable(value) for key, value in metadata.items() if value}
    return Item(text, digest, position, {key: value for key, value in kept.items() if isinstance(value, str) or key == "derived_from"},
                tuple(_encodable(one) for one in images if isinstance(one, Mapping)) if isinstance(images, list) else (),
                tuple(_encodable(one) for one in tables if isinstance(one, Mapping)) if isinstance(tables, list) else ())


def _encodable(value: Any) -> Any:
    """The same value without half pairs, which JSON may hold and UTF-8 cannot."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, Mapping):
        return {_encodable(key): _encodable(inner) for key, inner in value.items()}
    return [_encodable(inner) for inner in value] if isinstance(value, list) else value


def _text(record: Mapping, reading: Reading, rows: bool) -> str | None:
    if reading.text:
        found = [text for path in reading.text for text in texts(record, path)]
        return "\n".join(found) if found else None
    likely = next((record[key] for key in LIKELY if isinstance(record.get(key), str)), None)
    if likely is not None or not rows:
        return likely
    lines = [f"{key}: {' '.join(text.split())}" for key, value in record.items() for text in _flat(value)]
    return "\n".join(lines) if lines else None
