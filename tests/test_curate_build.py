"""Builds: the same bytes whatever the workers and wherever they were killed, nothing lost, nothing told; and the ledger's numbers against the tokens themselves."""
import json
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import curate_files as made
import numpy as np
import pytest

from megatron_ext.config.compose import compose
from megatron_ext.config.validate import problems
from megatron_ext.curate.config import CurateConfig
from megatron_ext.curate.documents import document_id, read_records, text_sha256
from megatron_ext.curate.ingest.config import IngestConfig, SelectConfig
from megatron_ext.data.blend import Blend
from megatron_ext.data.order import SampleOrder
from megatron_ext.errors import RunFailed, UserError

pytest.importorskip("datatrove")

from megatron_ext.curate import blocks, command, removals
from megatron_ext.curate.build import Build
from megatron_ext.curate.manifest import Curated
from megatron_ext.curate.tally import Tally, added

ROOT = Path(__file__).resolve().parent.parent
STEPS = ("normalise", "language")
SMALL = CurateConfig(steps=STEPS, workers=1, task_bytes=400)


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("build") / "raw"
    made.write_all(root)
    return root


@pytest.fixture(scope="module")
def built(raw) -> Curated:
    return command.curate(SMALL, raw, raw.parent / "one", progress=False)


def documents(curated: Curated) -> list[dict]:
    return [record for shard in curated.fields["output"]["shards"] for record in read_records(curated.shards / shard["name"])]


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_file_is_a_document_or_set_aside(raw, built):
    """Nothing is lost: each file has documents, or a line that says why not."""
    kept = {record["metadata"]["origin"].split("#")[0] for record in documents(built)}
    aside = {json.loads(line)["path"] for line in (built.folder / "set_aside.jsonl").read_text().splitlines()}
    assert kept | aside == {path.relative_to(raw).as_posix() for path in raw.rglob("*") if path.is_file()}
    assert {path.split("/")[0] for path in kept & aside} == {"bad", "delivery.zip"}, "a file with good and bad records"
    for record in documents(built):
        metadata = record["metadata"]
        assert metadata["text_sha256"] == text_sha256(record["text"]) and len(record["id"]) == 32 and metadata["language"] in ("ko", "en", "und")
    assert len({record["id"] for record in documents(built)}) == len(documents(built))
    assert not (raw.parent / "one.work").exists()


def test_the_manifest_adds_up(built):
    fields = built.fields
    rows = {row["step"]: row for row in fields["steps"]}
    assert list(rows) == ["read", "normalise", "removals", "language", "write"]
    for before, after in zip(fields["steps"], fields["steps"][1:]):
        assert before["out"] == after["in"] and before["in"] == before["out"] + sum(before["dropped"].values())
    assert rows["write"]["out"] == fields["output"]["documents"] == len(documents(built)) == fields["sources"][0]["documents_out"]
    assert fields["output"]["characters"] == sum(len(record["text"]) for record in documents(built)) == rows["write"]["characters_out"]
    assert sum(count for name, count in rows["language"]["counts"].items()) == rows["language"]["in"]
    assert fields["set_aside"]["entries"] == sum(fields["set_aside"]["reasons"].values()) >= 9
    assert "nothing is known of its licence" in built.describe()
    text = (built.folder / "manifest.json").read_text()
    assert str(built.folder.parent) not in text and "20" + time.strftime("%y-%m") not in text, "no place and no time"


