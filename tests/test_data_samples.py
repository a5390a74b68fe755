"""From .bin/.idx to batches: boundaries against hand-computed values and megatron-core's own, data ranks, damaged files."""
import hashlib
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from tokenizers import models

from megatron_ext.config.schema import DataConfig
from megatron_ext.data.batches import micro_batches
from megatron_ext.data.build import build_datasets, dataset_tokenizer, ensure_prepared
from megatron_ext.data.index import TokenFile
from megatron_ext.data.samples import IndexedSamples, Masking
from megatron_ext.data.subset import split_documents
from megatron_ext.errors import UserError

EOD = 0


def write(prefix: Path, documents: list[list[list[int]]], dtype=np.uint16) -> Path:
    """A Megatron data set by megatron-core's own builder; a document is a list of sequences."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        for sequence in document:
            builder.add_item(torch.tensor(sequence, dtype=torch.int64))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


def random_documents(seed: int, count: int = 60) -> list[list[list[int]]]:
    draw = np.random.default_rng(seed)
    return [[draw.integers(1, 50, draw.integers(0, 30)).tolist() + [EOD]] for _ in range(count)]


def samples_of(prefix: Path, *, length: int = 8, reshuffle: bool = True, vocab_size: int = 50, **masking) -> IndexedSamples:
    return IndexedSamples(
        TokenFile(prefix), documents=None, name="test", sequence_length=length, seed=1, reshuffle=reshuffle,
        vocab_size=vocab_size, eod=EOD, bytes_per_token=None, masking=Masking(**masking),
    )


@pytest.fixture
def vocabulary(tmp_path) -> str:
    words = {"<|endoftext|>": 0, **{f"w{n}": n for n in range(1, 50)}}
    tokenizers.Tokenizer(models.WordLevel(words, unk_token="w1")).save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_megatron_files_read_as_megatron_core_reads_them(tmp_path, dtype):
    documents = [[[1, 2, 3], [4, EOD]], [[5, EOD]], [[6], [7], [8, EOD]], [[9, 10, 11, EOD]]]
    prefix = write(tmp_path / "a", documents, dtype)
    file, theirs = TokenFile(prefix), IndexedDataset(str(prefix))
    assert file.lengths.tolist() == [5, 2, 4, 4]
    for number, document in enumerate(documents):
        assert file.read(number).tolist() == [token for sequence in document for token in sequence]
        first, last = theirs.document_indices[number : number + 2]
        assert file.read(number).tolist() == np.concatenate([theirs[n] for n in range(first, last)]).tolist()
    assert file.read(0, 2, 4).tolist() == [3, 4] and file.read(2, 1, 1).size == 0
    assert file.largest_token() == 11


def test_an_epoch_of_samples_covers_the_text_once(tmp_path):
    prefix = write(tmp_path / "a", random_documents(0))
    samples, file = samples_of(prefix), TokenFile(prefix)
    found = np.concatenate([samples[k].tokens[:-1] for k in range(samples.samples_per_epoch)])
    total = np.concatenate([file.read(n) for n in range(file.documents)])
    assert len(total) - 8 <= len(found) < len(total)
    assert (np.bincount(found, minlength=50) <= np.bincount(total, minlength=50)).all()


def test_boundaries_by_hand(tmp_path):
    documents, tokens = [[1, 2, EOD], [3, EOD], [4, 5, 6, EOD]], [1, 2, EOD, 3, EOD, 4, 5, 6, EOD]
    prefix = write(tmp_path / "b", [[document] for document in documents])
    # a seed whose first epoch keeps the order of the file
    seed = next(s for s in range(100) if _stream(prefix, s) == tokens)
    samples = IndexedSamples(
        TokenFile(prefix), documents=None, name="test", sequence_length=8, seed=seed, reshuffle=True, vocab_size=50, eod=EOD,
        bytes_per_token=None, masking=Masking(reset_positions=True, reset_attention=True, mask_eod_loss=True),
    )
    (batch,) = micro_batches(samples, 0, global_batch=1, micro_batch=1, dp_rank=0, dp_size=1)
    assert batch.tokens.tolist() == [[1, 2, 0, 3, 0, 4, 5, 6]]
    assert batch.labels.tolist() == [[2, 0, 3, 0, 4, 5, 6, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch.documents.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2]]
    assert batch.loss_mask.tolist() == [[1, 1, 0, 1, 0, 1, 1, 1]]
    assert (batch.tokens.dtype, batch.labels.dtype, batch.loss_mask.dtype) == (torch.int64, torch.int64, torch.float32)
    assert (batch.position_ids.dtype, batch.documents.dtype) == (torch.int64, torch.int32)
    assert all(tensor.is_contiguous() for tensor in (batch.tokens, batch.labels, batch.loss_mask, batch.position_ids, batch.documents))


def _stream(prefix: Path, seed: int) -> list[int]:
    return IndexedSamples(
        TokenFile(prefix), documents=None, name="test", sequence_length=8, seed=seed, reshuffle=True, vocab_size=50, eod=EOD,
        bytes_per_token=None, masking=Masking(),
    )[0].tokens.tolist()


def test_boundaries_equal_megatron_cores(tmp_path):
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    prefix = write(tmp_path / "a", random_documents(1))
    samples = samples_of(prefix, length=32, reset_positions=True, reset_attention=True, mask_eod_loss=True)
    (batch,) = micro_batches(samples, 0, global_batch=8, micro_batch=8, dp_rank=0, dp_size=1)
    for row in range(8):
        attention, loss_mask, position_ids = _get_ltor_masks_and_position_ids(batch.tokens[row], EOD, True, True, True, True)
        assert torch.equal(position_ids, batch.position_ids[row]) and torch.equal(loss_mask, batch.loss_mask[row])
        same = batch.documents[row][:, None] == batch.documents[row][None, :]
        assert torch.equal(attention[0], ~(same & torch.ones(32, 32, dtype=torch.bool).tril()))


def test_without_requests_positions_run_on(tmp_path):
    samples = samples_of(write(tmp_path / "a", random_documents(1)))
    (batch,) = micro_batches(samples, 5, global_batch=2, micro_batch=2, dp_rank=0, dp_size=1)
    assert batch.position_ids.tolist() == [list(range(8))] * 2
    assert batch.documents is None and batch.loss_mask.min() == 1


def test_data_ranks_share_the_same_global_samples(tmp_path):
    samples = samples_of(write(tmp_path / "a", random_documents(2)))
    steps = 2 * samples.samples_per_epoch // 8  # into the second epoch
    one = [b for s in range(steps) for b in micro_batches(samples, 8 * s, global_batch=8, micro_batch=2, dp_rank=0, dp_size=1)]
    expected = torch.cat([batch.tokens for batch in one]).reshape(steps, 8, 8)
    for ranks in (2, 4):
        for step in range(steps):
            parts = [
                micro_batches(samples, 8 * step, global_batch=8, micro_batch=2, dp_rank=rank, dp_size=ranks) for rank in range(ranks)
            ]
            assert all(len(part) == 4 // ranks for part in parts)
            together = torch.cat([parts[rank][m].tokens for m in range(4 // ranks) for rank in range(ranks)])
            assert torch.equal(together, expected[step])
    with pytest.raises(ValueError, match="global batch 8 is not a multiple of micro batch 3 x 1"):
        micro_batches(samples, 0, global_batch=8, micro_batch=3, dp_rank=0, dp_size=1)


def damage(path: Path, content: bytes) -> None:
    path.unlink()  # megatron-core may still map the old file
    path.write_bytes(content)


def test_truncated_and_damaged_index_and_tokens(tmp_path):
    prefix = write(tmp_path / "a", random_documents(3))
    index, binary = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    whole, tokens = index.read_bytes(), binary.read_bytes()
    cuts = {
        0: "truncated: 0 bytes", 5: "truncated", 20: "truncated", 34: "truncated: 34 bytes, its header speaks of", len(whole) // 2: "truncated",
        len(whole) - 1: "truncated",
    }
    for cut, reason in cuts.items():
        damage(index, whole[:cut])
        with pytest.raises(UserError, match=f"data.paths=.*a.idx: {reason}"):
            TokenFile(prefix)
    count = 60
    begin = 34
    others = {
        b"PK\x03\x04" + whole[4:]: "not an index of megatron-core",
        whole[:9] + struct.pack("<Q", 2) + whole[17:]: "version 2",
        whole[:17] + b"\x07" + whole[18:]: "type 7",
        whole[:18] + struct.pack("<Q", 2**62) + whole[26:]: "truncated",
        whole + b"12345": "where its header speaks of",
        whole[:begin] + struct.pack("<i", -4) + whole[begin + 4 :]: "contradict each other",
        whole[: begin + 4 * count] + struct.pack("<q", -2) + whole[begin + 4 * count + 8 :]: "do not follow each other",
        whole[: begin + 12 * count] + struct.pack("<q", 1) + whole[begin + 12 * count + 8 :]: "contradict each other",
    }
    for content, reason in others.items():
        damage(index, content)
        with pytest.raises(UserError, match=f"a.idx: .*{reason}"):
            TokenFile(prefix)
    damage(index, whole)
    TokenFile(prefix)
    for cut in (0, 1, len(tokens) // 2, len(tokens) - 1):
        damage(binary, tokens[:cut])
        with pytest.raises(UserError, match="a.bin: " + ("truncated" if cut else "holds no tokens")):
            TokenFile(prefix)
    binary.unlink()
    with pytest.raises(UserError, match="no file .*a.bin"):
        TokenFile(prefix)


def test_too_small_and_wrong_vocabulary(tmp_path):
    prefix = write(tmp_path / "a", [[[1, 2, EOD]], [[49, EOD]]])
    assert samples_of(prefix, length=4).samples_per_epoch == 1
    with pytest.raises(UserError, match="data.sequence_length=5: test has 5 tokens in 2 documents, one sequence takes 6"):
        samples_of(prefix, length=5)
    with pytest.raises(UserError, match="holds token 49, the tokenizer has 49"):
        samples_of(prefix, length=4, vocab_size=49)


def test_split_of_megatron_files_is_by_document_and_cached(tmp_path):
    documents = random_documents(4, count=400)
    file = TokenFile(write(tmp_path / "a", documents))
    first = split_documents(file, (0.8, 0.1, 0.1), cache=tmp_path / "cache")
    assert sorted(np.concatenate(list(first.values()))) == list(range(400))
    assert 270 < len(first["train"]) < 370 and min(map(len, first.values())) > 10
    (cached,) = (tmp_path / "cache" / "splits").iterdir()
    assert all((split_documents(file, (0.8, 0.1, 0.1), cache=tmp_path / "cache")[name] == first[name]).all() for name in first)
    cached.write_bytes(b"damaged")
    assert (split_documents(file, (0.8, 0.1, 0.1), cache=tmp_path / "cache")["test"] == first["test"]).all()
    # other documents, other type, other order: what stays goes where it went
    other = TokenFile(write(tmp_path / "b", documents[:200][::-1], np.int32))
    again = split_documents(other, (0.8, 0.1, 0.1), cache=tmp_path / "cache")
    assert sorted(199 - again["validation"]) == sorted(first["validation"][first["validation"] < 200])


def test_megatron_paths_build_and_blend(tmp_path, vocabulary):
    paths = tuple(str(write(tmp_path / name, random_documents(seed, count=300))) for seed, name in enumerate("ab"))
    data = DataConfig(paths=paths, weights=(3.0, 1.0), tokenizer=vocabulary, sequence_length=16, split=(0.8, 0.1, 0.1), cache=str(tmp_path / "c"))
    ensure_prepared(data)
    built = build_datasets(data, ("train", "validation", "test"))
    train = built["train"]
    assert train.vocab_size == 50 and train.eod == EOD and train.bytes_per_token > 1
    assert hash_of(train, 300) == hash_of(build_datasets(data)["train"], 300)
    other = build_datasets(replace(data, seed=5))["train"]
    assert hash_of(train, 300) != hash_of(other, 300)
    alone = build_datasets(replace(data, paths=paths[:1], weights=()))["train"]
    inside = {tuple(alone[k].tokens) for k in range(alone.samples_per_epoch)}
    share = np.mean([tuple(train[k].tokens) in inside for k in range(200)])
    assert 0.65 < share < 0.85
    assert build_datasets(replace(data, weights=()))["train"].samples_per_epoch == train.samples_per_epoch


def test_splits_of_a_megatron_file_share_no_document(tmp_path, vocabulary):
    documents = [[[n % 49 + 1] * 20 + [EOD]] for n in range(49)]  # each has a token of its own
    prefix = write(tmp_path / "a", documents)
    data = DataConfig(paths=(str(prefix),), tokenizer=vocabulary, sequence_length=5, split=(0.6, 0.2, 0.2), cache=str(tmp_path / "c"))
    members = split_documents(TokenFile(prefix), data.split, cache=data.cache)
    for split, samples in build_datasets(data, ("train", "validation", "test")).items():
        seen = {int(token) for k in range(samples.samples_per_epoch) for token in samples[k].tokens} - {EOD}
        assert seen == {int(document) + 1 for document in members[split]}


def test_validation_is_the_same_text_each_time_and_training_is_not(tmp_path, vocabulary):
    data = DataConfig(paths=(str(write(tmp_path / "a", random_documents(8, 200))),), tokenizer=vocabulary, sequence_length=8, cache=str(tmp_path / "c"))
    built = build_datasets(replace(data, split=(0.5, 0.5, 0.0)))
    for split, same in (("train", False), ("validation", True)):
        samples, count = built[split], built[split].samples_per_epoch
        assert ([samples[k].tokens.tolist() for k in range(count)] == [samples[count + k].tokens.tolist() for k in range(count)]) is same


def test_the_same_data_twice_in_a_blend_is_not_in_lockstep(tmp_path, vocabulary):
    prefix = str(write(tmp_path / "a", random_documents(9, 200)))
    train = build_datasets(DataConfig(paths=(prefix, prefix), tokenizer=vocabulary, sequence_length=8, cache=str(tmp_path / "c")))["train"]
    assert len({tuple(train[k].tokens) for k in range(60)}) > 45


def test_longer_runs_begin_with_the_same_samples(tmp_path, vocabulary):
    """megatron-core's own order fails this: its shuffle spans all epochs that a run asks for."""
    data = DataConfig(paths=(str(write(tmp_path / "a", random_documents(7, 100))),), tokenizer=vocabulary, sequence_length=16, cache=str(tmp_path / "c"))
    short = build_datasets(data)["train"]
    first = [short[k].tokens.tolist() for k in range(50)]
    long = build_datasets(data)["train"]
    assert long[50 * long.samples_per_epoch].tokens is not None  # a run of fifty epochs
    assert [long[k].tokens.tolist() for k in range(50)] == first


