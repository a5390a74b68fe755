"""Cleaned documents to records and on: what was removed stays out wherever it would come in, and what licences say travels along."""
import json
from pathlib import Path

import pytest
import yaml
from collecting import LAW, FakeEndpoint, collect, config, numbered, passages, read, task, write, write_tasks
from collecting import augmented as run

from megatron_ext.config.validate import validate
from megatron_ext.curate import removals
from megatron_ext.curate.documents import LineWriter, document_id, shard_name, text_sha256, to_line
from megatron_ext.curate.manifest import FORMAT, Curated
from megatron_ext.errors import UserError
from rlhf.collect import ballots
from rlhf.collect.build import build
from rlhf.collect.export import export

ID = document_id("acts", "a.txt", "")


class Plain:
    """What `documents.to_line` takes."""

    def __init__(self, name: str, text: str, **metadata: object):
        self.id, self.text, self.metadata = name, text, metadata


def law(number: int) -> str:
    return LAW.replace("시험", f"시험{number}")


def folder_of_documents(folder: Path) -> Path:
    """As `prepare curate=...` leaves one: two shards of three acts and a notice, an index, reports, and what was dropped and set aside."""
    acts = [Plain(document_id("acts", f"{name}.txt", ""), law(number), source="acts", licence="KOGL-4", owner="법제처", domain="law", language="ko", sha256=f"{number}" * 64,
                  text_sha256=text_sha256(law(number)), title=f"시험{number}법") for number, name in enumerate("abc")]
    notice = Plain(document_id("notices", "n.txt", ""), "안내\n\n도서관은 아홉 시에 엽니다. 토요일과 공휴일에는 쉽니다.", source="notices", licence="KOGL-1", domain="library", language="ko",
                   sha256="9" * 64, derived_from=["e" * 32])
    for number, documents in enumerate((acts[:2], [acts[2], notice])):
        with LineWriter(folder / "shards" / shard_name(number)) as writer:
            for one in documents:
                writer.write(to_line(one))
    (folder / "index").mkdir()
    (folder / "reports").mkdir()
    (folder / "reports" / "privacy.json").write_text("{}")
    write(folder / "dropped" / "000000.jsonl", [{"id": "x", "text": "a text that was dropped"}])
    write(folder / "set_aside.jsonl", [{"path": "x.hwp", "reason": "HWP 5"}])
    (folder / "manifest.json").write_text(json.dumps({"format": FORMAT, "settings": {"uses": []}, "sources": [
        {"name": "acts", "licence": "KOGL-4", "forbids": ["commercial", "adapt"]}, {"name": "notices", "licence": "KOGL-1", "forbids": ["redistribute"]}]}))
    return folder


def made(source: Path, out: Path, *words: str) -> dict:
    return build(config(f"input={source}", f"output={out}", "collect.passage_chars=10", *words))


def test_a_folder_of_cleaned_documents_is_read_by_its_shards_alone(tmp_path):
    source = folder_of_documents(tmp_path / "mine-text")
    found = made(source, tmp_path / "out")
    sft, passages_ = read(tmp_path / "out" / "sft.jsonl"), read(tmp_path / "out" / "passages.jsonl")
    assert len(sft) == 12 and len(passages_) == 4 and "unreadable" not in found["left_out"]
    assert sft[0]["source"] == {"id": ID, "file": "000000.jsonl.zst", "line": 1, "sha256": "0" * 64, "part": "제1조", "text_sha256": text_sha256(law(0)), "licence": "KOGL-4", "owner": "법제처",
                                "collection": "acts"}
    assert passages_[3]["source"] | {"id": 0, "sha256": 0} == {"id": 0, "file": "000001.jsonl.zst", "line": 2, "sha256": 0, "part": "passage:0", "derived_from": ["e" * 32], "licence": "KOGL-1",
                                                               "collection": "notices", "forbids": ["redistribute"]}  # the catalogue's word, not that of KOGL-1
    assert found["curated"] == [Curated.load(source).sha256] and [Path(one["file"]).name for one in found["inputs"]] == ["000000.jsonl.zst", "000001.jsonl.zst"]
    assert found["sources"] == [{"name": "acts", "licence": "KOGL-4", "owner": "법제처", "records": 3}, {"name": "notices", "licence": "KOGL-1", "forbids": ["redistribute"], "records": 1}]
    # The folder above it, and its shards by themselves, give the same records.
    (tmp_path / "above").mkdir()
    source.rename(tmp_path / "above" / "mine-text")
    for name, place in (("a", tmp_path / "above"), ("b", tmp_path / "above" / "mine-text" / "shards")):
        made(place, tmp_path / name)
        assert (tmp_path / name / "sft.jsonl").read_bytes() == (tmp_path / "out" / "sft.jsonl").read_bytes()


