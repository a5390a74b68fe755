"""WARC: what a crawl got (ISO 28500), by warcio. Pages, texts and PDF that came with status 200; the position is the byte at which the record begins."""
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_ext.curate.ingest.items import Item, Problem, Unreadable, needed
from megatron_ext.curate.ingest.records import Reading

KINDS = {"text/html": "html", "application/xhtml+xml": "html", "text/plain": "text", "application/pdf": "pdf"}


def records(path: Path, reading: Reading, read: Callable[[bytes, str, Reading], Iterator[Item | Problem]]) -> Iterator[Item | Problem]:
    """Documents of a WARC file (`.gz` too).

    Args:
        read: documents of (content, kind, reading).

    Raises:
        Unreadable: what is left of the file is damaged.
    """
    iterator = needed("warcio.archiveiterator", "WARC").ArchiveIterator
    failed = needed("warcio.exceptions", "WARC").ArchiveLoadFailed
    from megatron_ext.curate.ingest.html import page

    if path.suffix.lower() == ".zst":
        raise Unreadable("a WARC file packed with zstd is not read: pack it as .warc.gz")
    with path.open("rb") as stream:
        archive = iterator(stream)
        while True:
            try:
                record = next(archive, None)
                if record is None:
                    return
                kind, declared = _kind(record)
                content = record.content_stream().read(reading.settings.max_bytes + 1) if kind else b""
                place = str(archive.get_record_offset())  # reads what is left of the record
            except (failed, EOFError, ValueError, OSError) as error:
                raise Unreadable(f"damaged WARC file ({type(error).__name__})") from None
            if kind is None:
                continue
            metadata = {"url": record.rec_headers.get_header("WARC-Target-URI") or "", "date": (record.rec_headers.get_header("WARC-Date") or "")[:10]}
            try:
                found = [page(content, reading, declared=declared)] if kind == "html" and len(content) <= reading.settings.max_bytes else read(content, kind, reading)
                for one in found:
                    if isinstance(one, Problem):
                        yield Problem(place, one.reason)
                    else:
                        kept = {key: value for key, value in metadata.items() if value}
                        yield Item(one.text, one.sha256, place, kept | one.metadata, one.images, one.tables, one.pictures)
            except Unreadable as error:
                yield Problem(place, error.reason)


def _kind(record) -> tuple[str | None, str | None]:
    """(the reader of a record, the encoding that its transfer named); None for what is no document."""
    if record.rec_type not in ("response", "resource"):
        return None, None
    headers = record.http_headers if record.rec_type == "response" else record.rec_headers
    if headers is None or record.rec_type == "response" and headers.get_statuscode() != "200":
        return None, None
    said = (headers.get_header("Content-Type") or "").lower()
    name, _, rest = said.partition(";")
    charset = rest.partition("charset=")[2].strip(" \"'").split(";")[0]
    return KINDS.get(name.strip()), charset or None