def test_a_finished_build_is_taken_as_it_is_and_another_refused(raw, built, tmp_path):
    before = (built.folder / "manifest.json").stat().st_mtime_ns
    assert command.curate(replace(SMALL, workers=5), raw, built.folder, progress=False).sha256 == built.sha256
    assert (built.folder / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="other settings"):
        command.curate(replace(SMALL, task_bytes=500), raw, built.folder, progress=False)
    with pytest.raises(UserError, match="other input"):
        command.curate(SMALL, raw / "text", built.folder, progress=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("x")
    with pytest.raises(UserError, match="was not made by"):
        command.curate(SMALL, raw, tmp_path / "other", progress=False)
    begun = Build.start(SMALL, raw, tmp_path / "begun")
    with pytest.raises(UserError, match="other settings, begun and not ended"):
        Build.start(replace(SMALL, task_bytes=300), raw, begun.output)
    with pytest.raises(UserError, match="holds nothing that can be read"):
        Build.start(SMALL, raw / "bad/old.hwp", tmp_path / "none")


class Failing:
    """A block that breaks on a document, and tells it."""

    def __init__(self, settings):
        pass

    def process(self, document):
        raise ValueError(document.text)


class KeepFirst:
    """A step that sees all documents: of each text the first is kept."""

    def __init__(self, settings):
        pass

    def phases(self, shards):
        def steps():
            return [Seen(shards)]

        return [blocks.Phase("texts", 1, steps)]

    def decide(self, shards, rank):
        return self.Decision(json.loads((shards.work / "first.json").read_text()))

    class Decision:
        def __init__(self, first):
            self._first = first

        def process(self, document):
            return blocks.KEPT if self._first[document.text] == document.id else blocks.dropped("copy")


def Seen(shards):
    from datatrove.pipeline.base import PipelineStep

    class Step(PipelineStep):
        type = name = "seen"

        def run(self, data=None, rank=0, world_size=1):
            first = {}
            for shard in range(shards.count):
                for document in shards.reader()(None, shard, shards.count):
                    first.setdefault(document.text, document.id)
            shards.work.mkdir(parents=True, exist_ok=True)
            (shards.work / "first.json").write_text(json.dumps(first))
            yield from ()

    return Step()


@pytest.fixture
def own_steps(monkeypatch):
    monkeypatch.setitem(blocks.BLOCKS, "failing", blocks.Entry("test_curate_build:Failing", "ingest"))
    monkeypatch.setitem(blocks.BLOCKS, "first", blocks.Entry("test_curate_build:KeepFirst", "ingest", whole=True))


def test_a_failing_step_names_the_document_and_not_its_text(raw, tmp_path, own_steps, capfd):
    with pytest.raises(RunFailed) as error:
        command.curate(replace(SMALL, steps=("failing",)), raw / "text", tmp_path / "out", progress=False)
    assert "step failing, document " in str(error.value) and "ValueError at test_curate_build.py, line" in str(error.value)
    told = str(error.value) + "".join(capfd.readouterr()) + "".join(path.read_text() for path in (tmp_path / "out.work").rglob("*.json"))
    assert not any(word in told for word in ("대한민국", "quick", "brown")) and error.value.__cause__ is None and error.value.__suppress_context__


def test_a_step_that_sees_all_documents(raw, built, tmp_path, own_steps):
    steps = (*STEPS, "first")
    found = command.curate(replace(SMALL, steps=steps), raw, tmp_path / "out", progress=False)
    texts = [record["text"] for record in documents(built)]
    assert [record["text"] for record in documents(found)] == list(dict.fromkeys(texts)) and len(texts) > len(documents(found))
    row = {row["step"]: row for row in found.fields["steps"]}["first"]
    assert row["dropped"] == {"copy": len(texts) - len(documents(found))}
    gone = [record for path in sorted((found.folder / "dropped").iterdir()) for record in read_records(path)]
    assert [record["step"] for record in gone] == ["first"] * row["dropped"]["copy"] and all("text" not in record for record in gone)


# ---- images, licences, removals -----------------------------------------------------------------------------------------------------

def test_images_are_carried_into_webdataset_shards(raw, tmp_path):
    (tmp_path / "raw").mkdir()
    for name in ("guide.docx", "guide.hwpx"):
        (tmp_path / "raw" / name).write_bytes((raw / name).read_bytes())
    found = command.curate(replace(SMALL, images=True, task_bytes=1 << 20), tmp_path / "raw", tmp_path / "out", progress=False)
    (shard,) = found.fields["output"]["webdataset"]
    assert (shard["documents"], shard["images"]) == (2, 2)
    with tarfile.open(found.folder / "webdataset" / shard["name"]) as archive:
        members = {entry.name: archive.extractfile(entry).read() for entry in archive}
        assert all(entry.mtime == 0 and entry.uid == 0 for entry in archive)
    keys = [name.partition(".")[0] for name in members]
    assert keys == sorted(keys, key=keys.index) and len(set(keys)) == 2, "the members of a sample stand together"
    for record in documents(found):
        assert members[f"{record['id']}.0.png"] == made.PNG and json.loads(members[f"{record['id']}.json"]) == record
        table = record["metadata"]["tables"][0]
        assert record["text"].split("\n")[table["line"]] == " | ".join(table["rows"][0]), "a part stands before its line, after cleaning too"


def test_licences_decide_what_comes_in(raw, tmp_path):
    catalogue = tmp_path / "sources.yaml"
    catalogue.write_text("sources:\n- {name: texts, path: text, licence: KOGL-1, owner: 부처, domain: law}\n- {name: rows, path: rows.csv, licence: KOGL-2}\n", encoding="utf-8")
    settings = replace(SMALL, ingest=IngestConfig(catalogue=str(catalogue)), uses=("commercial",))
    with pytest.raises(UserError, match=r"rows: its licence \(KOGL-2\) forbids: commercial.*leave_out"):
        command.curate(replace(settings, forbidden="refuse"), raw, tmp_path / "a", progress=False)
    warned = command.curate(settings, raw, tmp_path / "b", progress=False)
    assert "warning: rows: its licence (KOGL-2) forbids: commercial" in warned.describe() and len(warned.fields["sources"]) == 2
    left = command.curate(replace(settings, forbidden="leave_out"), raw, tmp_path / "c", progress=False)
    assert {record["metadata"]["source"] for record in documents(left)} == {"texts"}
    assert documents(left)[0]["metadata"]["licence"] == "KOGL-1" and documents(left)[0]["metadata"]["domain"] == "law"
    reasons = left.fields["set_aside"]["reasons"]
    assert list(reasons) == ["in no source of the catalogue", "its source is left out for its licence"], "what is not read is named"
    chosen = command.curate(replace(settings, steps=(*STEPS, "select"), select=SelectConfig(sources=("rows",))), raw, tmp_path / "d", progress=False)
    assert {record["metadata"]["source"] for record in documents(chosen)} == {"rows"}


def test_removals(raw, built, tmp_path):
    records = {record["metadata"]["origin"]: record for record in documents(built)}
    listed = tmp_path / "removals.jsonl"
    by_id, by_bytes, by_text = records["lines.jsonl#0"], records["page.html"], records["text/utf8.txt"]
    new = [{"id": by_id["id"]}, {"sha256": by_bytes["metadata"]["sha256"]}, {"text_sha256": by_text["metadata"]["text_sha256"][:32], "reason": "asked"}]
    assert removals.add(listed, new) == 3 and removals.add(listed, new[:1]) == 0
    copies = [record for record in records.values() if record["text"] == by_text["text"]]
    assert len(copies) >= 3, "the same text in other encodings and files"
    found = command.curate(replace(SMALL, removals=str(listed)), raw, tmp_path / "out", progress=False)
    same = [record for record in records.values() if record["metadata"]["sha256"] == by_bytes["metadata"]["sha256"]]
    assert len(same) == 2, "the page itself, and as the crawl has it"
    gone = {by_id["id"], *(record["id"] for record in (*same, *copies))}
    assert {record["id"] for record in documents(found)} == {record["id"] for record in records.values()} - gone
    rows = {row["step"]: row for row in found.fields["steps"]}
    assert rows["read"]["dropped"] == {"removed": 3} and rows["removals"]["dropped"] == {"removed": len(copies)}
    (tmp_path / "made").mkdir()
    lines = [{"text": "요약", "derived_from": [by_id["id"]]}, {"text": "질문", "source": {"id": by_id["id"], "line": 1}}, {"text": "other", "source": "x"}]
    (tmp_path / "made/sft.jsonl").write_text("\n".join(map(json.dumps, lines)))
    derived = command.curate(replace(SMALL, removals=str(listed)), tmp_path / "made", tmp_path / "derived", progress=False)
    assert [record["text"] for record in documents(derived)] == ["other"], "what was made of a removed document goes with it"
    (tmp_path / "bad.jsonl").write_text('{"id": "xyz"}\n')
    with pytest.raises(UserError, match="line 1 is no entry"):
        removals.Removals.read(tmp_path / "bad.jsonl")


# ---- tokens and the order of samples ------------------------------------------------------------------------------------------------

def test_tokens_by_source_and_domain(raw, tmp_path):
    from megatron_ext.curate.index import read_index, split_codes
    from megatron_ext.data.index import TokenFile, document_lengths
    from megatron_ext.data.prepared import SPLITS
    from megatron_ext.data.split import document_digest, split_of
    from megatron_ext.data.tokenizer import Tokenizer

    catalogue = tmp_path / "sources.yaml"
    catalogue.write_text("sources:\n- {name: law, path: [text, law.pdf], domain: law}\n- {name: rest, path: '**'}\n")
    config = compose([f"input={raw}", f"output={tmp_path / 'tokens'}", "curate=read", "curate.task_bytes=400", "curate.workers=1", "data.vocab_size=300", "data.workers=1",
                      f"curate.ingest.catalogue={catalogue}", "data.split=[0.6,0.2,0.2]"])
    assert problems(config, "prepare") == []
    curated, prepared = command.prepare_curated(config, progress=False)
    ledger = json.loads((tmp_path / "tokens/curation.json").read_text())
    assert prepared.fields["curation"]["tokens"] == ledger["tokens"] and ledger["manifest_sha256"] == curated.sha256
    for split in SPLITS:
        rows = [row for row in ledger["tokens"] if row["split"] == split]
        assert sum(row["tokens"] for row in rows) == prepared.splits[split].tokens and sum(row["documents"] for row in rows) == prepared.splits[split].documents
        assert sum(row["bytes"] for row in rows) == prepared.splits[split].bytes
    assert {(row["source"], row["domain"]) for row in ledger["tokens"]} == {("law", "law"), ("rest", None)}
    # Every document's tokens, found by the index alone, are those of its text.
    rows, records = read_index(tmp_path / "tokens/documents.idx"), documents(curated)
    codes, tokenizer = split_codes(rows, (0.6, 0.2, 0.2)), Tokenizer.from_file(prepared.tokenizer_path)
    files = {split: TokenFile(prepared.splits[split].prefix) for split in SPLITS if prepared.splits[split].documents}
    assert all(document_lengths(file.prefix).tolist() == file.lengths.tolist() for file in files.values())
    counts = dict.fromkeys(SPLITS, 0)
    for row, code, record in zip(rows, codes, records, strict=True):
        split = SPLITS[code]
        assert split == split_of(document_digest(record["text"]), (0.6, 0.2, 0.2)) and bytes(row["id"]).hex() == record["id"]
        assert tokenizer.decode(files[split].read(counts[split])[:-1].tolist()) == record["text"]
        counts[split] += 1
    again = command.prepare_curated(config, progress=False)[1]
    assert again.fields == prepared.fields


def test_which_samples_hold_a_document():
    """Against looking into every sample."""
    lengths = np.array([5, 1, 40, 3, 0, 17, 8, 2, 30, 11])
    order = SampleOrder(lengths, sequence_length=8, seed=3)
    for epoch in range(3):
        samples = range(epoch * order.samples_per_epoch, (epoch + 1) * order.samples_per_epoch)
        for document in range(len(lengths)):
            assert order.holding(document, epoch) == [k for k in samples if any(piece.document == document for piece in order.pieces(k))], (epoch, document)
    blend = Blend([0.7, 0.3], names=["a", "b"], seed=1, period=10)
    assert all(blend.place(*blend.locate(k)) == k for k in range(50))


def test_tallies_do_not_depend_on_the_order_of_tasks():
    one, other = Tally("s"), Tally("s")
    one.add("a", blocks.dropped("x", n=2), 5, 5)
    one.add("b", blocks.CHANGED, 5, 3)
    other.add("a", blocks.KEPT, 7, 7)
    forward, back = added([one.to_json(), other.to_json()]), added([other.to_json(), one.to_json()])
    assert {key: value for key, value in forward[0].items()} == {key: value for key, value in back[0].items()}
    assert (forward[0]["in"], forward[0]["out"], forward[0]["characters_out"], forward[0]["counts"]) == (3, 2, 10, {"n": 2})


# ---- configuration ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("words", "key", "reason"), [
    (["curate.steps=[polish]"], "curate.steps", "is no step"), (["curate.steps=[language,language]"], "curate.steps", "twice"),
    (["curate.steps=[language,normalise]"], "curate.steps", "normalise goes first"), (["curate.steps=[normalise,near,privacy]"], "curate.steps", "privacy must stand before near"),
    (["curate.removals=/no/such"], "curate.removals", "is not a file"), (["curate.uses=[sale]"], "curate.uses", "must be one of commercial"),
    (["curate.ingest.max_broken=1.5"], "curate.ingest.max_broken", "below 1"), (["curate.forbidden=ask"], "curate.forbidden", "must be one of warn"),
])
def test_refused(words, key, reason):
    errors = problems(compose(["input=/tmp", *words]), "prepare")
    assert [error.key for error in errors] == [key] and reason in str(errors[0])


def test_ids_stand_for_places():
    assert document_id("s", "a", "b") != document_id("s", "a\0b", "") and document_id("s", "a", "b") == document_id("s", "a", "b")
