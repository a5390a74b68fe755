"""A prepared directory: what `prepare` wrote and every later stage reads. No torch, no numpy.

    tokenizer.json      the tokenizer of these tokens
    train.bin, .idx     one megatron-core indexed dataset a split (none for a split without documents)
    prepared.json       sizes, hashes, settings and versions
"""
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_ext.errors import UserError

FILE = "prepared.json"
FORMAT = "megatron_ext.prepared/1"
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """One split: `prefix` of its .bin and .idx; `tokens` count one end-of-document token a document, `bytes` are those of the text (UTF-8)."""

    prefix: Path
    documents: int
    tokens: int
    bytes: int

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens


@dataclass(frozen=True)
class Prepared:
    directory: Path
    tokenizer_path: Path
    tokenizer_sha256: str
    vocab_size: int
    eod: int  # id of the end-of-document token
    corpus_sha256: str  # of the documents' sha256, in order
    splits: dict[str, Split]
    fields: dict  # all of prepared.json

    @classmethod
    def load(cls, directory: str | Path, *, key: str = "data.path", verify: bool = False) -> "Prepared":
        """Reads and checks a prepared directory.

        Args:
            directory: as written by `prepare`.
            key: what to call it in messages.
            verify: read every file and compare its sha256 (else: sizes, and the tokenizer's sha256).

        Raises:
            UserError: not there, not complete, or changed since it was written.
        """
        directory = Path(directory)
        fields = _read_fields(directory, key)
        try:
            tokenizer, split_fields = fields["tokenizer"], fields["splits"]
            splits = {
                name: Split(directory / name, *(int(split_fields[name][field]) for field in ("documents", "tokens", "bytes")))
                for name in SPLITS
            }
            prepared = cls(
                directory=directory,
                tokenizer_path=directory / "tokenizer.json",
                tokenizer_sha256=tokenizer["sha256"],
                vocab_size=int(tokenizer["vocab_size"]),
                eod=int(tokenizer["eod"]),
                corpus_sha256=fields["corpus"]["sha256"],
                splits=splits,
                fields=fields,
            )
            recorded = {name: (int(file["size"]), str(file["sha256"])) for name, file in fields["files"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(key, directory, f"{FILE} is damaged ({type(error).__name__}: {error}); prepare it anew") from error
        for name, (size, sha256) in recorded.items():
            if Path(name).name != name:
                raise UserError(key, directory, f"{FILE} names a file outside the directory; prepare it anew")
            _check_file(directory / name, size, sha256 if verify or name == "tokenizer.json" else None, key)
        return prepared

    def describe(self) -> str:
        """What a person wants to know of it, a few lines; places of bad records, never text."""
        corpus, tokenizer = self.fields["corpus"], self.fields["tokenizer"]
        found = [
            f"{self.directory}: {corpus['documents']:,} documents, {corpus['bytes']:,} bytes of {corpus['name']}, sha256 {self.corpus_sha256[:16]}",
            *(
                f"  {name:<10}  {split.documents:,} documents, {split.tokens:,} tokens, {split.bytes / max(split.tokens, 1):.2f} bytes a token"
                for name, split in self.splits.items()
            ),
            f"  tokenizer   {self.vocab_size:,} tokens, end of document {tokenizer['eod_text']}",
        ]
        if not tokenizer["lossless"]:
            found.append("  note: this tokenizer does not give text back byte for byte (it normalises)")
        if corpus["skipped_files"]:
            found.append(f"  note: {corpus['skipped_files']} files of other kinds were passed over")
        if corpus["bad_records"]:
            found.append(f"  note: {corpus['bad_records']} unreadable records were skipped:")
            found.extend(f"    {place}" for place in corpus["bad_places"])
        return "\n".join(found)


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def describe_files(directory: Path) -> dict[str, dict]:
    """Size and sha256 of each file of a directory that is about to become a prepared one."""
    return {path.name: {"size": path.stat().st_size, "sha256": file_sha256(path)} for path in sorted(directory.iterdir())}


def split_fields(splits: dict[str, Split]) -> dict[str, dict]:
    """What prepared.json says of each split."""
    return {name: {field: value for field, value in asdict(split).items() if field != "prefix"} for name, split in splits.items()}


def _read_fields(directory: Path, key: str) -> dict:
    if not directory.is_dir():
        raise UserError(key, directory, "no such directory; `prepare input=PATH output=DIR` makes one")
    try:
        fields = json.loads((directory / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(key, directory, f"not a prepared directory (no {FILE}); `prepare input=PATH output=DIR` makes one") from None
    except (OSError, ValueError) as error:
        raise UserError(key, directory, f"{FILE} cannot be read ({error}); prepare it anew") from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise UserError(key, directory, f"{FILE} is not of the format {FORMAT}; prepare it anew")
    return fields


def _check_file(path: Path, size: int, sha256: str | None, key: str) -> None:
    if not path.is_file():
        raise UserError(key, path, "this file of the prepared directory is missing; prepare it anew")
    if path.stat().st_size != size:
        raise UserError(key, path, f"has {path.stat().st_size} bytes where {size} were written; prepare it anew")
    if sha256 is not None and file_sha256(path) != sha256:
        raise UserError(key, path, "changed since it was written (its sha256 differs); prepare it anew")
