"""Sequences of unequal lengths into bins: the sequences of SFT, and micro-batches by tokens.

Best fit decreasing: the longest first, each into the fullest bin that has room (Johnson et al. 1974: at most 11/9 of the fewest bins). Which lengths go
together depends on the lengths alone, so that every epoch has as many bins.
"""
from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heappop, heappush

import numpy as np

from megatron_ext.data.order import permutation
from megatron_ext.data.samples import Masking, Sample, Samples
from megatron_ext.errors import UserError
from rlhf.data.examples import Example


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Numbers of items in each bin. Items of equal size stay in their order; one larger than `capacity` has a bin of its own."""
    rooms: list[tuple[int, int]] = []  # (room left, bin), ascending
    bins: list[list[int]] = []
    for item in sorted(range(len(sizes)), key=lambda item: (-sizes[item], item)):
        place = bisect_left(rooms, (sizes[item], -1))
        if place == len(rooms):
            room, number = capacity, len(bins)
            bins.append([])
        else:
            room, number = rooms.pop(place)
        bins[number].append(item)
        if room - sizes[item] > 0:
            insort(rooms, (room - sizes[item], number))
    return bins


def pack_by_tokens(lengths: Sequence[int], budget: int, groups: Sequence[int] | None = None) -> list[list[int]]:
    """Micro-batches of at most `budget` tokens: as few as best fit needs, and of like size where that many can be.

    Like sizes matter because all micro-batches of a pipeline are padded to the longest, and the fullest decides the memory. The longest first, each
    to the emptiest bin (Graham 1969); where that overfills one, best fit it is.

    Args:
        lengths: tokens of each item.
        groups: items of one group stay in one bin, together; a group (or an item) longer than the budget has one of its own.
    Returns:
        Numbers of items in each bin: groups in the order of their first item, items in their own; bins in the order of their first item.
    Raises:
        ValueError: not one group for each item.
    """
    if groups is not None and len(groups) != len(lengths):
        raise ValueError(f"{len(groups)} groups for {len(lengths)} items")
    units: dict[int, list[int]] = {}
    for item in range(len(lengths)):
        units.setdefault(item if groups is None else groups[item], []).append(item)
    members = list(units.values())
    sizes = [sum(lengths[item] for item in unit) for unit in members]
    alone = [[number] for number, size in enumerate(sizes) if size > budget]
    rest = [number for number, size in enumerate(sizes) if size <= budget]
    tight = best_fit([sizes[number] for number in rest], budget)
    bins = _level([sizes[number] for number in rest], len(tight), budget) or tight
    found = sorted(sorted(one) for one in [*alone, *([rest[place] for place in one] for one in bins)])
    return [[item for number in one for item in members[number]] for one in found]


def _level(sizes: Sequence[int], count: int, capacity: int) -> list[list[int]] | None:
    """Items in `count` bins of like size; None where one would be overfull."""
    loads = [(0, number) for number in range(count)]  # a heap
    bins: list[list[int]] = [[] for _ in range(count)]
    for item in sorted(range(len(sizes)), key=lambda item: (-sizes[item], item)):
        load, number = heappop(loads)
        if load + sizes[item] > capacity:
            return None
        bins[number].append(item)
        heappush(loads, (load + sizes[item], number))
    return [one for one in bins if one]


class ChatSamples(Samples):
    """Examples packed into samples of a fixed length: each example whole, once an epoch, and blind to the others.

    What is left of a sample is a document of its own, of end-of-document tokens that nobody learns. A new epoch deals the examples anew among the
    places for their length, and shuffles the bins.

    Args:
        examples: none longer than `sequence_length` + 1 tokens.
        packing: several examples in a sample; else one each.
        reshuffle: a new order each epoch (training), or always the first one.

    Raises:
        UserError: no examples. ValueError: one that is too long.
    """

    masking = Masking(reset_positions=True, reset_attention=True)
    bytes_per_token = None

    def __init__(self, examples: Sequence[Example], *, sequence_length: int, packing: bool, seed: int, reshuffle: bool, vocab_size: int, eod: int,
                 name: str):
        if not examples:
            raise UserError("chat.path", name, "gives no example that can be trained on")
        self.examples, self.sequence_length, self.vocab_size, self.eod = examples, sequence_length, vocab_size, eod
        self._seed, self._reshuffle = seed, reshuffle
        lengths = [len(example.tokens) for example in examples]
        if max(lengths) > sequence_length + 1:
            raise ValueError(f"an example of {max(lengths)} tokens does not fit into {sequence_length} + 1")
        # Slots by falling length: an epoch fills each with another example of that length, so that the bins are the same.
        self._slots = best_fit(lengths, sequence_length + 1) if packing else [[item] for item in range(len(lengths))]
        self._lengths = np.array(lengths)
        self.samples_per_epoch = len(self._slots)
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def __getitem__(self, k: int) -> Sample:
        epoch, place = divmod(k, self.samples_per_epoch)
        filled, order = self._order(epoch if self._reshuffle else 0)
        length = self.sequence_length + 1
        tokens = np.full(length, self.eod, dtype=np.int64)
        documents = np.zeros(length, dtype=np.int32)
        mask = np.zeros(length - 1, dtype=np.float32)
        start = 0
        chosen = [self.examples[int(filled[slot])] for slot in self._slots[int(order[place])]]
        for number, example in enumerate(chosen):
            stop = start + len(example.tokens)
            tokens[start:stop], documents[start:stop] = example.tokens, number
            mask[start : stop - 1] = example.trained[1:]  # where the next token is one to learn
            start = stop
        documents[start:] = len(chosen)
        return Sample(tokens, documents, mask)

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(the example in each slot, the order of the bins)."""
        if self._epoch is None or self._epoch[0] != epoch:
            count = len(self.examples)
            shuffled = permutation(count, self._seed, epoch, "examples")
            by_length = shuffled[np.argsort(-self._lengths[shuffled], kind="stable")]  # equal lengths in the shuffled order
            slots = np.argsort(-self._lengths, kind="stable")
            filled = np.empty(count, dtype=np.int64)
            filled[slots] = by_length
            self._epoch = (epoch, filled, permutation(self.samples_per_epoch, self._seed, epoch, "bins"))
        return self._epoch[1:]
