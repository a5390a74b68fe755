"""Tokenisation at speed, and the indexed datasets it fills.

The library encodes a batch on all cores by itself; what remains serial is the copying of ids from Rust to Python. On two cores that costs less than
processes do (100 MB of text: 34 s against 38 s), so they are started by default only for large inputs on machines with more cores. Either way
results come back in the order of the documents, and the files are the same.
"""
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import numpy as np

from megatron_ext.data.mcore import indexed_dataset
from megatron_ext.data.prepared import SPLITS
from megatron_ext.data.tokenizer import Tokenizer

BATCH = 1 << 20  # characters encoded at once: the library takes some hundred bytes a token while it works
BUFFER = 1 << 20  # bytes of tokens written at once
PROCESSES_FROM = 1 << 28  # bytes of input from which starting processes pays

_tokenizer: Tokenizer | None = None  # of a worker process


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """The smallest type of an indexed dataset that holds ids below `vocab_size`."""
    return np.uint16 if vocab_size <= 2**16 else np.int32


class SplitWriters:
    """One megatron-core indexed dataset a split, `DIRECTORY/SPLIT.bin` and `.idx`."""

    def __init__(self, directory: Path, *, vocab_size: int):
        self.directory, self.dtype = directory, token_dtype(vocab_size)
        self.tokens = dict.fromkeys(SPLITS, 0)
        self._builders: dict = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        for split, builder in self._builders.items():
            builder.finalize(str(self.directory / f"{split}.idx"))

    def add(self, split: str, document: np.ndarray) -> None:
        """`document`: of `encoded`."""
        if split not in self._builders:
            path = self.directory / f"{split}.bin"
            self._builders[split] = builder = indexed_dataset().IndexedDatasetBuilder(str(path), dtype=self.dtype)
            builder.data_file.close()
            builder.data_file = path.open("wb", buffering=BUFFER)  # documents are small, and 8 KiB is Python's default
        self._builders[split].add_document(document, [len(document)])  # it says torch.Tensor and takes what numpy.array takes
        self.tokens[split] += len(document)


def encoded(documents: Iterable[tuple[str, str]], tokenizer_path: Path, *, workers: int, size: int) -> Iterator[tuple[str, np.ndarray]]:
    """(split, ids and the end-of-document token) of each (split, text), in order; `token_dtype`.

    Args:
        workers: processes; 1 = none but this one, 0 = one a core where that pays, else the library's threads alone.
        size: bytes of input.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = workers or (cores if cores > 2 and size >= PROCESSES_FROM else 1)
    if processes <= 1:
        tokenizer = Tokenizer.from_file(tokenizer_path)
        # One thread waits for the library, which needs no lock of Python's, while this one reads and writes: else a core stands still meanwhile.
        with ThreadPoolExecutor(1) as thread:
            yield from _in_order(documents, lambda texts: thread.submit(_arrays, tokenizer, texts), ahead=1)
        return
    yield from _in_processes(documents, tokenizer_path, processes)


def _in_processes(documents: Iterable[tuple[str, str]], path: Path, processes: int) -> Iterator[tuple[str, np.ndarray]]:
    import multiprocessing

    # spawn: the parent has torch and the library's threads, which a fork would not survive
    with multiprocessing.get_context("spawn").Pool(processes, initializer=_start_worker, initargs=(str(path),)) as pool:
        yield from _in_order(documents, lambda texts: _Result(pool.apply_async(_encode, (texts,))), ahead=2 * processes)


class _Result:
    """A pool's result, asked as a future is."""

    def __init__(self, inner):
        self.result = inner.get


def _in_order(documents: Iterable[tuple[str, str]], begin: Callable[[list[str]], Any], *, ahead: int) -> Iterator[tuple[str, np.ndarray]]:
    """`begin` starts a batch and gives its future; at most `ahead` are under way beside the one that is waited for."""
    waiting: deque = deque()
    for splits, texts in _batches(documents):
        waiting.append((splits, begin(texts)))
        if len(waiting) > ahead:  # bounds the text and tokens in flight
            splits, future = waiting.popleft()
            yield from zip(splits, future.result())
    for splits, future in waiting:
        yield from zip(splits, future.result())


def _start_worker(path: str) -> None:
    global _tokenizer
    os.environ["RAYON_NUM_THREADS"] = "1"
    _tokenizer = Tokenizer.from_file(path)


def _encode(texts: list[str]) -> list[np.ndarray]:
    assert _tokenizer is not None
    return _arrays(_tokenizer, texts)


def _arrays(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    dtype, end = token_dtype(tokenizer.vocab_size), [tokenizer.eod]
    return [np.array(ids + end, dtype) for ids in tokenizer.encode_batch(texts)]


def _batches(documents: Iterable[tuple[str, str]]) -> Iterator[tuple[list[str], list[str]]]:
    splits: list[str] = []
    texts: list[str] = []
    size = 0
    for split, text in documents:
        splits.append(split)
        texts.append(text)
        size += len(text)
        if size >= BATCH:
            yield splits, texts
            splits, texts, size = [], [], 0
    if texts:
        yield splits, texts
