"""Samples: token sequences by global index, from one data set or a blend of several."""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_ext.data.blend import Blend
from megatron_ext.data.index import TokenFile
from megatron_ext.data.order import SampleOrder
from megatron_ext.errors import UserError


@dataclass(frozen=True)
class Masking:
    """How document boundaries are respected; the names are those of `DataConfig`."""

    reset_positions: bool = False
    reset_attention: bool = False
    mask_eod_loss: bool = False


@dataclass(frozen=True)
class Sample:
    """One sequence.

    Attributes:
        tokens: int64 [sequence_length + 1]: inputs are all but the last, labels all but the first. With `labels` the inputs alone, [sequence_length].
        documents: int32 [sequence_length + 1]: 0, 1, 2, … for the first, second, … document in this sample; as long as `tokens`.
        loss_mask: float32, as long as the labels, 1 where the next token (the label) is to be learnt; None = everywhere.
        labels: int64, what is to be said where that is not the next token; None = the next token.
        inputs: what else the model reads, by the name that it has in the model's call.
    """

    tokens: np.ndarray
    documents: np.ndarray
    loss_mask: np.ndarray | None = None
    labels: np.ndarray | None = None
    inputs: Mapping[str, np.ndarray] = field(default_factory=dict)


class Samples:
    """What all kinds of samples share. `samples[k]` is defined for every k >= 0: past the end the next epoch follows.

    Attributes:
        sequence_length: L, in tokens.
        samples_per_epoch: samples until every data set's text was seen about once.
        bytes_per_token: UTF-8 bytes of text a token (end-of-document tokens count as tokens of no bytes), None if unknown. A loss of l nats
            a token is l / ln 2 / bytes_per_token bits per byte.
        vocab_size, eod: of the tokenizer.
        masking: for the batches.
    """

    sequence_length: int
    samples_per_epoch: int
    bytes_per_token: float | None
    vocab_size: int
    eod: int
    masking: Masking

    def __getitem__(self, k: int) -> Sample:
        raise NotImplementedError


class IndexedSamples(Samples):
    """Samples of one indexed dataset, or of some of its documents.

    Args:
        file: the tokens.
        documents: which documents, int [n]; None = all.
        name: for messages.
        reshuffle: a new order each epoch (training), or always the first one (validation, test).

    Raises:
        UserError: too few tokens for one sequence; token ids outside the vocabulary.
    """

    def __init__(
        self, file: TokenFile, *, documents: np.ndarray | None, name: str, sequence_length: int, seed: int | str, reshuffle: bool,
        vocab_size: int, eod: int, bytes_per_token: float | None, masking: Masking,
    ):
        self._file, self._documents = file, documents
        lengths = file.lengths if documents is None else file.lengths[documents]
        self.tokens = int(lengths.sum())
        if self.tokens < sequence_length + 1:
            raise UserError(
                "data.sequence_length", sequence_length,
                f"{name} has {self.tokens} tokens in {len(lengths)} documents, one sequence takes {sequence_length + 1}; give more text or shorten it",
            )
        largest = file.largest_token()
        if largest >= vocab_size:
            raise UserError("data.tokenizer", name, f"holds token {largest}, the tokenizer has {vocab_size}: it was made with another tokenizer")
        self._order = SampleOrder(lengths, sequence_length=sequence_length, seed=seed, reshuffle=reshuffle)
        self.sequence_length, self.samples_per_epoch = sequence_length, self._order.samples_per_epoch
        self.vocab_size, self.eod, self.bytes_per_token, self.masking = vocab_size, eod, bytes_per_token, masking

    def __getitem__(self, k: int) -> Sample:
        pieces = self._order.pieces(k)
        tokens = np.empty(self.sequence_length + 1, dtype=np.int64)
        documents = np.empty(self.sequence_length + 1, dtype=np.int32)
        place = 0
        for number, piece in enumerate(pieces):
            document = piece.document if self._documents is None else int(self._documents[piece.document])
            stop = place + piece.stop - piece.start
            tokens[place:stop] = self._file.read(document, piece.start, piece.stop)
            documents[place:stop] = number
            place = stop
        return Sample(tokens, documents)


class BlendedSamples(Samples):
    """A weighted blend; all parts share sequence length, vocabulary and masking."""

    def __init__(self, parts: Sequence[Samples], blend: Blend):
        self._parts, self._blend = list(parts), blend
        first = self._parts[0]
        self.sequence_length, self.vocab_size, self.eod, self.masking = first.sequence_length, first.vocab_size, first.eod, first.masking
        self.samples_per_epoch = sum(part.samples_per_epoch for part in self._parts)
        known = [part.bytes_per_token for part in self._parts]
        self.bytes_per_token = None if None in known else float(np.average(known, weights=blend.counts))

    def __getitem__(self, k: int) -> Sample:
        part, sample = self._blend.locate(k)
        return self._parts[part][sample]
