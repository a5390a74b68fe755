"""Images and tables of a document: kept beside the text, for models that will read more than text.

    image   {"path": where it is: a member of the file, or an address, "sha256", "media_type", "width", "height", "caption", "page", "box", "line"}
    table   {"rows": [[cell, ...], ...], "caption", "page", "box", "line"}

All but `path` (image) and `rows` (table) may be absent. `page` counts from 1; `box` is [left, bottom, right, top] in points of that page; `line` is the number
of the text's line (from 0) that the part stands before. What is in a table also stands in the text, a line a row, cells between ` | `.

Steps that take lines out of a text need not care: `realign` moves `line` along.
"""
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

TEXTS = ("path", "sha256", "media_type", "caption")
NUMBERS = ("width", "height", "page", "line")
MEDIA = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif", b"BM": "image/bmp", b"RIFF": "image/webp",
         b"II*\x00": "image/tiff", b"MM\x00*": "image/tiff"}
ENDINGS = {"image/png": "png", "image/jpeg": "jpg", "image/gif": "gif", "image/bmp": "bmp", "image/webp": "webp", "image/tiff": "tif"}


def image(path: str, **known: Any) -> dict:
    """An image; what is None is left out."""
    return {"path": path, **{name: value for name, value in known.items() if value is not None}}


def table(rows: Sequence[Sequence[str]], **known: Any) -> dict:
    return {"rows": [list(row) for row in rows], **{name: value for name, value in known.items() if value is not None}}


def table_text(rows: Sequence[Sequence[str]]) -> str:
    """A table as lines of text; empty rows are left out."""
    return "\n".join(" | ".join(" ".join(cell.split()) for cell in row) for row in rows if any(cell.strip() for cell in row))


def media_type(content: bytes) -> str | None:
    """Of an image, by its first bytes; None for what is none that we know."""
    return next((name for mark, name in MEDIA.items() if content.startswith(mark)), None)


def size(content: bytes) -> tuple[int, int] | None:
    """(width, height) of a PNG, JPEG or GIF; None of others and of damaged ones."""
    if content.startswith(b"\x89PNG") and len(content) >= 24:
        return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")
    if content.startswith(b"GIF8") and len(content) >= 10:
        return int.from_bytes(content[6:8], "little"), int.from_bytes(content[8:10], "little")
    at = 2
    while content.startswith(b"\xff\xd8") and at + 9 <= len(content) and content[at] == 0xFF:
        kind, length = content[at + 1], int.from_bytes(content[at + 2 : at + 4], "big")
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(content[at + 7 : at + 9], "big"), int.from_bytes(content[at + 5 : at + 7], "big")
        at += 2 + length
    return None


def problems(metadata: Mapping[str, Any]) -> list[str]:
    """What is wrong with a document's parts, as words that name the place and none of its text."""
    found = []
    for group, needs in (("images", "path"), ("tables", "rows")):
        parts = metadata.get(group, [])
        if not isinstance(parts, list):
            found.append(f"{group} is no list")
            continue
        for number, part in enumerate(parts):
            found += [f"{group}[{number}] {reason}" for reason in _wrong(part, needs)]
    return found


def _wrong(part: object, needs: str) -> list[str]:
    if not isinstance(part, Mapping) or needs not in part:
        return [f"has no {needs}"]
    found = [f"{name} is no text" for name in TEXTS if name in part and not isinstance(part[name], str)]
    found += [f"{name} is no number of at least 0" for name in NUMBERS if name in part and not (type(part[name]) is int and part[name] >= 0)]
    box = part.get("box")
    if box is not None and not (isinstance(box, list) and len(box) == 4 and all(isinstance(one, int | float) for one in box)):
        found.append("box is not four numbers")
    rows = part.get("rows")
    if rows is not None and not (isinstance(rows, list) and all(isinstance(row, list) and all(isinstance(cell, str) for cell in row) for row in rows)):
        found.append("rows are not lists of texts")
    return found


def realign(metadata: Mapping[str, Any], before: str, after: str) -> None:
    """Moves `line` of the parts to where their line is after a step changed the text from `before` to `after`."""
    parts = [part for group in ("images", "tables") for part in metadata.get(group, ()) if "line" in part]
    if not parts or before.count("\n") == after.count("\n"):
        return
    old, new = before.split("\n"), after.split("\n")
    places = [0] * (len(old) + 1)
    for _, start, stop, begin, end in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        for line in range(start, stop):
            places[line] = min(begin + line - start, end)
    places[len(old)] = len(new)
    for part in parts:
        part["line"] = places[min(part["line"], len(old))]
