"""From the real files of ../shared/data, as they might be delivered, to three stages of training: and the ledger says which of them saw which document.

Where the shared files are not (a fresh clone elsewhere), made ones of the same kinds stand for them.
"""
import csv
import gzip
import io
import json
from pathlib import Path

import curate_files as made
import forked
import pytest
from curate_texts import SHARED
from small import environment

from megatron_ext.curate.documents import document_id, read_records

pytest.importorskip("datatrove")
pytest.importorskip("kiwipiepy")
TRAIN = ("model=micro_llama", "data.sequence_length=64", "train.global_batch_size=4", "train.micro_batch_size=4", "train.steps=3", "optim.warmup_steps=1", "validation.every=0",
         "validation.at_end=false", "checkpoint.best=false", "log.wandb=disabled", "log.report=false", "launch.ranks=1")
CATALOGUE = """\
sources:
- {name: statutes, path: statutes/**, owner: 국회, licence: no-copyright, domain: law, language: ko}
- {name: talk, path: talk.csv, owner: songys, licence: MIT, language: ko, text: [Q, A]}
- {name: plays, path: plays.txt.gz, licence: public-domain, language: en}
"""


def run(*words: object) -> str:
    done = forked.run([*map(str, words)], env=environment(), timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def texts() -> tuple[dict[str, str], list[tuple[str, str]], str]:
    """Statutes and bills by name, questions with answers, English text."""
    if SHARED.is_dir():
        public = {path.stem: path.read_text(encoding="utf-8") for path in sorted((SHARED / "ko_public").glob("*.txt"))}
        with open(SHARED / "chatbot_ko.csv", encoding="utf-8-sig", newline="") as stream:
            talk = [(row["Q"], row["A"]) for row in csv.DictReader(stream)][:200]
        return {name: public[name] for name in ("constitution", "1809890", "1809896", "1809899")}, talk, (SHARED / "tinyshakespeare.txt").read_text(encoding="utf-8")[:20_000]
    law = "".join(f"제{number}조(제목 {number}) ① {made.KOREAN.splitlines()[1]} 이것은 {number}번째 조문이며 다른 조문과 다르다.\n" for number in range(1, 60))
    bill = "".join(f"의안 제{number}호는 {made.KOREAN.splitlines()[0]} 이에 제안이유를 설명한다.\n" for number in range(1, 40))
    return {"constitution": law, "bill": bill}, [(f"{number}번 창구는 어디인가요", f"{number}층에 있습니다") for number in range(50)], made.ENGLISH * 40


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("real")
    statutes, talk, plays = texts()
    (root / "raw/statutes").mkdir(parents=True)
    for number, (name, text) in enumerate(statutes.items()):
        (root / f"raw/statutes/{name}.txt").write_bytes(text.encode("cp949", "replace") if number % 2 else text.encode())
    table = io.StringIO()
    csv.writer(table).writerows([("Q", "A"), *talk])
    (root / "raw/talk.csv").write_bytes(table.getvalue().encode("cp949", "replace"))
    (root / "raw/plays.txt.gz").write_bytes(gzip.compress(plays.encode(), mtime=0))
    (root / "sources.yaml").write_text(CATALOGUE, encoding="utf-8")
    one = (f"input={root}/raw", "curate=standard", "curate.workers=1", f"curate.ingest.catalogue={root}/sources.yaml", "curate.quality.heuristics=false", "data.workers=1",
           "data.split=[1,0,0]")  # questions of one line are no documents to the rules of Gopher
    run("prepare", *one, f"output={root}/korean", "data.vocab_size=600", "curate.select.languages=[ko]")
    run("prepare", *one, f"output={root}/english", f"data.tokenizer={root}/korean/tokenizer.json", "curate.select.languages=[en]")
    run("train", *TRAIN, f"data.path={root}/english", f"run.dir={root}/runs/pretrain")
    run("train", "stage=adapt", *TRAIN, f"data.path={root}/korean", f"run.dir={root}/runs/adapt", f"checkpoint.start={root}/runs/pretrain")
    run("collect", "build", f"input={root}/korean-text/shards", f"output={root}/asked")
    run("train", "stage=sft", *TRAIN, f"data.path={root}/korean", f"chat.path={root}/asked/sft.jsonl", f"run.dir={root}/runs/sft", f"checkpoint.start={root}/runs/adapt")
    return root


def test_what_was_delivered_is_in_the_tokens(chain):
    ledger = json.loads((chain / "korean/curation.json").read_text(encoding="utf-8"))
    statutes, talk, plays = texts()
    rows = {(row["source"], row["domain"]): row for row in ledger["tokens"]}
    steps = {row["step"]: row for row in ledger["manifest"]["steps"]}
    assert set(rows) == {("statutes", "law"), ("talk", None)} and all(row["tokens"] > row["documents"] for row in rows.values())
    assert steps["read"]["in"] == len(statutes) + len(talk) + 1 and steps["select"]["dropped"] == {"other_language": 1} and ledger["manifest"]["set_aside"]["entries"] == 0
    assert [row["source"] for row in json.loads((chain / "english/curation.json").read_text())["tokens"]] == ["plays"]
    (english,) = [record for path in (chain / "english-text/shards").iterdir() for record in read_records(path)]
    assert english["metadata"]["licence"] == "public-domain" and english["text"][:40] == plays.strip()[:40]


def test_the_ledger_knows_which_stage_saw_what(chain):
    def seen(document: object) -> dict[str, dict]:
        said = json.loads(run("ledger", "seen", "--json", "--document", document, f"run.dir={chain}/runs"))
        return {one["stage"]: one for one in said["runs"]}

    law = seen("statutes:statutes/constitution.txt")
    assert not law["pretrain"]["seen"] and law["adapt"]["samples"] and any("records made of it" in one for one in law["sft"]["reasons"])
    assert any("started from" in one for one in law["sft"]["reasons"])
    plays = seen(chain / "raw/plays.txt.gz")
    assert plays["pretrain"]["samples"] and all(any("started from" in one for one in plays[stage]["reasons"]) for stage in ("adapt", "sft"))
    assert not plays["adapt"]["samples"]
    nothing = seen("statutes:statutes/none.txt")
    assert [one["seen"] for one in nothing.values()] == [False] * 3


def test_what_was_made_of_a_removed_document_goes_with_it(chain):
    """A removal of a statute takes the SFT records that were built from it, when these are read as documents."""
    run("ledger", "remove", "--document", "statutes:statutes/constitution.txt", f"curate.removals={chain}/gone.jsonl", f"run.dir={chain}/runs")
    whole = (chain / "asked/sft.jsonl").read_text(encoding="utf-8").splitlines()
    made_of = [line for line in whole if document_id("statutes", "statutes/constitution.txt", "") in line]
    assert made_of and len(made_of) < len(whole)
    run("prepare", f"input={chain}/asked/sft.jsonl", f"output={chain}/again", "curate=read", "curate.ingest.text_fields=[prompt,response]", "curate.workers=1", "data.workers=1",
        f"data.tokenizer={chain}/korean/tokenizer.json", "data.split=[1,0,0]", f"curate.removals={chain}/gone.jsonl")
    rows = {row["step"]: row for row in json.loads((chain / "again-text/manifest.json").read_text())["steps"]}
    assert rows["read"]["dropped"] == {"removed": len(made_of)} and rows["write"]["out"] == len(whole) - len(made_of)
