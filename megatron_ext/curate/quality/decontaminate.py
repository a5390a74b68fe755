"""Evaluation sets must not be in the training data: n-grams of their texts are looked for in each document.

    Index.of_texts(texts)          every string of every record of evaluation files -> hashes of n-grams
    index.hits(text)               which characters of a text stand in such an n-gram

An n-gram is so many characters in a row of the text's letters and digits (text.solid): spacing, line breaks, punctuation and case do not
count. GPT-3 took 13 words, fewer for shorter texts down to 8 (Brown et al. 2020, appendix C). 50 characters are about 11 English words. Of
a text that is shorter the next of SIZES that fits is taken, and a text below the
last one is left out: "yes", "서울" and answers of that kind are in every corpus and prove nothing. Korean carries about twice as much in a
character: the numbers are halved where a third of a text's letters are Hangul.

The hash of an n-gram has 64 bits; the index is a sorted array. A wrong hit among 10^7 n-grams of evaluation has probability 5 * 10^-13 a
character.
"""
import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from megatron_ext.curate import arrays
from megatron_ext.curate.quality.hashing import windows, windows_of
from megatron_ext.curate.quality.text import code_points, is_korean, solid
from megatron_ext.data.decompress import file_chunks
from megatron_ext.errors import UserError

SIZES = {False: (50, 40, 30), True: (25, 20, 15)}  # by is_korean
FORMAT = "megatron_ext.decontaminate/1"
READABLE = (".jsonl", ".ndjson", ".json", ".yaml", ".yml", ".csv", ".tsv", ".parquet", ".txt")


@dataclass(frozen=True)
class IndexSettings:
    """`index inputs=PATH,PATH output=FILE`: files of evaluation sets, held-out records of SFT and reward data, or folders of them."""

    inputs: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class Index:
    """N-grams of evaluation texts.

    Attributes:
        hashes: by length of n-gram, uint64 sorted.
        about: files, texts, n-grams.
    """

    hashes: dict[int, np.ndarray]
    about: dict

    @classmethod
    def of_texts(cls, texts: Iterable[str], about: dict | None = None) -> "Index":
        found: dict[int, list[np.ndarray]] = {}
        count = short = 0
        for text in texts:
            letters = code_points(solid(text))
            size = next((one for one in SIZES[is_korean(text)] if one <= len(letters)), None)
            count += 1
            if size is None:
                short += 1
                continue
            found.setdefault(size, []).append(windows(letters, size))
        hashes = {size: np.unique(np.concatenate(parts)) for size, parts in sorted(found.items())}
        return cls(hashes, {**(about or {}), "texts": count, "too_short": short, "ngrams": sum(map(len, hashes.values()))})

    def hits(self, text: str) -> np.ndarray:
        """Places among the letters and digits of the text where an n-gram of evaluation begins, with its length: int64 [hits, 2], in
        order."""
        letters = code_points(solid(text))
        found = [np.zeros((0, 2), dtype=np.int64)]
        for size, hashes in windows_of(letters, self.hashes).items():
            known = self.hashes[size]
            if not len(hashes):
                continue
            places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
            at = np.flatnonzero(known[places] == hashes)
            found.append(np.stack([at, np.full(len(at), size)], axis=1))
        hits = np.concatenate(found)
        return hits[np.lexsort((hits[:, 1], hits[:, 0]))]

    def save(self, path: str | Path) -> None:
        arrays.save(path, {**self.about, "sizes": list(self.hashes)}, {f"hashes_{size}": one for size, one in self.hashes.items()}, format=FORMAT)

    @classmethod
    def load(cls, path: str | Path, *, key: str = "curate.quality.decontaminate.index") -> "Index":
        """Raises UserError: not there, or not an index of this format."""
        with arrays.opened(path, format=FORMAT, key=key, kind="index", command="python -m megatron_ext.curate.quality index") as (about, file):
            return cls({size: file[f"hashes_{size}"] for size in about["sizes"]}, about)


