"""The catalogue of sources: a YAML file that says what each part of the input is, whose it is, and what may be done with it.

    sources:
      - name: statutes                 # in every document and every count
        path: statutes/**              # files below the input, as of glob; several: a list
        owner: 법제처
        licence: KOGL-1                # licences.py says what it forbids; forbids: [commercial] says so directly
        terms: https://www.kogl.or.kr/info/license.do
        date: 2026-05-01               # of the delivery
        format: auto                   # auto (by the file's ending), or text, html, pdf, hwpx, docx, csv, jsonl, json, xml, parquet, warc
        language: ko                   # where all of it is in one
        domain: law                    # where all of it is of one
        encoding: cp949                # where it is known
        records: data[*]               # of JSON and XML: where the records are; null = a known delivery format, found by its shape
        text: [title, "body[*].form"]  # of records: fields that are the text, joined by line breaks
        fields: {date: regDate}        # of records: other fields that are kept: title, date, domain, language, owner, licence

A file belongs to the first source whose path it matches. What belongs to none is set aside, and named.
"""
import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_ext.curate.ingest.licences import UNKNOWN, USES
from megatron_ext.errors import UserError

KEY = "curate.ingest.catalogue"
FORMATS = ("auto", "text", "html", "pdf", "hwpx", "docx", "csv", "jsonl", "json", "xml", "parquet", "warc")
KEPT_FIELDS = ("title", "date", "domain", "language", "owner", "licence")


@dataclass(frozen=True)
class Source:
    """One source; its attributes are the keys above. `text` and `path` are tuples, `fields` pairs."""

    name: str
    path: tuple[str, ...] = ("**",)
    owner: str | None = None
    licence: str = UNKNOWN
    terms: str | None = None
    date: str | None = None
    format: str = "auto"
    language: str | None = None
    domain: str | None = None
    encoding: str | None = None
    records: str | None = None
    text: tuple[str, ...] = ()
    fields: tuple[tuple[str, str], ...] = ()
    forbids: tuple[str, ...] | None = None
    patterns: tuple[re.Pattern, ...] = field(default=(), repr=False, compare=False)

    def holds(self, path: str) -> bool:
        """Whether a file (relative, with `/`) is of this source."""
        return any(pattern.fullmatch(path) for pattern in self.patterns)

    def described(self) -> dict:
        """What the manifest says of it."""
        found = {"name": self.name, "owner": self.owner, "licence": self.licence, "terms": self.terms, "date": self.date, "format": self.format,
                 "forbids": None if self.forbids is None else list(self.forbids)}
        return {key: value for key, value in found.items() if value is not None}


def read_catalogue(path: str | None, name: str) -> tuple[Source, ...]:
    """The sources. Without a catalogue all of the input is one, called `name`, of which nothing is known.

    Raises:
        UserError: no such file, or one that does not say what it should; the message names the source and the key.
    """
    if path is None:
        return (_compiled(Source(name)),)
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(KEY, path, f"cannot be read: {error.strerror if isinstance(error, OSError) else 'not UTF-8'}") from None
    except yaml.YAMLError as error:
        raise UserError(KEY, path, f"is not YAML: {' '.join(str(error).split())[:200]}") from None
    except (RecursionError, ValueError):  # nested without end; a date that no calendar has
        raise UserError(KEY, path, "is not YAML that can be read") from None
    rows = found.get("sources") if isinstance(found, dict) else None
    if not isinstance(rows, list) or not rows:
        raise UserError(KEY, path, "must hold a list `sources`, each with a name, such as {name: statutes, path: statutes/**, licence: KOGL-1}")
    if unknown := [key for key in found if key != "sources"]:
        raise UserError(KEY, path, f"unknown key {str(unknown[0])[:40]!r}; it holds one list, sources")
    sources = tuple(_source(path, number, row) for number, row in enumerate(rows, 1))
    names = [source.name for source in sources]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(KEY, path, f"names the source {twice[0]!r} twice")
    return sources


def _source(path: str, number: int, row: object) -> Source:
    if not isinstance(row, Mapping) or not isinstance(row.get("name"), str) or not row["name"].strip():
        raise UserError(KEY, path, f"source {number} has no name")
    known = [name for name in Source.__dataclass_fields__ if name != "patterns"]
    if unknown := [key for key in row if key not in known]:
        raise UserError(KEY, path, f"source {row['name']}: unknown key {unknown[0]!r}; known are {', '.join(known)}")
    values = {}
    for key, value in row.items():
        if value is None:
            continue
        if key == "fields":
            values[key] = _fields(path, row["name"], value)
        elif key in ("path", "text", "forbids"):
            values[key] = tuple(value if isinstance(value, list) else [value])
            if not all(isinstance(one, str) for one in values[key]):
                raise UserError(KEY, path, f"source {row['name']}: {key} must be a text or a list of texts")
        elif isinstance(value, list | Mapping):
            raise UserError(KEY, path, f"source {row['name']}: {key} must be one value")
        else:
            values[key] = str(value)
    source = Source(**values)
    if ":" in source.name or not source.name.isprintable():
        raise UserError(KEY, path, f"source {number}: its name must be printable and have no colon, since documents are called NAME:PATH")
    if wrong := [glob for glob in source.path if glob.startswith("/") or ".." in glob.split("/")]:
        raise UserError(KEY, path, f"source {source.name}: path {wrong[0]!r} leads out of the input; it must be below it, such as statutes/**")
    if source.encoding is not None and not _is_encoding(source.encoding):
        raise UserError(KEY, path, f"source {source.name}: encoding {source.encoding!r} is none that is known, such as cp949")
    if source.format not in FORMATS:
        raise UserError(KEY, path, f"source {source.name}: format {source.format!r} must be one of {', '.join(FORMATS)}")
    if wrong := [use for use in source.forbids or () if use not in USES]:
        raise UserError(KEY, path, f"source {source.name}: forbids {wrong[0]!r} must be one of {', '.join(USES)}")
    return _compiled(source)


def _fields(path: str, name: str, value: object) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, Mapping) or (wrong := [key for key in value if key not in KEPT_FIELDS]):
        shown = repr(wrong[0]) if isinstance(value, Mapping) else "a value"
        raise UserError(KEY, path, f"source {name}: fields has {shown}; it maps some of {', '.join(KEPT_FIELDS)} to fields of the records")
    return tuple((key, str(field)) for key, field in value.items())


def _is_encoding(name: str) -> bool:
    try:
        "".encode(name)
    except (LookupError, ValueError):  # LookupError: of bytes to bytes, too
        return False
    return True


def _compiled(source: Source) -> Source:
    return replace(source, patterns=tuple(_pattern(glob) for glob in source.path))


def _pattern(glob: str) -> re.Pattern:
    """`**` goes over folders, `*` and `?` stay in one; a folder alone means all below it."""
    glob = glob.rstrip("/")
    parts = []
    for part in re.split(r"(\*\*/?|\*|\?|\[[^\]]*\])", glob):
        wild = {"**": ".*", "**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}.get(part)
        parts.append(wild or (fnmatch.translate(part)[4:-3] if part.startswith("[") and len(part) > 2 else re.escape(part)))
    return re.compile("".join(parts) + ("" if glob.endswith("**") else "(?:/.*)?"), re.DOTALL)
