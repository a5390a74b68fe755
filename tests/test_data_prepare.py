"""`prepare` end to end: text to tokens and back, atomic, reused, refused; and the trigram baseline against a dictionary."""
import collections
import gzip
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_ext.config.schema import DataConfig
from megatron_ext.data import prepare as prepare_module
from megatron_ext.data import source as source_module
from megatron_ext.data.build import build_datasets, default_directory, ensure_prepared
from megatron_ext.data.definitions import doc_documents
from megatron_ext.data.index import TokenFile
from megatron_ext.data.ngram import Trigram, trigram_baseline
from megatron_ext.data.prepare import prepare
from megatron_ext.data.prepared import Prepared
from megatron_ext.data.source import open_source
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import UserError

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
DATA = DataConfig(vocab_size=400, sequence_length=32, split=(0.8, 0.1, 0.1), max_bad_lines=0)
TEXTS = [f"문서 {n}: the {n % 7}th of {n} documents\r\n\0\ufeff👩‍👩‍👧 {'가' * (n % 5)}" for n in range(200)]


def write_jsonl(path: Path, texts: list[str] = TEXTS) -> Path:
    path.write_bytes(b"".join(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def ready(tmp_path_factory) -> tuple[Path, Prepared]:
    directory = tmp_path_factory.mktemp("prepare")
    source = write_jsonl(directory / "a.jsonl")
    return source, prepare(DATA, str(source), directory / "out")


def texts_of(prepared: Prepared) -> dict[str, list[str]]:
    tokenizer = Tokenizer.from_file(prepared.tokenizer_path)
    found = {}
    for name, split in prepared.splits.items():
        file = TokenFile(split.prefix)
        ids = [file.read(document).tolist() for document in range(file.documents)]
        assert all(document[-1] == prepared.eod and prepared.eod not in document[:-1] for document in ids)
        found[name] = [tokenizer.decode(document[:-1]) for document in ids]
        assert split.documents == len(ids) and split.tokens == sum(map(len, ids))
        assert split.bytes == sum(len(text.encode()) for text in found[name])
    return found


def test_every_document_comes_back_in_one_split(ready):
    found = texts_of(ready[1])
    assert sorted(text for texts in found.values() for text in texts) == sorted(TEXTS)
    assert [text for text in TEXTS if text in set(found["train"])] == found["train"]  # in the order of the input
    assert 130 < len(found["train"]) < 190 and found["validation"] and found["test"]


def test_record(ready):
    _, prepared = ready
    Prepared.load(prepared.directory, verify=True)
    fields = prepared.fields
    assert fields["corpus"]["documents"] == 200 and fields["tokenizer"]["lossless"] is True
    assert set(fields["files"]) == {"tokenizer.json", *(f"{s}.{e}" for s in ("train", "validation", "test") for e in ("bin", "idx"))}
    assert set(fields["versions"]) == {"megatron_ext", "python", "tokenizers", "megatron-core", "numpy"}
    assert TokenFile(prepared.splits["train"].prefix).dtype == np.uint16
    assert not any(text in json.dumps(fields, ensure_ascii=False) for text in ("문서", "documents\\r"))


def test_same_tokens_from_every_kind_of_file(ready, tmp_path):
    source, prepared = ready
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(source.read_bytes()))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(source.read_bytes()))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet", row_group_size=30)
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number:03}.txt").write_bytes(text.encode())
    for path in (tmp_path / "a.jsonl.gz", tmp_path / "a.jsonl.zst", tmp_path / "a.parquet", folder):
        other = prepare(DATA, str(path), tmp_path / f"out-{path.name}")
        assert other.corpus_sha256 == prepared.corpus_sha256
        assert other.fields["files"] == prepared.fields["files"]


def test_tokenising_in_processes_gives_the_same_files(ready, tmp_path, monkeypatch):
    source, prepared = ready
    monkeypatch.setattr("megatron_ext.data.tokenize.BATCH", 500)
    monkeypatch.setattr("megatron_ext.data.tokenize._arrays", lambda *_: pytest.fail("the parent encoded"))
    other = prepare(replace(DATA, workers=2), str(source), tmp_path / "out")
    assert other.fields["files"] == prepared.fields["files"]


def test_korean_constitution_byte_for_byte(tmp_path):
    path = SHARED / "ko_public"
    if not path.exists():
        pytest.skip(f"real Korean data not found at {path}")
    prepared = prepare(replace(DATA, vocab_size=1000, split=(1.0, 0.0, 0.0)), str(path), tmp_path / "out")
    found = texts_of(replace(prepared, splits={"train": prepared.splits["train"]}))["train"]
    assert [text.encode() for text in found] == [file.read_bytes() for file in sorted(path.iterdir())]
    with pytest.raises(UserError, match="its validation split has no documents"):
        build_datasets(DataConfig(path=str(tmp_path / "out")))