@pytest.mark.parametrize(("entry", "gone"), [({"id": ID}, {ID}), ({"sha256": "1" * 64}, {document_id("acts", "b.txt", "")}), ({"text_sha256": text_sha256(law(2))[:32]}, {document_id("acts", "c.txt", "")}),
                                             ({"id": "e" * 32}, {document_id("notices", "n.txt", "")})])
def test_what_was_removed_stays_out(tmp_path, entry, gone):
    source = folder_of_documents(tmp_path / "mine-text")
    removals.add(tmp_path / "gone.jsonl", [entry | {"reason": "asked by its author"}])
    words = f"curate.removals={tmp_path / 'gone.jsonl'}"
    everything, found = made(source, tmp_path / "all"), made(source, tmp_path / "out", words)
    assert found["left_out"]["removed"] == 1 and found["removals"]["entries"] == 1
    for name in ("sft.jsonl", "passages.jsonl"):
        kept = [record for record in read(tmp_path / "all" / name) if record["source"]["id"] not in gone]
        assert read(tmp_path / "out" / name) == kept
    assert "removed" not in everything["left_out"]
    # ... and out of what is made of records that were made before.
    records = read(tmp_path / "all" / "sft.jsonl")
    again = build(config(f"input={tmp_path / 'all' / 'sft.jsonl'}", f"output={tmp_path / 'again'}", words))
    kept = [record["id"] for record in records if record["source"]["id"] not in gone]
    assert [record["id"] for record in read(tmp_path / "again" / "sft.jsonl")] == kept and again["left_out"].get("removed", 0) == len(records) - len(kept)


