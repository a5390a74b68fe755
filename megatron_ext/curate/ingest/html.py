"""Pages: the main text by trafilatura, or all that is shown; tables and images by lxml."""
import logging
import re

from megatron_ext.curate.ingest import parts
from megatron_ext.curate.ingest.encoding import decode
from megatron_ext.curate.ingest.items import Item, Unreadable, needed, sha256
from megatron_ext.curate.ingest.records import Reading

_CHARSET = re.compile(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([A-Za-z0-9_.:-]{3,40})""", re.IGNORECASE)
_SPACE = re.compile(r"[ \t\r\n\f\v\u00a0]+")
_LINES = re.compile(r" *\n *")
HIDDEN = frozenset({"script", "style", "noscript", "template", "head", "svg", "math", "iframe", "object", "select", "button", "textarea", "canvas"})
BLOCKS = frozenset({"address", "article", "aside", "blockquote", "body", "br", "caption", "dd", "details", "div", "dl", "dt", "fieldset", "figcaption", "figure",
                    "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "legend", "li", "main", "nav", "ol", "p", "pre", "section", "summary",
                    "table", "tbody", "thead", "tfoot", "tr", "ul"})
PARAGRAPHS = frozenset({"p", "h1", "h2", "h3", "h4", "h5", "h6", "article", "section", "blockquote", "table", "figure"})
SHORT = 0.25  # of all that is shown: where the main text is less, trafilatura has taken a page of lists or tables for menus


def page(content: bytes, reading: Reading, *, declared: str | None = None, position: str = "") -> Item:
    """A page as a document.

    Args:
        declared: the encoding that its transfer named (in a WARC record), which goes before what the page says.

    Raises:
        Unreadable: no text, or in no known encoding.
    """
    said = _CHARSET.search(content[:4096])
    text, _, _ = decode(content, wanted=reading.encoding, declared=declared or (said[1].decode("ascii") if said else None),
                        max_broken=reading.settings.max_broken)
    root = _tree(text)
    shown, tables, images = _shown(root)
    if not shown:
        raise Unreadable("a page without text")
    chosen = _article(text, shown) if reading.settings.html == "article" else shown
    metadata = {}
    if title := " ".join((root.findtext(".//title") or "").split()):
        metadata["title"] = title
    return Item(chosen, sha256(content), position, metadata, tuple(images), tuple(tables))


def _tree(text: str):
    etree = needed("lxml.etree", "HTML")
    parser = etree.HTMLParser(encoding="utf-8", no_network=True, remove_comments=True, remove_pis=True)
    try:
        root = etree.fromstring(text.encode("utf-8"), parser)
    except (etree.XMLSyntaxError, ValueError):
        root = None
    if root is None:
        raise Unreadable("not a page that can be read")
    return root


def _article(text: str, shown: str) -> str:
    """The main text; all that is shown where that is too little of it."""
    trafilatura = needed("trafilatura", "HTML")
    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # its messages name parts of pages
    found = trafilatura.extract(text, output_format="txt", include_comments=False, include_tables=True, deduplicate=False, favor_recall=True)
    return found if found and len(found) >= SHORT * len(shown) else shown


def _shown(root) -> tuple[str, list[dict], list[dict]]:
    """All text of a page with its lines, its tables of data, and its images."""
    etree = needed("lxml.etree", "HTML")
    pieces: list[str] = []
    tables, images = [], []
    walk = etree.iterwalk(root, events=("start", "end"))
    for event, element in walk:
        tag = element.tag if isinstance(element.tag, str) else ""
        if event == "start":
            if tag in HIDDEN:
                walk.skip_subtree()
                continue
            if tag == "table" and (rows := _rows(element)):
                caption = element.find("caption")
                tables.append(parts.table(rows, caption=_flat(caption) if caption is not None else None))
                pieces += ["\n\n", "\n".join(filter(None, (_flat(caption) if caption is not None else "", parts.table_text(rows)))), "\n\n"]
                walk.skip_subtree()
                continue
            if tag == "img" and (source := element.get("src")) and not source.startswith("data:"):
                images.append(parts.image(source, caption=_caption(element), width=_number(element.get("width")), height=_number(element.get("height"))))
            if tag in BLOCKS:
                pieces.append("\n\n" if tag in PARAGRAPHS else "\n")
            elif tag in ("td", "th") and pieces and not pieces[-1].endswith("\n"):
                pieces.append(" | ")
            if element.text:
                pieces.append(_SPACE.sub(" ", element.text))
        else:
            if tag in BLOCKS:
                pieces.append("\n\n" if tag in PARAGRAPHS else "\n")
            if element.tail and element is not root:
                pieces.append(_SPACE.sub(" ", element.tail))
    text = re.sub(r"\n{3,}", "\n\n", _LINES.sub("\n", "".join(pieces)))
    return text.strip(), tables, images


def _rows(table) -> list[list[str]] | None:
    """The cells of a table of data: at least two rows and columns, no table inside; None of a table that only lays out a page."""
    if next((inner for inner in table.iter("table") if inner is not table), None) is not None:
        return None
    rows = [[_flat(cell) for cell in row if cell.tag in ("td", "th")] for row in table.iter("tr")]
    rows = [row for row in rows if row]
    return rows if len(rows) >= 2 and max(map(len, rows)) >= 2 else None


def _flat(element) -> str:
    return " ".join(" ".join(element.itertext()).split())


def _caption(image) -> str | None:
    figure = next((one for one in image.iterancestors("figure")), None)
    caption = figure.find(".//figcaption") if figure is not None else None
    return (_flat(caption) if caption is not None else None) or (image.get("alt") or "").strip() or None


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None