def test_given_tokenizer_is_copied(ready, tmp_path):
    source, prepared = ready
    other = prepare(replace(DATA, tokenizer=str(prepared.tokenizer_path)), str(source), tmp_path / "out")
    assert other.fields["files"] == prepared.fields["files"]


def test_reused_at_once_when_nothing_changed(ready, monkeypatch):
    source, prepared = ready

    def refuse(*arguments):
        raise AssertionError("read or wrote again")

    before = {path.name: path.stat().st_mtime_ns for path in prepared.directory.iterdir()}
    monkeypatch.setattr(prepare_module, "temporary", refuse)
    os.utime(source)  # touched, same text: read for its hash, not written
    assert prepare(DATA, str(source), prepared.directory).corpus_sha256 == prepared.corpus_sha256
    assert {path.name: path.stat().st_mtime_ns for path in prepared.directory.iterdir()} == before


def test_same_fingerprint_is_not_even_read(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl")
    prepare(DATA, str(source), tmp_path / "out")
    monkeypatch.setattr(prepare_module, "_scan", lambda *arguments: pytest.fail("read again"))
    assert prepare(DATA, str(source), tmp_path / "out").splits["train"].documents > 0


def test_other_text_or_settings_are_refused(ready, tmp_path):
    source, prepared = ready
    before = (prepared.directory / "prepared.json").read_bytes()
    with pytest.raises(UserError, match="was prepared from other text"):
        prepare(DATA, str(write_jsonl(tmp_path / "b.jsonl", TEXTS[1:])), prepared.directory)
    for changed in (replace(DATA, vocab_size=300), replace(DATA, split=(0.9, 0.05, 0.05)), replace(DATA, text_key="body")):
        with pytest.raises(UserError, match="was prepared with other settings"):
            prepare(changed, str(source), prepared.directory)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(UserError, match="exists and was not made by `prepare`"):
        prepare(DATA, str(source), tmp_path / "full")
    assert (prepared.directory / "prepared.json").read_bytes() == before


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl")

    def full(directory):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_module, "describe_files", full)
    with pytest.raises(UserError, match="output=.*cannot be written: No space left"):
        prepare(DATA, str(source), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl")
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    dead = prepare_module.temporary(tmp_path / "out")
    dead = dead.rename(dead.with_suffix(f".{child.pid}"))
    (dead / "train.bin").write_bytes(b"half")
    alive = dead.with_suffix(f".{os.getppid()}")
    alive.mkdir()
    prepare(DATA, str(source), tmp_path / "out")
    assert not dead.exists() and alive.exists()


def test_input_that_changes_meanwhile_is_refused(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl")
    train = prepare_module._train

    def train_and_append(*arguments):
        content = train(*arguments)
        write_jsonl(source, [*TEXTS, "one more"])
        return content

    monkeypatch.setattr(prepare_module, "_train", train_and_append)
    with pytest.raises(UserError, match="changed while it was read"):
        prepare(DATA, str(source), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


def test_another_process_that_was_faster(tmp_path, monkeypatch):
    """What it left is taken where it is the same, refused where it is not, and never overwritten."""
    source, other = write_jsonl(tmp_path / "a.jsonl"), write_jsonl(tmp_path / "b.jsonl", [*TEXTS, "one more"])
    prepare(DATA, str(source), tmp_path / "same")
    prepare(DATA, str(other), tmp_path / "other")
    describe = prepare_module.describe_files

    def faster(theirs):
        def late(directory):
            shutil.copytree(theirs, tmp_path / "out")
            return describe(directory)
        return late

    monkeypatch.setattr(prepare_module, "describe_files", faster(tmp_path / "same"))
    before = (tmp_path / "same" / "prepared.json").read_bytes()
    assert prepare(DATA, str(source), tmp_path / "out").directory == tmp_path / "out"
    assert (tmp_path / "out" / "prepared.json").read_bytes() == before
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr(prepare_module, "describe_files", faster(tmp_path / "other"))
    with pytest.raises(UserError, match="was written by another process meanwhile, from other text"):
        prepare(DATA, str(source), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "other", "out", "same"]


def test_tokenizer_changed_or_files_elsewhere(tmp_path):
    prepared = prepare(DATA, str(write_jsonl(tmp_path / "a.jsonl")), tmp_path / "out")
    content = prepared.tokenizer_path.read_bytes()
    prepared.tokenizer_path.write_bytes(content[:-1] + b" ")
    with pytest.raises(UserError, match="tokenizer.json: changed since it was written"):
        Prepared.load(tmp_path / "out")
    prepared.tokenizer_path.write_bytes(content)
    fields = {**prepared.fields, "files": {**prepared.fields["files"], "../a.jsonl": {"size": 0, "sha256": ""}}}
    (tmp_path / "out" / "prepared.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match="names a file outside the directory"):
        Prepared.load(tmp_path / "out")


def test_bad_input(tmp_path):
    (tmp_path / "empty.txt").touch()
    write_jsonl(tmp_path / "blank.jsonl", ["", ""])
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "one"}\n{"text"\n')
    for name, reason in (
        ("empty.txt", "empty.txt: holds no text"), ("blank.jsonl", "holds no text"), ("bad.jsonl", "bad.jsonl:2: not JSON"), ("gone", "no such file"),
    ):
        with pytest.raises(UserError, match=reason):
            prepare(DATA, str(tmp_path / name), tmp_path / "out")
        assert not (tmp_path / "out").exists()
    skipped = prepare(replace(DATA, max_bad_lines=1, split=(1.0, 0.0, 0.0)), str(tmp_path / "bad.jsonl"), tmp_path / "out")
    assert skipped.fields["corpus"]["bad_records"] == 1 and skipped.fields["corpus"]["bad_places"][0].endswith("column 8")
    assert "1 unreadable records were skipped:\n    " in skipped.describe() and "bad.jsonl:2: not JSON" in skipped.describe()
    with pytest.raises(UserError, match="none of 1 documents falls to train"):
        prepare(replace(DATA, split=(0.0, 0.0, 1.0), max_bad_lines=1), str(tmp_path / "bad.jsonl"), tmp_path / "other")
    with pytest.raises(UserError, match="data.corpus=wiki: known are stdlib"):
        prepare(replace(DATA, corpus="wiki"), None, tmp_path / "other")


def test_load_refuses_what_changed(tmp_path):
    prepared = prepare(DATA, str(write_jsonl(tmp_path / "a.jsonl")), tmp_path / "out")
    binary, index = prepared.directory / "train.bin", prepared.directory / "train.idx"
    content = binary.read_bytes()
    binary.write_bytes(content[:-2])
    with pytest.raises(UserError, match=r"data.path=.*train.bin: has \d+ bytes where \d+ were written"):
        Prepared.load(tmp_path / "out")
    binary.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    Prepared.load(tmp_path / "out")
    with pytest.raises(UserError, match="train.bin: changed since it was written"):
        Prepared.load(tmp_path / "out", verify=True)
    index.unlink()
    with pytest.raises(UserError, match="train.idx: this file of the prepared directory is missing"):
        build_datasets(replace(DATA, path=str(tmp_path / "out")))
    for text, reason in (("{", "cannot be read"), ("{}", "not of the format"), ('{"format": "megatron_ext.prepared/1"}', "is damaged .KeyError")):
        (tmp_path / "out" / "prepared.json").write_text(text)
        with pytest.raises(UserError, match=reason):
            Prepared.load(tmp_path / "out")
    (tmp_path / "out" / "prepared.json").unlink()
    with pytest.raises(UserError, match="not a prepared directory"):
        Prepared.load(tmp_path / "out")
    with pytest.raises(UserError, match="no such directory"):
        Prepared.load(tmp_path / "gone")


def test_prepared_needs_neither_torch_nor_numpy():
    code = "import sys, megatron_ext.data.prepared; assert not {'torch', 'numpy', 'tokenizers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[1])


def test_the_embedded_corpus_to_batches_and_the_baseline(tmp_path):
    data = DataConfig(cache=str(tmp_path))
    ensure_prepared(data)
    prepared = Prepared.load(default_directory(data))
    assert prepared.vocab_size == 2048 and prepared.splits["train"].bytes_per_token > 2.5
    built = build_datasets(data)
    assert built["train"].samples_per_epoch > 8000 and built["validation"].samples_per_epoch > 50
    baseline = trigram_baseline(prepared.directory)
    assert 1.4 < baseline["bits_per_byte"] < 2.2  # FACTS.md: 1.80 on another split of this corpus


def test_the_documentation_is_another_corpus_in_the_same_tokens(ready, tmp_path, monkeypatch):
    """`adapt` blends it with the general text, so it is prepared with that one's tokenizer."""
    docs, code = (open_source(DataConfig(corpus=corpus), None) for corpus in ("stdlib-docs", "stdlib"))
    assert docs.fingerprint != code.fingerprint and docs.name != code.name and docs.files == code.files
    with pytest.raises(UserError, match="stdlib-docs"):
        open_source(DataConfig(corpus="wiki"), None)
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "a.py").write_text('"""A module."""\nimport b\ndef f(x):\n    """What f does."""\n', encoding="utf-8")
    monkeypatch.setattr(source_module, "stdlib_files", lambda: [tmp_path / "library" / "a.py"])
    monkeypatch.setitem(source_module.CORPORA, "stdlib-docs", lambda read: doc_documents(tmp_path / "library", read=read))
    general = ready[1]
    domain = prepare(replace(DATA, corpus="stdlib-docs", tokenizer=str(general.tokenizer_path), split=(1, 0, 0), workers=1), None, tmp_path / "out")
    assert domain.tokenizer_sha256 == general.tokenizer_sha256 and "documentation" in domain.fields["corpus"]["name"]
    file = TokenFile(domain.splits["train"].prefix)
    assert Tokenizer.from_file(domain.tokenizer_path).decode(file.read(0).tolist()[:-1]) == "a\nA module.\n\na.f(x)\nWhat f does.\n"


def test_different_tokenizers_do_not_blend(ready, tmp_path):
    source, prepared = ready
    other = prepare(replace(DATA, vocab_size=300), str(source), tmp_path / "out")
    with pytest.raises(UserError, match="these use different tokenizers"):
        build_datasets(replace(DATA, paths=(str(prepared.directory), str(other.directory))))
    with pytest.raises(UserError, match="these use different tokenizers"):
        build_datasets(replace(DATA, path=str(prepared.directory), tokenizer=str(other.tokenizer_path)))


def dictionary_trigram(documents: list[list[int]], vocab_size: int, eod: int):
    """The formula of ngram.py with dictionaries."""
    grams = [collections.Counter() for _ in range(3)]
    for document in documents:
        history = [eod, eod]
        for token in document:
            for order in range(3):
                grams[order][(*history[2 - order :], token)] += 1
            history = [history[1], token]
    totals, kinds, discounts = [], [], []
    for counts in grams:
        total, kind = collections.Counter(), collections.Counter()
        for gram, count in counts.items():
            total[gram[:-1]] += count
            kind[gram[:-1]] += 1
        ones, twos = sum(c == 1 for c in counts.values()), sum(c == 2 for c in counts.values())
        totals.append(total)
        kinds.append(kind)
        discounts.append(ones / (ones + 2 * twos) if ones and twos else 0.5)

    def probability(u: int, v: int, w: int) -> float:
        p = 1 / vocab_size
        for order, history in enumerate([(), (v,), (u, v)]):
            if totals[order][history]:
                d = discounts[order]
                p = (max(grams[order][(*history, w)] - d, 0) + d * kinds[order][history] * p) / totals[order][history]
        return p

    return probability, discounts


def test_trigram_against_dictionaries_and_sums_to_one():
    draw, size, eod = np.random.default_rng(0), 12, 0
    documents = [(draw.zipf(1.5, draw.integers(1, 40)) % (size - 2) + 1).tolist() + [eod] for _ in range(40)]  # token 11 never occurs
    tokens, lengths = np.concatenate(documents).astype(np.uint16), np.array([len(document) for document in documents])
    model = Trigram(tokens, lengths, vocab_size=size, eod=eod)
    probability, discounts = dictionary_trigram(documents, size, eod)
    assert np.allclose(model.discounts, discounts)
    triples = np.array([(u, v, w) for u in range(size) for v in range(size) for w in range(size)])
    # each triple as a document of its own: its third token has the first two as history
    found = model.probabilities(triples.reshape(-1), np.full(len(triples), 3)).reshape(-1, 3)[:, 2]
    assert np.allclose(found, [probability(*triple) for triple in triples], rtol=1e-12)
    assert np.allclose(found.reshape(size, size, size).sum(-1), 1, rtol=1e-12)
    starts = model.probabilities(np.arange(size), np.ones(size, dtype=int))  # first tokens: histories of end-of-document tokens
    assert np.isclose(starts.sum(), 1) and np.allclose(starts, [probability(eod, eod, w) for w in range(size)])
    bits = model.bits(tokens, lengths)
    assert np.isclose(bits, -sum(np.log2(probability(*([eod, eod] + d)[n : n + 3])) for d in documents for n in range(len(d))))


def test_trigram_refusals():
    with pytest.raises(UserError, match="no training tokens"):
        Trigram(np.array([], dtype=np.int64), np.array([], dtype=np.int64), vocab_size=8, eod=0)
    with pytest.raises(UserError, match="at most 2,097,152"):
        Trigram(np.array([1]), np.array([1]), vocab_size=2**22, eod=0)
