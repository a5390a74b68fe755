"""PDF with a text layer, by PDFium. It is a large parser of a hostile format, so `apart.py` runs it in a process of its own.

Lines of a page are broken by its width, not by sense: lines that reach near the right end go on in the next one. What stands at the top or bottom of most
pages (a running head, the page's number) is left out.
"""
import re
from collections import Counter
from collections.abc import Sequence

from megatron_ext.curate.ingest import parts
from megatron_ext.curate.ingest.items import Item, Unreadable, needed, sha256
from megatron_ext.curate.ingest.records import Reading

EDGE = 2  # lines at either end of a page that may be a running head
_DIGITS = re.compile(r"\d+")
_BEGINS = re.compile(r"\s*(?:[-•·∙▪■□○●◦◇◆▶※*–—]|\(?\d{1,3}[.)]|[가-하][.)]|제\s*\d+\s*[조장절항]|[①-⑳])")
_ENDS = re.compile(r"[.!?。:;)\]」』”\"]\s*$")


def pdf(content: bytes, reading: Reading) -> Item:
    """A PDF as a document. Raises Unreadable: damaged, encrypted, or without a text layer."""
    pdfium = needed("pypdfium2", "PDF")
    raw = needed("pypdfium2.raw", "PDF")
    try:
        document = pdfium.PdfDocument(content)
    except pdfium.PdfiumError as error:
        locked = "password" in str(error).lower()
        raise Unreadable("encrypted: it opens with a password only" if locked else "not a PDF that can be read") from None
    with document:
        pages, images, pictures = [], [], {}
        for number in range(len(document)):
            try:
                page = document[number]
                text = page.get_textpage().get_text_bounded()
                found = list(page.get_objects(filter=(raw.FPDF_PAGEOBJ_IMAGE,), max_depth=3))
            except pdfium.PdfiumError:
                raise Unreadable(f"damaged at page {number + 1}") from None
            pages.append(text.replace("\r\n", "\n").replace("\r", "\n").replace("\ufffe", "").split("\n"))  # U+FFFE: a hyphen at a line's end
            for position, one in enumerate(found):
                entry, picture = _image(one, number + 1, position, reading.images)
                images.append(entry)
                if picture is not None:
                    pictures[entry["sha256"]] = picture
        metadata = {key: value for key, name in (("title", "Title"),) if (value := document.get_metadata_value(name).strip())}
    body = [unwrapped(page) for page in without_edges(pages)]
    starts, line = [], 0
    for page in body:
        starts.append(line)
        line += len(page) + 1
    text = "\n\n".join("\n".join(page) for page in body)
    if not text.strip():
        raise Unreadable("no text layer (scanned pages): recognise its letters first")
    images = [entry | {"line": starts[entry["page"] - 1]} for entry in images]
    return Item(text, sha256(content), "", metadata, tuple(images), (), pictures)


def _image(one, page: int, position: int, wanted: bool) -> tuple[dict, bytes | None]:
    """An image of a page, with its content where that is a JPEG as it stands and is wanted."""
    try:
        box = [round(float(number), 2) for number in one.get_bounds()]
        width, height = one.get_px_size()
        picture = bytes(one.get_data()) if wanted and one.get_filters() == ["DCTDecode"] else None
    except Exception:  # noqa: BLE001 an image that PDFium cannot describe is no reason to lose its page
        return parts.image(f"page{page}/{position}", page=page), None
    known = {"page": page, "box": box, "width": int(width), "height": int(height)}
    if picture is not None and parts.media_type(picture):
        return parts.image(f"page{page}/{position}", sha256=sha256(picture), media_type=parts.media_type(picture), **known), picture
    return parts.image(f"page{page}/{position}", **known), None


def without_edges(pages: Sequence[Sequence[str]]) -> list[list[str]]:
    """The pages without what most of them begin or end with (numbers are taken for alike); of fewer than four pages nothing is left out."""
    kept = [[line.rstrip() for line in page] for page in pages]
    for page in kept:
        while page and not page[0].strip():
            del page[0]
        while page and not page[-1].strip():
            del page[-1]
    if len(kept) < 4:
        return kept

    def shape(line: str) -> str:
        return _DIGITS.sub("0", "".join(line.split()))

    seen = Counter(one for page in kept for one in {shape(line) for line in (*page[:EDGE], *page[-EDGE:])})
    often = {one for one, count in seen.items() if count > len(kept) / 2}
    return [[line for place, line in enumerate(page) if not (shape(line) in often and (place < EDGE or place >= len(page) - EDGE))] for page in kept]


def unwrapped(lines: Sequence[str]) -> list[str]:
    """Lines that were broken for the width of the page, put together again."""
    lengths = sorted(len(line) for line in lines if line.strip())
    if not lengths:
        return []
    full = 0.8 * lengths[round(0.9 * (len(lengths) - 1))]
    found: list[str] = []
    goes_on = False
    for line in lines:
        if goes_on and line.strip() and not _BEGINS.match(line):
            before = found[-1]
            if before.endswith("-") and before[-2:-1].isalpha() and line.lstrip()[:1].islower():
                found[-1] = before[:-1] + line.lstrip()
            else:
                found[-1] = f"{before} {line.lstrip()}"
        else:
            found.append(line)
        goes_on = len(line) >= full > 20 and not _ENDS.search(line)
    return found
