"""The documents of a Megatron `.bin`/`.idx` that belong to each split, by a hash of their tokens, worked out once and cached.

As `split.py` does for text: u = sha256(tokens as little-endian int32), so the same tokens in a file of another type fall to the same split.
"""
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_ext.data.index import TokenFile
from megatron_ext.data.prepared import SPLITS
from megatron_ext.data.progress import Progress
from megatron_ext.data.split import check_split, split_of
from megatron_ext.errors import UserError
from megatron_ext.files import whole


def split_documents(file: TokenFile, split: Sequence[float], *, cache: str | Path, progress: bool | None = None) -> dict[str, np.ndarray]:
    """Document numbers of each split, int64, ascending.

    Args:
        file: the tokens.
        split: fractions of train, validation, test.
        cache: directory; the result is kept there under the file's path, size and time of modification.
        progress: bar on stderr; None = only on a terminal.

    Raises:
        UserError: bad fractions; cache that cannot be written.
    """
    fractions = check_split(split)
    path = Path(cache) / "splits" / f"{_key(file, fractions)}.npy"
    try:
        codes = np.load(path, allow_pickle=False)
        if codes.shape == (file.documents,) and codes.dtype == np.uint8:
            return _by_name(codes)
    except (OSError, ValueError, EOFError):
        pass  # not there, or damaged: it is only a cache
    codes = np.empty(file.documents, dtype=np.uint8)
    with Progress(progress).items(f"splitting {file.prefix.name}", file.documents, "documents") as bar:
        for document in range(file.documents):
            digest = hashlib.sha256(file.read(document).astype("<i4").tobytes()).digest()
            codes[document] = SPLITS.index(split_of(digest, fractions))
            bar.update(1)
    _write(path, codes)
    return _by_name(codes)


def _by_name(codes: np.ndarray) -> dict[str, np.ndarray]:
    return {name: np.flatnonzero(codes == code) for code, name in enumerate(SPLITS)}


def _key(file: TokenFile, fractions: tuple[float, ...]) -> str:
    facts: list = [list(fractions)]
    for suffix in (".idx", ".bin"):
        path = file.prefix.with_name(file.prefix.name + suffix)
        status = path.stat()
        facts.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _write(path: Path, codes: np.ndarray) -> None:
    try:
        with whole(path, sync=False) as stream:  # ranks of other nodes write the same file at this moment
            np.save(stream, codes, allow_pickle=False)
    except OSError as error:
        raise UserError("data.cache", path.parent, f"cannot be written: {error.strerror}") from error
