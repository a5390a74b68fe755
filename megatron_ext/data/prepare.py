"""Text to a prepared directory: documents -> splits by hash -> tokenizer -> one indexed dataset a split.

The input is read two or three times instead of held: once for its hash and the sizes, once to train a tokenizer (unless one is
given), once to tokenise. Everything is written to a temporary directory beside the output and renamed at the end, so a crash leaves
nothing that looks complete. Called by one process, before ranks start.
"""
import hashlib
import json
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Protocol

from megatron_ext import __version__
from megatron_ext.config.schema import DataConfig
from megatron_ext.data.directories import publish, temporary
from megatron_ext.data.prepared import FILE, FORMAT, SPLITS, Prepared, Split, describe_files, split_fields
from megatron_ext.data.progress import Progress
from megatron_ext.data.read import BadRecords
from megatron_ext.data.source import Source, open_source
from megatron_ext.data.split import check_split, document_digest, split_of
from megatron_ext.data.tokenizer import Tokenizer, tokenizer_file, train_tokenizer
from megatron_ext.errors import UserError

TRAINING_BYTES = 1 << 28  # text a tokenizer is trained on: 256 MiB, evenly drawn by hash from a larger training split


@dataclass(frozen=True)
class _Scan:
    """What the first reading found."""

    corpus_sha256: str
    documents: dict[str, int]
    bytes: dict[str, int]
    bad: BadRecords


class Beside(Protocol):
    """More to be written into a prepared directory. `identity` says what it is of: another one is another directory."""

    @property
    def identity(self) -> str: ...

    def write(self, directory: Path, fractions: tuple[float, ...]) -> dict:
        """Called when the tokens are in `directory`; what prepared.json is to say, under `curation`."""
        ...


