"""From the configuration to the samples of each split."""
import hashlib
import json
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_ext.config.schema import DataConfig
from megatron_ext.data.blend import Blend
from megatron_ext.data.index import TokenFile
from megatron_ext.data.prepare import prepare
from megatron_ext.data.prepared import FILE, SPLITS, Prepared
from megatron_ext.data.samples import BlendedSamples, IndexedSamples, Masking, Samples
from megatron_ext.data.subset import split_documents
from megatron_ext.data.tokenizer import Tokenizer, tokenizer_file
from megatron_ext.errors import UserError


def default_directory(data: DataConfig) -> Path:
    """Where the embedded corpus lies prepared when neither `data.path` nor `data.paths` is given: one directory a Python and set of settings."""
    tokenizer = Tokenizer.from_file(data.tokenizer).sha256 if data.tokenizer else data.vocab_size
    settings = hashlib.sha256(json.dumps([tokenizer, list(data.split)]).encode()).hexdigest()[:8]
    return Path(data.cache) / f"{data.corpus}-py{platform.python_version()}-{settings}"


def ensure_prepared(data: DataConfig, progress: bool | None = None) -> None:
    """Does what `build_datasets` needs done once, by one process before the ranks start: prepares the embedded corpus if that is what
    is asked for, and splits Megatron files. Instant when done already.

    Raises:
        UserError: as `prepare` and `build_datasets`.
    """
    if not _inputs(data):
        prepare(data, None, default_directory(data), progress)
    for path in data.paths:
        if not (Path(path) / FILE).exists():
            split_documents(TokenFile(path), data.split, cache=data.cache, progress=progress)


def dataset_tokenizer(data: DataConfig) -> tuple[Path, Tokenizer]:
    """The one tokenizer of all that `data` names, and its file.

    Raises:
        UserError: none given, or several different ones.
    """
    found: dict[str, tuple[Path, Tokenizer]] = {}
    if data.tokenizer:
        path = tokenizer_file(data.tokenizer)
        tokenizer = Tokenizer.from_file(path)
        found[tokenizer.sha256] = path, tokenizer
    for path in _inputs(data) or [default_directory(data)]:
        if (Path(path) / FILE).exists():
            prepared = Prepared.load(path)
            if prepared.tokenizer_sha256 not in found:
                found[prepared.tokenizer_sha256] = prepared.tokenizer_path, Tokenizer.from_file(prepared.tokenizer_path)
    if not found:
        if not _inputs(data):
            raise UserError("data.path", None, f"the embedded corpus is not prepared in {default_directory(data)}; `prepare output=DIR` does it")
        raise UserError("data.tokenizer", None, "Megatron files do not hold their tokenizer; give its tokenizer.json")
    if len(found) > 1:
        raise UserError("data.tokenizer", data.tokenizer, f"these use different tokenizers: {', '.join(str(path) for path, _ in found.values())}")
    return next(iter(found.values()))


def build_datasets(data: DataConfig, splits: Sequence[str] = ("train", "validation")) -> dict[str, Samples]:
    """The samples of each split: of `data.path`, of the blend of `data.paths`, or of the prepared embedded corpus.

    `train` comes in a new order each epoch; the other splits always in that of their first (so that the first n samples of validation are the
    same text each time, and a fair draw).

    Raises:
        UserError: missing, damaged or contradictory data; too little of it.
    """
    for split in splits:
        if split not in SPLITS:
            raise UserError("split", split, f"one of {', '.join(SPLITS)}")
    if data.sequence_length < 1:
        raise UserError("data.sequence_length", data.sequence_length, "at least 1 token")
    inputs = _inputs(data) or [str(default_directory(data))]
    if data.weights and len(data.weights) != len(inputs):
        raise UserError("data.weights", list(data.weights), f"{len(data.weights)} weights for {len(inputs)} paths; one each, or none at all")
    _, tokenizer = dataset_tokenizer(data)
    return {split: _build(data, split, inputs, tokenizer) for split in splits}


def _inputs(data: DataConfig) -> list[str]:
    if data.path and data.paths:
        raise UserError("data.paths", list(data.paths), "give data.path or data.paths, not both")
    return [data.path] if data.path else list(data.paths)


def _build(data: DataConfig, split: str, inputs: list[str], tokenizer: Tokenizer) -> Samples:
    parts = [_one(data, split, path, number, tokenizer) for number, path in enumerate(inputs)]
    if len(parts) == 1:
        return parts[0]
    weights = data.weights or [part.tokens for part in parts]
    return BlendedSamples(parts, Blend(weights, names=inputs, seed=data.seed))


def _one(data: DataConfig, split: str, path: str, number: int, tokenizer: Tokenizer) -> IndexedSamples:
    key = "data.path" if data.path else "data.paths"
    documents = None
    if Path(path).is_dir():
        prepared = Prepared.load(path, key=key)
        facts = prepared.splits[split]
        if facts.documents == 0:
            raise UserError(key, path, f"its {split} split has no documents (of {prepared.fields['corpus']['documents']}; a text file is one): prepare more of them, or other data.split")
        file, bytes_per_token = TokenFile(facts.prefix, key=key), facts.bytes_per_token
    else:
        file = TokenFile(path, key=key)
        documents = split_documents(file, data.split, cache=data.cache)[split]
        bytes_per_token = _bytes_per_token(file, documents, tokenizer)
    return IndexedSamples(
        file, documents=documents, name=f"{path} ({split})", sequence_length=data.sequence_length,
        seed=data.seed if number == 0 else f"{data.seed}.{number}",  # the same file twice in a blend is not in lockstep
        reshuffle=split == "train", vocab_size=tokenizer.vocab_size, eod=tokenizer.eod, bytes_per_token=bytes_per_token,
        masking=Masking(data.reset_positions, data.reset_attention, data.mask_eod_loss),
    )


def _bytes_per_token(file: TokenFile, documents: np.ndarray, tokenizer: Tokenizer, *, about: int = 1 << 18) -> float | None:
    """Measured by decoding about that many tokens of the first documents; None if there are none."""
    tokens = size = 0
    for document in documents:
        ids = file.read(int(document), 0, min(int(file.lengths[document]), about))
        size += len(tokenizer.decode(ids[ids != tokenizer.eod].tolist()).encode("utf-8"))
        tokens += len(ids)
        if tokens >= about:
            break
    return size / tokens if tokens else None
