"""Where documents come from, readable any number of times: the embedded corpus, or what a path holds."""
import hashlib
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.config.schema import DataConfig
from megatron_ext.data.corpus import stdlib_documents, stdlib_files
from megatron_ext.data.read import BadRecords, find_files, fingerprint, read_documents
from megatron_ext.errors import UserError

CORPORA = ("stdlib",)


@dataclass(frozen=True)
class Source:
    """Documents of one input.

    Attributes:
        name: for messages and reports.
        fingerprint: the same one means the same documents, without reading them.
        size: bytes on disk.
        skipped_files: in a folder, of kinds that are not readable.
    """

    name: str
    fingerprint: str
    size: int
    files: tuple[Path, ...]
    embedded: bool
    text_key: str
    skipped_files: int = 0

    def documents(self, *, bad: BadRecords, read: Callable[[int], None] = lambda size: None) -> Iterator[str]:
        if not self.embedded:
            yield from read_documents(list(self.files), text_key=self.text_key, bad=bad, read=read)
            return
        for text in stdlib_documents():
            read(len(text))
            yield text


def open_source(data: DataConfig, path: str | None) -> Source:
    """The documents at `path`, or those of `data.corpus` when there is none.

    Raises:
        UserError: unknown corpus, nothing readable at `path`.
    """
    if path is None:
        if data.corpus not in CORPORA:
            raise UserError("data.corpus", data.corpus, f"known are {', '.join(CORPORA)}; other text comes by input=PATH")
        files = stdlib_files()
        stamp = hashlib.sha256(f"{platform.python_implementation()} {platform.python_version()}\0{fingerprint(files)}".encode()).hexdigest()
        return Source(
            name=f"standard library of {platform.python_implementation()} {platform.python_version()}",
            fingerprint=stamp, size=sum(file.stat().st_size for file in files), files=tuple(files), embedded=True, text_key="",
        )
    files, passed_over = find_files(Path(path))
    return Source(
        name=str(path), fingerprint=fingerprint(files), size=sum(file.stat().st_size for file in files), files=tuple(files),
        embedded=False, text_key=data.text_key, skipped_files=len(passed_over),
    )