def hash_of(samples, count: int) -> str:
    return hashlib.sha256(b"".join(samples[k].tokens.tobytes() for k in range(count))).hexdigest()


def test_configuration_refusals(tmp_path, vocabulary):
    prefix = str(write(tmp_path / "a", random_documents(5)))
    data = DataConfig(paths=(prefix,), tokenizer=vocabulary, sequence_length=8, cache=str(tmp_path / "c"))
    for changed, reason in (
        (replace(data, tokenizer=None), "data.tokenizer=None: Megatron files do not hold their tokenizer"),
        (replace(data, weights=(1.0, 2.0)), "data.weights=.*2 weights for 1 paths"),
        (replace(data, path=prefix), "give data.path or data.paths, not both"),
        (replace(data, paths=(prefix + "x",)), "data.paths=.*no file .*ax.idx"),
        (replace(data, split=(0.5, 0.6, 0.1)), "data.split=.*three fractions that sum to 1"),
        (replace(data, split=(0.5, 0.5)), "data.split=.*three fractions"),
        (replace(data, sequence_length=0), "data.sequence_length=0: at least 1"),
        (replace(data, paths=(), tokenizer=None), "data.path=None: the embedded corpus is not prepared"),
    ):
        with pytest.raises(UserError, match=reason):
            build_datasets(changed)
    with pytest.raises(UserError, match="split=dev: one of train, validation, test"):
        build_datasets(data, ("dev",))
    assert dataset_tokenizer(data)[1].vocab_size == 50
