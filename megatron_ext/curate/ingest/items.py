"""What readers give: documents as they lie in a file, and places that could not be read."""
import hashlib
import importlib
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from megatron_ext.errors import UserError

EXTRA = "pip install 'megatron-ext[curate]'"


@dataclass(frozen=True)
class Item:
    """One document of a file.

    Attributes:
        text: as read; `normalise` does the rest.
        sha256: of the raw bytes of this document: the file's, or the record's.
        position: inside the file; "" where the file is the document. It must not depend on what else was readable.
        metadata: what the file itself says: title, date, language, domain, licence, owner, derived_from.
        images, tables: parts.py. pictures: content of images, by their sha256; only where images are wanted.
    """

    text: str
    sha256: str
    position: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    images: tuple[dict, ...] = ()
    tables: tuple[dict, ...] = ()
    pictures: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """A record that could not be read, or a part of a file. `reason` holds no text of it."""

    position: str
    reason: str


class Unreadable(Exception):
    """A whole file cannot be read. The reason is a short sentence without text of the file."""

    def __init__(self, reason: str):
        self.reason = reason
        super().__init__(reason)

    def __reduce__(self):
        return type(self), (self.reason,)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def needed(module: str, what: str) -> ModuleType:
    """An optional package. Raises UserError with the line that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError("curate", what, f"needs the package {module.split('.')[0]}, which cannot be imported ({type(error).__name__}): {EXTRA}") from None