def cut(text: str, hits: np.ndarray, *, margin: int) -> list[str]:
    """What is left of a text when the passages of `hits` go with `margin` characters on either side: pieces in order, empty ones left
    out."""
    letters = _letter_places(text)
    gone = np.zeros(len(text) + 1, dtype=np.int64)
    for place, size in hits.tolist():
        gone[max(letters[place] - margin, 0)] += 1
        gone[min(letters[place + size - 1] + 1 + margin, len(text))] -= 1
    inside = np.cumsum(gone)[:-1] > 0
    edges = np.flatnonzero(np.diff(np.concatenate(([True], inside, [True])).astype(np.int8)))
    pieces = [text[start:end].strip() for start, end in edges.reshape(-1, 2).tolist()]
    return [piece for piece in pieces if solid(piece)]


def _letter_places(text: str) -> np.ndarray:
    """For each character of `solid(text)` the character of `text` that it comes from. One character may fold to several, or none.

    Folding a character alone and in its text differ where marks combine across characters; text is NFC, so this is rare, and then the
    nearest place is taken.
    """
    places = [at for at, character in enumerate(text) for _ in solid(character)]
    wanted = len(solid(text))
    return np.asarray((places + [len(text) - 1] * wanted)[:wanted], dtype=np.int64)


def strings(path: Path) -> Iterator[str]:
    """Every string value of every record of a file, lists of chat messages and their contents too.

    Raises:
        UserError: a kind that cannot be read, or a damaged file.
    """
    kind = _kind(path)
    if kind is None:
        raise UserError("inputs", path, f"cannot be read; kinds are {', '.join(READABLE)} (text kinds also with .gz or .zst)")
    try:
        if kind == ".parquet":
            import pyarrow.parquet

            for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
                yield from _strings(batch.to_pylist())
            return
        with io.TextIOWrapper(io.BytesIO(b"".join(file_chunks(path))), encoding="utf-8-sig", newline="") as file:
            if kind in (".jsonl", ".ndjson"):
                for line in file:
                    yield from _strings(json.loads(line) if line.strip() else None)
            elif kind == ".json":
                yield from _strings(json.load(file))
            elif kind in (".yaml", ".yml"):
                yield from _strings(yaml.safe_load(file))
            elif kind == ".txt":
                yield file.read()
            else:
                for row in csv.reader(file, delimiter="\t" if kind == ".tsv" else ","):
                    yield from row
    except UserError as error:  # of the packing
        raise UserError("inputs", path, error.reason) from error
    except (OSError, ValueError, EOFError, csv.Error, yaml.YAMLError) as error:
        raise UserError("inputs", path, f"cannot be read as {kind} ({type(error).__name__})") from error


def _kind(path: Path) -> str | None:
    """One of READABLE, by the name without .gz and .zst."""
    packed = path.suffix.lower() in (".gz", ".zst")
    kind = Path(path.stem if packed else path.name).suffix.lower()
    return kind if kind in READABLE and not (packed and kind == ".parquet") else None


def _strings(value) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _strings(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _strings(one)


def index(settings: IndexSettings) -> None:
    """The command. Raises UserError where a path is not there, or nothing that can be looked for is in the files."""
    files = []
    for name in settings.inputs:
        path = Path(name)
        if not path.exists():
            raise UserError("inputs", name, "is not there")
        inside = sorted(one for one in path.rglob("*") if one.is_file() and _kind(one) is not None)
        files += inside if path.is_dir() else [path]
    made = Index.of_texts((text for path in files for text in strings(path)), {"files": [path.name for path in files]})
    if not made.about["ngrams"]:
        raise UserError("inputs", ",".join(settings.inputs), "no text long enough to look for")
    Path(settings.output).parent.mkdir(parents=True, exist_ok=True)
    made.save(settings.output)
    print(f"wrote {settings.output}: {made.about['ngrams']:,} n-grams of {made.about['texts']:,} texts in {len(files)} files "
          f"({made.about['too_short']:,} texts are too short to look for)")
