"""Where documents come from, readable any number of times: the embedded corpus, or what a path holds."""
import hashlib
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.config.schema import DataConfig
from megatron_ext.data.corpus import stdlib_documents, stdlib_files
from megatron_ext.data.definitions import doc_documents
from megatron_ext.data.read import BadRecords, find_files, fingerprint, read_documents
from megatron_ext.errors import UserError

# Each gives its documents, and may call `read` with the size of what it took from disk.
CORPORA: dict[str, Callable[..., Iterator[str]]] = {"stdlib": stdlib_documents, "stdlib-docs": doc_documents}


@dataclass(frozen=True)
class Source:
    """Documents of one input.

    Attributes:
        name: for messages and reports.
        fingerprint: the same one means the same documents, without reading them.
        size: bytes on disk.
        corpus: the embedded one, None = `files`.
        skipped_files: in a folder, of kinds that are not readable.
    """

    name: str
    fingerprint: str
    size: int
    files: tuple[Path, ...]
    corpus: str | None
    text_key: str
    skipped_files: int = 0

    def documents(self, *, bad: BadRecords, read: Callable[[int], None] = lambda size: None) -> Iterator[str]:
        if self.corpus is None:
            return read_documents(list(self.files), text_key=self.text_key, bad=bad, read=read)
        return CORPORA[self.corpus](read=read)


def open_source(data: DataConfig, path: str | None) -> Source:
    """The documents at `path`, or those of `data.corpus` when there is none.

    Raises:
        UserError: unknown corpus, nothing readable at `path`.
    """
    if path is None:
        if data.corpus not in CORPORA:
            raise UserError("data.corpus", data.corpus, f"known are {', '.join(CORPORA)}; other text comes by input=PATH")
        files = stdlib_files()
        python = f"{platform.python_implementation()} {platform.python_version()}"
        return Source(
            name=f"{'documentation of the ' if data.corpus == 'stdlib-docs' else ''}standard library of {python}",
            fingerprint=hashlib.sha256(f"{data.corpus} {python}\0{fingerprint(files)}".encode()).hexdigest(),
            size=sum(file.stat().st_size for file in files), files=tuple(files), corpus=data.corpus, text_key="",
        )
    files, passed_over = find_files(Path(path))
    return Source(
        name=str(path), fingerprint=fingerprint(files), size=sum(file.stat().st_size for file in files), files=tuple(files),
        corpus=None, text_key=data.text_key, skipped_files=len(passed_over),
    )
