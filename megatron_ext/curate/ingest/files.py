"""Which reader a file needs, and what it gives: the one place that knows all formats.

Adding a format: a function of (content, Reading) that gives an Item or many, its line in WHOLE, and its endings in ENDINGS.
"""
import hashlib
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from megatron_ext.curate.blocks import resolve
from megatron_ext.curate.ingest.apart import Apart
from megatron_ext.curate.ingest.encoding import decode
from megatron_ext.curate.ingest.items import Item, Problem, Unreadable, needed, sha256
from megatron_ext.curate.ingest.records import Reading
from megatron_ext.data.decompress import CHUNK, file_chunks
from megatron_ext.errors import UserError

ENDINGS = {
    ".txt": "text", ".text": "text", ".md": "text", ".html": "html", ".htm": "html", ".xhtml": "html", ".pdf": "pdf", ".hwpx": "hwpx", ".docx": "docx",
    ".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".xml": "xml", ".parquet": "parquet", ".warc": "warc", ".zip": "zip",
}
PACKED = (".gz", ".zst")
PACKABLE = ("text", "html", "csv", "tsv", "jsonl", "json", "xml", "warc")
KNOWN = {".hwp": "HWP 5 is not read: save it as HWPX", ".doc": "DOC is not read: save it as DOCX", ".xls": "XLS is not read: save it as CSV",
         ".xlsx": "XLSX is not read: save it as CSV", ".ppt": "PPT is not read: save it as PDF", ".pptx": "PPTX is not read: save it as PDF",
         ".7z": "7z is not read: unpack it", ".rar": "RAR is not read: unpack it", ".tar": "tar is not read: unpack it"}
RATIO = 300  # of what a member of an archive unpacks to; the most that deflate can do is 1,032, text is packed 3 to 20 times
_ROOM = "megatron_ext.curate.ingest"
# Read whole, at most `max_bytes`: one document, or an iterator of them.
WHOLE = {"html": f"{_ROOM}.html:page", "hwpx": f"{_ROOM}.office:hwpx", "docx": f"{_ROOM}.office:docx", "json": f"{_ROOM}.deliveries:json_file",
         "xml": f"{_ROOM}.deliveries:xml_file"}
PDF = f"{_ROOM}.pdf:pdf"


def kind_of(name: str) -> str | None:
    """The kind of a file by its endings, such as "jsonl"; None for one that is not read."""
    suffixes = [suffix.lower() for suffix in PurePosixPath(name).suffixes]
    if suffixes and suffixes[-1] in PACKED:
        inner = ENDINGS.get(suffixes[-2]) if len(suffixes) > 1 else None
        return inner if inner in PACKABLE else None
    return ENDINGS.get(suffixes[-1]) if suffixes else None


def why_not(name: str) -> str:
    """Why a file is not read."""
    suffix = PurePosixPath(name).suffix.lower()
    return KNOWN.get(suffix, f"a kind of file that is not read ({suffix})" if suffix.isascii() and suffix else "a kind of file that is not read")