def prepare(data: DataConfig, input: str | None, output: str | Path, progress: bool | None = None, beside: Beside | None = None) -> Prepared:
    """Prepares `input` into the directory `output`, or finds it there already.

    Args:
        data: `corpus` (when input is None), `tokenizer` or `vocab_size`, `split`, `text_key`, `max_bad_lines`, `workers`.
        input: file or folder; None = the embedded corpus.
        output: directory to write; one that was prepared from the same input with the same settings is taken as it is.
        progress: bars on stderr; None = only on a terminal.
        beside: writes more files into the directory.

    Raises:
        UserError: bad input or settings, or an `output` that holds something else.
    """
    output, fractions = Path(output), check_split(data.split)
    bars, source = Progress(progress), open_source(data, input)
    given = Tokenizer.from_file(data.tokenizer) if data.tokenizer else None
    settings = {
        "split": list(fractions),
        "text_key": source.text_key,
        "tokenizer": given.sha256 if given else f"byte-level BPE, {data.vocab_size}",
    } | ({} if beside is None else {"curation": beside.identity})
    existing = _existing(output, settings)
    if existing is not None and existing.fields["corpus"]["fingerprint"] == source.fingerprint:
        return existing
    scan = _scan(source, fractions, data.max_bad_lines, bars)
    if existing is not None:
        if existing.corpus_sha256 != scan.corpus_sha256:
            raise UserError("output", output, "was prepared from other text; give another directory or remove this one")
        return existing

    try:
        made = temporary(output)
    except OSError as error:
        raise UserError("output", output, f"cannot be written: {error.strerror}") from error
    try:
        content = tokenizer_file(data.tokenizer).read_bytes() if given else _train(source, fractions, scan, data, bars)
        (made / "tokenizer.json").write_bytes(content)
        tokenizer = Tokenizer.from_bytes(content)
        lossless = tokenizer.lossless(text[:10_000] for text in islice(source.documents(bad=BadRecords(data.max_bad_lines)), 64))
        splits = _tokenize(source, fractions, scan, tokenizer, made, data, bars)
        fields = {
            "format": FORMAT,
            "corpus": {
                "name": source.name, "sha256": scan.corpus_sha256, "fingerprint": source.fingerprint,
                "documents": sum(scan.documents.values()), "bytes": sum(scan.bytes.values()),
                "bad_records": scan.bad.count, "bad_places": scan.bad.places, "skipped_files": source.skipped_files,
            },
            "settings": settings,
            "tokenizer": {
                "sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size, "eod": tokenizer.eod, "eod_text": tokenizer.eod_text,
                "lossless": lossless,  # on a sample of the documents
            },
            "splits": split_fields(splits),
            **({} if beside is None else {"curation": beside.write(made, fractions)}),
            "files": describe_files(made),
            "versions": _versions(),
        }
        (made / FILE).write_text(json.dumps(fields, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        if not publish(made, output):  # another process was first: the same text and settings give the same tokens
            existing = _existing(output, settings)
            if existing is None or existing.corpus_sha256 != scan.corpus_sha256:
                raise UserError("output", output, "was written by another process meanwhile, from other text; give another directory")
            return existing
    except OSError as error:  # a full disk; what concerns the input is a UserError already
        raise UserError("output", output, f"cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return Prepared.load(output, key="output")


def _existing(output: Path, settings: dict) -> Prepared | None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    if not (output / FILE).exists():
        raise UserError("output", output, "exists and was not made by `prepare`; give another directory or an empty one")
    prepared = Prepared.load(output, key="output")
    theirs = prepared.fields.get("settings", {})
    changed = [f"{name} {theirs.get(name)!r} there, {value!r} asked for" for name, value in settings.items() if theirs.get(name) != value]
    if changed:
        raise UserError("output", output, f"was prepared with other settings ({'; '.join(changed)}); give another directory or remove this one")
    return prepared


def _scan(source: Source, fractions: tuple[float, ...], max_bad: int, bars: Progress) -> _Scan:
    corpus, bad = hashlib.sha256(), BadRecords(max_bad)
    documents, sizes = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    with bars.bytes("reading", source.size) as bar:
        for text in source.documents(bad=bad, read=bar.update):
            content = text.encode("utf-8")
            digest = hashlib.sha256(content).digest()
            corpus.update(digest)
            split = split_of(digest, fractions)
            documents[split] += 1
            sizes[split] += len(content)
    total = sum(documents.values())
    if total == 0:
        raise UserError("input", source.name, f"holds no text ({bad.count} unreadable records, the rest empty)")
    if documents["train"] == 0:
        raise UserError(
            "data.split", list(fractions),
            f"a hash of each document decides its split, and none of {total} documents falls to train; give more documents (a text file is one), or data.split=[1,0,0]",
        )
    return _Scan(corpus.hexdigest(), documents, sizes, bad)


def _train(source: Source, fractions: tuple[float, ...], scan: _Scan, data: DataConfig, bars: Progress) -> bytes:
    share = min(1.0, TRAINING_BYTES / scan.bytes["train"])

    def texts() -> Iterator[str]:
        with bars.bytes("training the tokenizer", source.size) as bar:
            for text in source.documents(bad=BadRecords(data.max_bad_lines), read=bar.update):
                digest = document_digest(text)
                # bits of the hash that the split does not use
                if split_of(digest, fractions) == "train" and int.from_bytes(digest[8:16], "big") < share * 2**64:
                    yield text

    return train_tokenizer(texts(), vocab_size=data.vocab_size, progress=bars.shown)


def _tokenize(
    source: Source, fractions: tuple[float, ...], scan: _Scan, tokenizer: Tokenizer, directory: Path, data: DataConfig, bars: Progress
) -> dict[str, Split]:
    from megatron_ext.data.tokenize import SplitWriters, encoded

    corpus = hashlib.sha256()

    def documents() -> Iterator[tuple[str, str]]:
        with bars.bytes("tokenising", source.size) as bar:
            for text in source.documents(bad=BadRecords(data.max_bad_lines), read=bar.update):
                digest = document_digest(text)
                corpus.update(digest)
                yield split_of(digest, fractions), text

    with SplitWriters(directory, vocab_size=tokenizer.vocab_size) as writers:
        for split, document in encoded(documents(), directory / "tokenizer.json", workers=data.workers, size=source.size):
            writers.add(split, document)
    if corpus.hexdigest() != scan.corpus_sha256:
        raise UserError("input", source.name, "changed while it was read; start again when nothing writes to it")
    return {
        name: Split(directory / name, scan.documents[name], writers.tokens[name], scan.bytes[name]) for name in SPLITS
    }


def _versions() -> dict[str, str]:
    found = {"megatron_ext": __version__, "python": platform.python_version()}
    for package in ("tokenizers", "megatron-core", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # an unusual installation, found on the path only
            found[package] = "unknown"
    return found
