"""From raw files to a trained and exported model: which samples held a document, who else saw it, and what the licences say at the end of the chain."""
import json
import subprocess
import sys
from pathlib import Path

import curate_files as made
import pytest
from small import ROOT, environment

from megatron_ext.config.compose import load_config
from megatron_ext.curate.documents import read_records

pytest.importorskip("datatrove")
WORDS = ("model=micro_llama", "data.sequence_length=32", "train.global_batch_size=4", "train.micro_batch_size=4", "optim.warmup_steps=1", "validation.every=0",
         "validation.at_end=false", "log.wandb=disabled", "log.report=false", "launch.ranks=1")


def run(*words: object, code: int = 0) -> str:
    done = subprocess.run([sys.executable, "-m", "megatron_ext", *map(str, words)], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=200)
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