class Readers:
    """Reads files. One for a task; it holds the process that PDF is read in."""

    def __init__(self) -> None:
        self._apart = Apart()

    def close(self) -> None:
        self._apart.close()

    def read(self, path: Path, kind: str, reading: Reading, *, start: int = 0, stop: int | None = None) -> Iterator[Item | Problem]:
        """The documents of a file, or of a part of one.

        Args:
            start, stop: bytes (jsonl) or row groups (parquet) of the part; stop None = to the end.

        Raises:
            Unreadable: the file, or what is left of it after the documents that came.
            UserError: a package is missing.
        """
        from megatron_ext.curate.ingest import tabular, warc

        plain = path.suffix.lower() not in PACKED
        try:
            if kind == "parquet":
                groups = tabular.row_groups(path)
                yield from tabular.parquet_rows(path, range(start, len(groups) if stop is None else stop), reading)
            elif kind == "jsonl" and plain and stop is not None:
                yield from tabular.json_lines(tabular.part_of(path, start, stop, reading.settings.max_bytes), reading)
            elif kind == "warc":
                yield from warc.records(path, reading, self.content)
            elif kind == "zip":
                yield from self._members(path, reading)
            elif kind in ("jsonl", "csv", "tsv"):
                yield from self._streamed(file_chunks(path), kind, reading)
            else:
                yield from self.content(b"".join(_limited(file_chunks(path), reading.settings.max_bytes)), kind, reading)
        except UserError as error:
            if error.key != "input":
                raise
            raise Unreadable(error.reason) from None
        except OSError as error:
            raise Unreadable(f"cannot be read: {error.strerror}") from None

    def content(self, content: bytes, kind: str, reading: Reading) -> Iterator[Item | Problem]:
        """The documents of a file that is in memory. Raises Unreadable."""
        try:
            yield from self._content(content, kind, reading)
        except RecursionError:
            raise Unreadable("nested too deeply") from None
        except MemoryError:
            raise Unreadable("takes more memory than there is") from None
        except (Unreadable, UserError):
            raise
        except Exception as error:  # noqa: BLE001 libraries that meet a damaged file raise anything; the message may hold text of the file
            raise Unreadable(f"its reader failed ({type(error).__name__})") from None

    def _content(self, content: bytes, kind: str, reading: Reading) -> Iterator[Item | Problem]:
        if len(content) > reading.settings.max_bytes:
            raise Unreadable(_too_large(reading.settings.max_bytes))
        if kind == "text":
            text, _, _ = decode(content, wanted=reading.encoding, max_broken=reading.settings.max_broken)
            yield Item(text, sha256(content))
        elif kind == "pdf":
            needed("pypdfium2", "PDF")
            yield self._apart.read(PDF, content, reading)
        elif kind in WHOLE:
            found = resolve(WHOLE[kind])(content, reading)
            yield from [found] if isinstance(found, Item) else found
        elif kind in ("jsonl", "csv", "tsv"):
            yield from self._streamed(iter([content]), kind, reading)
        else:
            raise Unreadable(f"{kind} inside another file is not read")

    def _streamed(self, chunks: Iterator[bytes], kind: str, reading: Reading) -> Iterator[Item | Problem]:
        from megatron_ext.curate.ingest import tabular

        if kind == "jsonl":
            return tabular.json_lines(tabular.offsets(chunks, reading.settings.max_bytes), reading)
        return tabular.csv_rows(chunks, reading, tabs=kind == "tsv")

    def _members(self, path: Path, reading: Reading) -> Iterator[Item | Problem]:
        """A zip file, as AI Hub delivers: the members in the order of their names; the position is the member's name, and what is inside behind `!`."""
        try:
            archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, NotImplementedError, ValueError):
            raise Unreadable("not a zip file that can be read") from None
        with archive:
            for entry in sorted(archive.infolist(), key=member_name):
                name = member_name(entry)
                if entry.is_dir() or PurePosixPath(name).name.startswith("."):
                    continue
                kind = kind_of(name)
                if kind is None or PurePosixPath(name).suffix.lower() in PACKED:
                    yield Problem(name, why_not(name))
                    continue
                try:
                    if entry.file_size > reading.settings.max_bytes:
                        raise Unreadable(_too_large(reading.settings.max_bytes))
                    if entry.file_size > max(RATIO * entry.compress_size, 1 << 16):
                        raise Unreadable(f"packed more than {RATIO} times, as no text is")
                    with archive.open(entry) as stream:
                        content = stream.read(entry.file_size)
                    for found in self.content(content, kind, reading):
                        yield _inside(name, found)
                except Unreadable as error:
                    yield Problem(name, error.reason)
                except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, EOFError, OSError):
                    yield Problem(name, "damaged inside the zip file, or encrypted")


def member_name(entry: zipfile.ZipInfo) -> str:
    """A member's name. Korean programs write names in CP949 without saying so, and zipfile then reads them as CP437."""
    if entry.flag_bits & 0x800:
        return entry.filename
    try:
        return entry.filename.encode("cp437").decode("cp949")
    except UnicodeError:
        return entry.filename


def _inside(name: str, found: Item | Problem) -> Item | Problem:
    position = f"{name}!{found.position}" if found.position else name
    if isinstance(found, Problem):
        return Problem(position, found.reason)
    return Item(found.text, found.sha256, position, found.metadata, found.images, found.tables, found.pictures)


def _limited(chunks: Iterator[bytes], most: int) -> Iterator[bytes]:
    for chunk in chunks:
        most -= len(chunk)
        if most < 0:
            raise Unreadable(_too_large(None))
        yield chunk


def _too_large(most: int | None) -> str:
    return "larger than curate.ingest.max_bytes" + ("" if most is None else f"={most}")


def raw_sha256(path: Path, start: int, stop: int) -> str:
    """Of bytes [start, stop) of a file. Raises Unreadable."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            stream.seek(start)
            while (left := stop - stream.tell()) > 0 and (chunk := stream.read(min(CHUNK, left))):
                digest.update(chunk)
    except OSError as error:
        raise Unreadable(f"cannot be read: {error.strerror}") from None
    return digest.hexdigest()