def test_examples_and_answers_take_their_sources_along(tmp_path):
    """A record that others helped to make goes when they go."""
    ids = [f"{number:032x}" for number in range(12)]
    rows = [{"prompt": f"Q{number}?", "response": f"Answer {number}.", "source": {"id": one, "sha256": ""}, "domain": "a"} for number, one in enumerate(ids)]
    source = write(tmp_path / "rows.jsonl", rows)
    build(config(f"input={source}", f"output={tmp_path / 'few'}", "collect.builder=few_shot", "collect.shots=2"))
    prompts = read(tmp_path / "few" / "few_shot.jsonl")
    for record in prompts:
        shown = {ids[int(message["content"][1:-1])] for message in record["prompt"][:-1] if message["role"] == "user"}
        assert set(record["source"]["derived_from"]) == shown and record["source"]["id"] not in shown
    example = prompts[0]["source"]["derived_from"][0]
    removals.add(tmp_path / "gone.jsonl", [{"id": example}])
    words = f"curate.removals={tmp_path / 'gone.jsonl'}"
    # Augmented with examples, ordered as tasks, exported.
    with FakeEndpoint(lambda body, number: f"drawn {number} for {body['messages'][-1]['content']}") as endpoint:
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "sft.jsonl").write_bytes(source.read_bytes())
        asked = ("collect.template=answer", "generate.samples=2", "collect.shots=2", f"collect.examples={source}")
        run(tmp_path, endpoint, *asked)
        left = run(tmp_path, endpoint, *asked, words, name="without")
        assert left["left_out"]["removed"] == 1
        assert not any(example in json.dumps(record) for record in read(tmp_path / "without" / "answers.jsonl")) and example in (tmp_path / "out" / "answers.jsonl").read_text()
    answers = read(tmp_path / "out" / "answers.jsonl")
    assert all(len(record["source"]["derived_from"]) == 2 for record in answers)
    with_example = {record["prompt"] for record in answers if example in (record["source"]["id"], *record["source"]["derived_from"])}
    assert 1 < len(with_example) < 12
    write(tmp_path / "both" / "sft.jsonl", rows)
    write(tmp_path / "both" / "answers.jsonl", answers)
    build(config(f"input={tmp_path / 'both'}", f"output={tmp_path / 'tasks'}", "collect.builder=tasks"))
    build(config(f"input={tmp_path / 'both'}", f"output={tmp_path / 'fewer'}", "collect.builder=tasks", words))
    whole, fewer = read(tmp_path / "tasks" / "tasks.jsonl"), read(tmp_path / "fewer" / "tasks.jsonl")
    assert len(whole) == 12 and {record["prompt"] for record in fewer} == {record["prompt"] for record in whole} - with_example
    (tmp_path / "tasks" / ballots.FILE).write_text("".join(json.dumps({"event": "decide", "annotator": "kim", "task": record["id"], "at": 1, "order": [[one["id"]] for one in record["answers"]]}) + "\n"
                                                           for record in whole))
    assert export(config(f"input={tmp_path / 'tasks'}", f"output={tmp_path / 'a'}"))["outputs"][0]["records"] == 12
    found = export(config(f"input={tmp_path / 'tasks'}", f"output={tmp_path / 'b'}", words))
    assert found["left_out"] == {"removed": len(with_example)} and {record["prompt"] for record in read(tmp_path / "b" / "rankings.jsonl")} == {record["prompt"] for record in fewer}


def test_a_task_of_several_sources_is_under_all_their_licences(tmp_path):
    """Also when it is built of records again, and when a removal names the second source by its bytes."""
    def rows(name, response, licence, digest):
        return write(tmp_path / "in" / f"{name}.jsonl", [{"prompt": "Q?", "response": response, "source": {"id": name * 32, "sha256": digest * 64, "licence": licence, "collection": name}}])

    rows("a", "First.", "KOGL-1", "1")
    rows("b", "Second.", "KOGL-4", "2")
    build(config(f"input={tmp_path / 'in'}", f"output={tmp_path / 'tasks'}", "collect.builder=tasks"))
    (made,) = read(tmp_path / "tasks" / "tasks.jsonl")
    assert made["source"]["id"] == "a" * 32 and made["source"]["derived_from"] == ["b" * 32]
    assert made["source"]["also"] == [{"id": "b" * 32, "sha256": "2" * 64, "collection": "b", "licence": "KOGL-4"}]
    action = {"event": "decide", "annotator": "kim", "task": made["id"], "at": 1, "order": [[one["id"]] for one in made["answers"]]}
    (tmp_path / "tasks" / ballots.FILE).write_text(json.dumps(action) + "\n")
    places = (f"input={tmp_path / 'tasks'}", f"output={tmp_path / 'out'}")
    told = export(config(*places, "curate.uses=[commercial]"))
    assert told["warnings"] == ["b: its licence (KOGL-4) forbids: commercial"] and [one["name"] for one in told["sources"]] == ["a", "b"]
    with pytest.raises(UserError, match="holds no decision to export: licence 1"):
        export(config(*places, "curate.uses=[commercial]", "curate.forbidden=leave_out"))
    with pytest.raises(UserError, match="^curate.uses=commercial: b: its licence"):
        export(config(*places, "curate.uses=[commercial]", "curate.forbidden=refuse"))
    removals.add(tmp_path / "gone.jsonl", [{"sha256": "2" * 64}])
    with pytest.raises(UserError, match="holds no decision to export: removed 1"):
        export(config(*places, f"curate.removals={tmp_path / 'gone.jsonl'}"))
    kept = write(tmp_path / "again" / "sft.jsonl", [{"prompt": "Q?", "response": "First.", "source": made["source"]}])
    build(config(f"input={kept}", f"output={tmp_path / 'third'}", "collect.builder=qa"))
    assert [one["source"]["also"] for one in read(tmp_path / "third" / "sft.jsonl")] == [made["source"]["also"]]


