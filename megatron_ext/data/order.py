"""The order of samples: a function of the seed alone, epoch by epoch, counted in global samples.

Epoch e of a data set with document lengths n_1..n_D and sequence length L:

1. the documents are permuted by pi(seed, e, "documents") and laid end to end: T = sum of n tokens;
2. that stream is cut into N = floor((T - 1) / L) sequences of L + 1 tokens, neighbours sharing one (the label of the one's last token
   is the other's first input); the tail of fewer than L tokens is dropped until the next epoch, whose documents lie differently;
3. the sequences are permuted by pi(seed, e, "sequences").

T and N do not depend on e, so global sample k is sequence k mod N of epoch k div N: random access, and neither the length of a
run nor the number of data ranks enters. (megatron-core's GPTDataset shuffles all epochs that a run asks for together, so a longer run has
another order from its first sample on.)

pi is a stable argsort of raw 64-bit Philox outputs. NumPy guarantees the streams of its *bit generators* over versions (NEP 19), not what
`Generator.permutation` makes of them; the key comes from sha256, so neither `SeedSequence` nor Python's salted `hash` matters.
"""
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from megatron_ext.data.draws import stream

_CACHED = 2  # epochs held at once: a run crosses from one into the next


def permutation(size: int, *key: object) -> np.ndarray:
    """A permutation of [0, size) that depends on `size` and `key` alone; int32 where that holds it, else int64."""
    order = np.argsort(stream(*key).random_raw(size), kind="stable")
    return order.astype(np.int32) if size < 2**31 else order


@dataclass(frozen=True)
class Piece:
    """Tokens [start, stop) of a document."""

    document: int
    start: int
    stop: int


@dataclass(frozen=True)
class _Epoch:
    documents: np.ndarray  # [D] in the order of this epoch
    ends: np.ndarray  # int64 [D]: where each ends in the stream
    sequences: np.ndarray  # [N]


class SampleOrder:
    """Global sample k -> the pieces of documents it consists of.

    Args:
        lengths: tokens of each document, int64 [D].
        sequence_length: L.
        seed: of the order.
        reshuffle: a new order each epoch; False = epoch 0 over and over (validation: sample k is always the same text).

    Attributes:
        samples_per_epoch: N; 0 if the documents are too short for one sequence.
    """

    def __init__(self, lengths: np.ndarray, *, sequence_length: int, seed: int | str, reshuffle: bool = True):
        self._lengths, self._length, self._seed, self._reshuffle = lengths, sequence_length, seed, reshuffle
        self.samples_per_epoch = max(0, (int(lengths.sum()) - 1) // sequence_length)
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()

    def locate(self, k: int) -> tuple[int, int]:
        """Global sample k -> (epoch, sequence of its stream)."""
        epoch, position = divmod(k, self.samples_per_epoch)
        return epoch, int(self._epoch(epoch).sequences[position])

    def pieces(self, k: int) -> list[Piece]:
        """The pieces of global sample k >= 0, L + 1 tokens in all, in their order; none is empty."""
        number, sequence = self.locate(k)
        epoch = self._epoch(number)
        start = sequence * self._length
        stop = start + self._length + 1
        found = []
        place = int(np.searchsorted(epoch.ends, start, side="right"))
        while start < stop:
            document, end = int(epoch.documents[place]), int(epoch.ends[place])
            begin = end - int(self._lengths[document])
            if end > start:  # an empty document has no piece
                found.append(Piece(document, start - begin, min(stop, end) - begin))
                start = min(stop, end)
            place += 1
        return found

    def holding(self, document: int, epoch: int) -> list[int]:
        """The global samples of an epoch that hold a token of a document, ascending; a token between two sequences is in both."""
        found = self._epoch(epoch)
        place = int(np.flatnonzero(found.documents == document)[0])
        end = int(found.ends[place])
        start = end - int(self._lengths[document])
        if end == start:
            return []
        first = max(0, -(-start // self._length) - 1)  # sequence s holds the tokens [s L, (s + 1) L]
        held = [s for s in range(first, min((end - 1) // self._length, self.samples_per_epoch - 1) + 1) if s * self._length < end and (s + 1) * self._length >= start]
        return sorted(epoch * self.samples_per_epoch + int(k) for k in np.flatnonzero(np.isin(found.sequences, held)))

    def _epoch(self, number: int) -> _Epoch:
        number = number if self._reshuffle else 0
        if number in self._epochs:
            self._epochs.move_to_end(number)
            return self._epochs[number]
        documents = permutation(len(self._lengths), self._seed, number, "documents")
        epoch = _Epoch(
            documents=documents,
            ends=np.cumsum(self._lengths[documents], dtype=np.int64),
            sequences=permutation(self.samples_per_epoch, self._seed, number, "sequences"),
        )
        self._epochs[number] = epoch
        while len(self._epochs) > _CACHED:
            self._epochs.popitem(last=False)
        return epoch
