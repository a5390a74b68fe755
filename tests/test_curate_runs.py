"""From raw files to a trained and exported model: which samples held a document, who else saw it, and what the licences say at the end of the chain."""
import json
from dataclasses import replace
from pathlib import Path

import curate_files as made
import forked
import pytest
from small import environment

from megatron_ext.config.compose import compose, load_config
from megatron_ext.curate.command import curate
from megatron_ext.curate.documents import document_id, read_records

pytest.importorskip("datatrove")
WORDS = ("model=micro_llama", "data.sequence_length=32", "train.global_batch_size=4", "train.micro_batch_size=4", "optim.warmup_steps=1", "validation.every=0",
         "validation.at_end=false", "log.wandb=disabled", "log.report=false", "launch.ranks=1")


def run(*words: object, code: int = 0) -> str:
    done = forked.run([*map(str, words)], env=environment(), timeout=200)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    """raw -> tokens -> pretrain -> adapt, and another run on other text."""
    root = tmp_path_factory.mktemp("chain")
    for folder in ("raw", "other"):
        (root / folder).mkdir()
        lines = [json.dumps({"text": f"{made.KOREAN} {folder} {number}"}, ensure_ascii=False) for number in range(40)]
        (root / folder / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (root / "raw/notice.html").write_bytes(made.html())
    (root / "sources.yaml").write_text("sources:\n- {name: acts, path: a.jsonl, licence: KOGL-4, owner: 법제처}\n- {name: notices, path: '*.html', licence: KOGL-1}\n", encoding="utf-8")
    run("prepare", f"input={root}/raw", f"output={root}/tokens", "curate=read", f"curate.ingest.catalogue={root}/sources.yaml", "data.vocab_size=300", "data.workers=1",
        "data.split=[1,0,0]")
    run("prepare", f"input={root}/other", f"output={root}/others", "curate=read", f"data.tokenizer={root}/tokens/tokenizer.json", "data.workers=1", "data.split=[1,0,0]")
    run("train", *WORDS, f"data.path={root}/tokens", "train.steps=5", f"run.dir={root}/runs/pretrain")
    run("train", "stage=adapt", *WORDS, f"data.path={root}/others", "train.steps=3", f"run.dir={root}/runs/adapt", f"checkpoint.start={root}/runs/pretrain", "checkpoint.best=false")
    return root


def test_which_runs_saw_a_document(chain):
    """Against every sample of the run, looked into."""
    from megatron_ext.data.build import build_datasets
    from megatron_ext.data.tokenizer import Tokenizer

    records = [record for path in sorted((chain / "tokens-text/shards").iterdir()) for record in read_records(path)]
    config = load_config(chain / "runs/pretrain")
    samples, tokenizer = build_datasets(config.data, ("train",))["train"], Tokenizer.from_file(chain / "tokens/tokenizer.json")
    texts = [tokenizer.decode(samples[k].tokens.tolist()) for k in range(5 * 4)]
    for record in (records[3], records[17], records[-1]):
        said = json.loads(run("ledger", "seen", "--json", "--document", record["id"], f"run.dir={chain}/runs"))
        first, second = sorted(said["runs"], key=lambda one: one["stage"] != "pretrain")
        unique = record["text"].rsplit(" ", 2)[-1] if record["metadata"]["source"] == "acts" else None
        if unique is not None:  # a text's end is its own; a sample that holds it is among those that are told
            ends = [k for k, text in enumerate(texts) if f"raw {unique}<|endoftext|>" in text.replace("\n", " ")]
            assert set(ends) <= set(first["samples"])
        assert first["samples"] == sorted(first["samples"]) and all(k < 20 for k in first["samples"]) and first["seen"] == bool(first["samples"])
        assert second["samples"] == [] and second["seen"] == first["seen"], "the second run started from the first"
    text = run("ledger", "seen", "--document", chain / "raw/notice.html", f"run.dir={chain}/runs")
    assert "holds 1 of them: 1 in train" in text and "runs/adapt (adapt)" in text
    nobody = json.loads(run("ledger", "seen", "--json", "--document", "acts:a.jsonl#999999", f"run.dir={chain}/runs"))
    assert [one["seen"] for one in nobody["runs"]] == [False, False] and nobody["documents"] == []


def test_a_removal_reaches_the_next_build(chain):
    said = run("ledger", "remove", "--document", chain / "raw/notice.html", f"curate.removals={chain}/gone.jsonl", f"run.dir={chain}/runs")
    assert "entries added" in said and f"Until then remove: {chain}/tokens" in said
    out = run("prepare", f"input={chain}/raw", f"output={chain}/again", "curate=read", f"curate.ingest.catalogue={chain}/sources.yaml", "data.vocab_size=300", "data.workers=1",
              "data.split=[1,0,0]", f"curate.removals={chain}/gone.jsonl")
    assert "1 removed" in out and "40 documents of 41" in out
    assert "error: --document=" in run("ledger", "seen", "--document", "what", code=2)
    assert "error: curate.removals=null" in run("ledger", "remove", "--document", "0" * 32, code=2)
    assert "error: ledger=" in run("ledger", code=2)


def test_no_copy_of_a_removed_document_comes_back(tmp_path):
    """An exact copy, a near copy of that, a document of which only a paragraph was left, and one that shares a paragraph: a removal of any of the cluster takes the cluster."""
    secret = "김 아무개는 1번 병동에서 치료를 받았고 그 비용은 전부 공단이 부담하였다고 한다."
    body = [f"{number}번째 조항은 {word}에 관하여 정하며 {word}의 기준과 절차는 대통령령이 따로 정하는 바에 따른다." for number, word in enumerate(
        ("교육", "복지", "보건", "예산", "환경", "도로", "항만", "주택", "소방", "통계", "방송", "체육"))]
    common = "이 문단은 여러 문서에 함께 있는 문단이며 서른 자보다 훨씬 길어서 되풀이된 문단으로 여겨진다. 그래서 한 번만 남는다."
    whole = " ".join([*body, secret])
    texts = {"first": f"{whole}\n\n{common}", "exact": f"{whole}\n\n{common}".replace(" ", "  "), "near": f"{whole} 끝.\n\n{common}", "paragraph": f"{common}\n\n짧다",
             "shares": f"{'전혀 다른 이야기로 채워진 문서이고 위와 같은 말은 하나도 없다. ' * 3}\n\n{common}", "other": "아무 상관이 없는 문서 하나가 여기에 있다. 이것은 늘 남아야 한다."}
    (tmp_path / "raw").mkdir()
    for number, (name, text) in enumerate(texts.items()):
        (tmp_path / f"raw/{number}_{name}.txt").write_text(text, encoding="utf-8")
    words = [f"input={tmp_path}/raw", "curate=read", "curate.steps=[normalise,language,exact,near,paragraphs]", "curate.task_bytes=1", "curate.workers=1", "data.vocab_size=300",
             "data.workers=1", "data.split=[1,0,0]"]

    def left(output: str, removals: Path | None = None) -> dict[str, str]:
        """What the next build keeps, by the names above."""
        folder = tmp_path / f"{output}-text"
        if not folder.exists():
            curate(replace(compose(words[:5]).curate, removals=removals and str(removals)), tmp_path / "raw", folder, progress=False)
        records = [record for path in sorted((folder / "shards").iterdir()) for record in read_records(path)]
        return {record["metadata"]["origin"][2:-4]: record["text"] for record in records}

    run("prepare", *words, f"output={tmp_path}/tokens")
    before = left("tokens")
    assert list(before) == ["first", "shares", "other"] and common in before["first"] and common not in before["shares"]
    gone = {record["reason"]: record for path in sorted((tmp_path / "tokens-text/dropped").iterdir()) for record in read_records(path)}
    first = document_id("raw", "0_first.txt", "")
    assert sorted(gone) == ["exact_duplicate", "near_duplicate", "paragraphs_only"] and all(record["duplicate_of"] == [first] for record in gone.values())
    for asked in (f"raw:{0}_first.txt", "raw:1_exact.txt", gone["near_duplicate"]["text_sha256"], str(tmp_path / "raw/2_near.txt")):
        said = json.loads(run("ledger", "remove", "--json", "--document", asked, f"curate.removals={tmp_path}/{asked[-9:]}.jsonl", f"output={tmp_path}/tokens", f"run.dir={tmp_path}/none"))
        assert len(said["copies"]) == 3 and len(said["shared"]) == 1 and [len(one["entries"]) for one in said["documents"]] == [1], asked
    naive = tmp_path / "naive.jsonl"
    naive.write_text(json.dumps({"id": first}) + "\n")
    assert secret in " ".join(left("naive", naive)["exact"].split()), "what this is about: without its copies the content comes back"
    after = left("again", tmp_path / "exact.txt.jsonl")
    assert list(after) == ["shares", "other"] and common in after["shares"] and not any(secret[:9] in text for text in after.values())
    said = run("ledger", "remove", "--shared", "--document", "raw:0_first.txt", f"curate.removals={tmp_path}/all.jsonl", f"output={tmp_path}/tokens", f"run.dir={tmp_path}/none")
    assert "3 documents that builds dropped as copies go with it" in said and "1 documents hold paragraphs of it, and lost them to it; they are removed" in said
    assert list(left("least", tmp_path / "all.jsonl")) == ["other"]
    (tmp_path / "tokens-text").rename(tmp_path / "elsewhere")
    assert "which copies were dropped there cannot be told" in run("ledger", "seen", "--document", "raw:0_first.txt", f"output={tmp_path}/tokens", f"run.dir={tmp_path}/none")


def test_licences_reach_the_checkpoints_and_the_model_card(chain):
    from megatron_ext.checkpoint import manifest

    record = manifest.read_record(manifest.steps(chain / "runs/adapt/checkpoints")[-1])
    assert [len(one["sources"]) for one in record["curation"]] == [2, 1], "those of the run that it started from, and its own"
    assert record["curation"][0]["sources"][0] | {} == json.loads((chain / "tokens-text/manifest.json").read_text())["sources"][0]
    assert len(list((chain / "runs/pretrain/curation").iterdir())) == 1
    said = run("convert", f"checkpoint.load={chain}/runs/adapt", f"output={chain}/export")
    assert "warning: acts: its licence (KOGL-4) forbids: commercial, adapt" in said and "nothing is known of its licence (unknown)" in said
    card = (chain / "export/README.md").read_text(encoding="utf-8")
    assert "| acts | 법제처 | KOGL-4 | name the source | commercial, adapt | 40 |" in card