def test_licences_that_forbid_a_use_are_told_refused_or_left_out(tmp_path):
    source = folder_of_documents(tmp_path / "mine-text")
    commercial = ("curate.uses=[commercial]",)
    told = made(source, tmp_path / "warn", *commercial)
    assert told["warnings"] == ["acts: its licence (KOGL-4) forbids: commercial"] and told["uses"] == ["commercial"]
    with pytest.raises(UserError, match=r"curate.uses=commercial: acts: its licence .KOGL-4. forbids: commercial. curate.forbidden=leave_out goes on without"):
        made(source, tmp_path / "refused", *commercial, "curate.forbidden=refuse")
    assert not list((tmp_path / "refused").glob("*.jsonl"))
    left = made(source, tmp_path / "left", *commercial, "curate.forbidden=leave_out")
    assert left["left_out"]["licence"] == 3 and [one["name"] for one in left["sources"]] == ["notices"] and left["warnings"] == []
    assert made(source, tmp_path / "given", "curate.uses=[redistribute]", "curate.forbidden=leave_out")["left_out"]["licence"] == 1  # by the catalogue's own word
    # It is in the records: what is made of them knows it still.
    again = build(config(f"input={tmp_path / 'warn' / 'sft.jsonl'}", f"output={tmp_path / 'again'}", "collect.builder=qa", *commercial))
    assert again["warnings"] == ["acts: its licence (KOGL-4) forbids: commercial"]
    with pytest.raises(UserError, match="holds nothing|gives nothing"):
        build(config(f"input={tmp_path / 'warn' / 'sft.jsonl'}", f"output={tmp_path / 'none'}", "collect.builder=qa", *commercial, "curate.forbidden=leave_out"))
    path = write(tmp_path / "rows.jsonl", [{"prompt": "Q?", "response": "An answer."}])
    assert "warning: rows.jsonl: nothing is known of its licence (unknown)" in collect("build", f"input={path}", f"output={tmp_path / 'r'}").stdout
    assert yaml.safe_load((tmp_path / "r" / "build.yaml").read_text())["sources"] == [{"name": "rows.jsonl", "records": 1}]


def test_the_page_does_not_show_what_was_removed(tmp_path):
    pytest.importorskip("fastapi", reason="pip install 'megatron-ext[collect]'")
    folder = write_tasks(tmp_path / "tasks", [task(0)])
    (folder / "tasks.jsonl").write_text((folder / "tasks.jsonl").read_text().replace('"doc0"', f'"{ID}"'))
    removals.add(tmp_path / "gone.jsonl", [{"id": ID}])
    done = collect("serve", f"input={folder}", "collect.annotators=[kim]", "collect.port=0", f"curate.removals={tmp_path / 'gone.jsonl'}", code=2)
    assert "holds no task that may be shown: removed 1" in done.stderr
    for words, message in ((["curate.removals=/no/such"], "curate.removals=/no/such: is not a file"), (["curate.uses=[fun]"], "curate.uses=fun: must be one of")):
        with pytest.raises(UserError, match=message):
            validate(config(f"input={folder}", "output=/tmp/x", *words), "collect build")


def test_passages_of_removed_documents_are_not_asked_about(tmp_path):
    passages(tmp_path, 3)
    rows = [record | {"source": record["source"] | {"id": ID if number == 1 else "f" * 32}} for number, record in enumerate(read(tmp_path / "in" / "passages.jsonl"))]
    write(tmp_path / "in" / "passages.jsonl", rows)
    removals.add(tmp_path / "gone.jsonl", [{"id": ID}])
    with FakeEndpoint(numbered) as endpoint:
        found = run(tmp_path, endpoint, f"curate.removals={tmp_path / 'gone.jsonl'}")
    assert len(endpoint.asked) == 2 and found["left_out"] == {"removed": 1} and found["complete"]
