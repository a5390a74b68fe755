"""The order of samples: a permutation each epoch, random access, and the same whatever the length of the run or the number of data ranks."""
import numpy as np
import pytest

from megatron_ext.data.blend import Blend, largest_remainder
from megatron_ext.data.order import SampleOrder, permutation
from megatron_ext.errors import UserError

LENGTHS = np.array([5, 1, 0, 17, 3, 40, 2, 9], dtype=np.int64)  # 77 tokens


def tokens_of(order: SampleOrder, k: int) -> list[tuple[int, int]]:
    return [(piece.document, place) for piece in order.pieces(k) for place in range(piece.start, piece.stop)]


def reference(lengths, length: int, seed: int, epoch: int) -> list[list[tuple[int, int]]]:
    """The three steps of the definition, token by token."""
    stream = [(int(d), t) for d in permutation(len(lengths), seed, epoch, "documents") for t in range(lengths[d])]
    sequences = [stream[n * length : n * length + length + 1] for n in range((len(stream) - 1) // length)]
    return [sequences[n] for n in permutation(len(sequences), seed, epoch, "sequences")]


@pytest.mark.parametrize("length", [1, 4, 7, 76])
def test_against_the_definition(length):
    order = SampleOrder(LENGTHS, sequence_length=length, seed=3)
    count = order.samples_per_epoch
    assert count == 76 // length
    expected = [sequence for epoch in range(3) for sequence in reference(LENGTHS, length, 3, epoch)]
    assert [tokens_of(order, k) for k in range(3 * count)] == expected


def test_an_epoch_holds_each_sequence_once_and_epochs_differ():
    order = SampleOrder(LENGTHS, sequence_length=4, seed=1)
    count = order.samples_per_epoch
    for epoch in range(4):
        found = [order.locate(epoch * count + k) for k in range(count)]
        assert sorted(found) == [(epoch, n) for n in range(count)]
    assert [tokens_of(order, k) for k in range(count)] != [tokens_of(order, k + count) for k in range(count)]
    # every token but the dropped tail is an input or label of the epoch
    assert len({token for k in range(count) for token in tokens_of(order, k)}) == count * 4 + 1


def test_random_access_equals_reading_on():
    straight = SampleOrder(LENGTHS, sequence_length=4, seed=5)
    expected = [tokens_of(straight, k) for k in range(200)]
    jumping = SampleOrder(LENGTHS, sequence_length=4, seed=5)
    for k in np.random.default_rng(0).permutation(200):
        assert tokens_of(jumping, int(k)) == expected[k]


def test_seed_changes_it_and_without_reshuffling_epochs_repeat():
    one, other = (SampleOrder(LENGTHS, sequence_length=4, seed=seed) for seed in (1, 2))
    assert [tokens_of(one, k) for k in range(19)] != [tokens_of(other, k) for k in range(19)]
    fixed = SampleOrder(LENGTHS, sequence_length=4, seed=1, reshuffle=False)
    assert [tokens_of(fixed, k) for k in range(19)] == [tokens_of(fixed, k + 19) for k in range(19)] == [tokens_of(one, k) for k in range(19)]


def test_the_permutation_is_pinned():
    """These numbers may never change: a run that is resumed under another NumPy must go on with the same samples."""
    assert permutation(10, 1234, 0, "documents").tolist() == PINNED
    assert sorted(permutation(1000, 1).tolist()) == list(range(1000)) and len(permutation(0, 1)) == 0


PINNED = [2, 6, 0, 7, 8, 5, 4, 9, 1, 3]


@pytest.mark.parametrize("weights", [(1, 1), (0.7, 0.2, 0.1), (5, 3, 3, 3)])
def test_blend_proportions_hold_in_each_period_and_each_set_is_read_in_order(weights):
    blend = Blend(weights, names=["a"] * len(weights), seed=1, period=512)
    counts = np.array(weights) / sum(weights) * 512
    seen = [0] * len(weights)
    for period in range(3):
        before = list(seen)
        for k in range(period * 512, (period + 1) * 512):
            chosen, sample = blend.locate(k)
            assert sample == seen[chosen]
            seen[chosen] += 1
        assert np.abs(np.array(seen) - before - counts).max() < 1


def test_blend_random_access_and_mixing():
    blend = Blend((3, 1), names="ab", seed=1, period=64)
    straight = [blend.locate(k) for k in range(640)]
    jumping = Blend((3, 1), names="ab", seed=1, period=64)
    assert [jumping.locate(k) for k in range(639, -1, -1)] == straight[::-1]
    assert straight[:64] != [(chosen, sample - 48 if chosen == 0 else sample - 16) for chosen, sample in straight[64:128]]  # periods differ
    assert len({chosen for chosen, _ in straight[:16]}) == 2


def test_largest_remainder():
    assert largest_remainder([1, 1, 1], 10).tolist() == [4, 3, 3]
    assert largest_remainder([0.05, 0.95], 4).tolist() == [0, 4]
    assert largest_remainder([1e-9, 1e9, 3e9], 4096).sum() == 4096


def test_blend_refusals():
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="data.weights=.*of b: weights are positive"):
            Blend((1.0, weight), names="ab", seed=1)
    with pytest.raises(UserError, match="data.weights=0.1: of b is 1e-05 of all: less than one sample in 4096"):
        Blend((9999.9, 0.1), names="ab", seed=1)
