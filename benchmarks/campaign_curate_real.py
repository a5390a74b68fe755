"""Curation over the real data of ../shared/data, end to end: writes docs/curate_campaign.md. Exit code 1 when anything is not as it should be.

    python benchmarks/campaign_curate_real.py [--kills 10] [--seed 1] [--page docs/curate_campaign.md]

Korean statutes and bills, Korean questions and answers, English text and dialogues, in several formats and encodings, go through every step of `standard`. One build is left alone; one runs with
two workers; one is killed at seeded random moments and goes on each time. All three must be the same bytes. Then `train stage=pretrain`, `adapt` and `sft` run on what came out, and the ledger is asked.
"""
import argparse
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
SMALL = ("model=micro_llama", "data.sequence_length=128", "train.global_batch_size=8", "train.micro_batch_size=8", "optim.warmup_steps=2", "validation.every=0",
         "validation.at_end=true", "checkpoint.best=false", "log.wandb=disabled", "launch.ranks=1")
CATALOGUE = """\
sources:
- {name: statutes, path: statutes/**, owner: 대한민국, licence: no-copyright, domain: law, language: ko}
- {name: talk, path: talk.csv, owner: songys, licence: MIT, language: ko, text: [Q, A]}
- {name: plays, path: plays.txt.gz, licence: public-domain, language: en}
- {name: dialogues, path: dialogues.jsonl, owner: Anthropic, licence: MIT, text: [chosen]}
"""


def raw(folder: Path) -> None:
    """The files as they might be delivered: CP949, a zip-like mix, a line a dialogue."""
    (folder / "statutes").mkdir(parents=True)
    for number, path in enumerate(sorted((SHARED / "ko_public").glob("*.txt"))):
        text = path.read_text(encoding="utf-8", errors="replace")
        content = text.encode("cp949", "replace") if number % 2 else text.encode("utf-8")
        (folder / "statutes" / path.name).write_bytes(content)
    (folder / "talk.csv").write_bytes((SHARED / "chatbot_ko.csv").read_text(encoding="utf-8").encode("cp949", "replace"))
    parts = (SHARED / "tinyshakespeare.txt").read_bytes()
    (folder / "plays.txt.gz").write_bytes(gzip.compress(parts, mtime=0))
    with gzip.open(SHARED / "hh_harmless_test.jsonl.gz", "rb") as stream:
        (folder / "dialogues.jsonl").write_bytes(stream.read())


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "megatron_ext", *map(str, words)]


def run(*words: object) -> str:
    done = subprocess.run(command(*words), cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def killed(words: list[str], output: Path, kills: int, seed: int) -> int:
    """Runs a `prepare` that is killed again and again; how many kills found it at work."""
    draw, hits = random.Random(seed), 0
    for _ in range(kills):
        process = subprocess.Popen(command("prepare", *words, f"output={output}"), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + draw.uniform(2, 12)
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        if process.poll() is None:
            hits += 1
        process.send_signal(signal.SIGKILL)
        process.wait()
    run("prepare", *words, f"output={output}")
    return hits


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "curate_campaign.md")
    options = parser.parse_args()
    if not SHARED.is_dir():
        raise SystemExit(f"{SHARED} is not here")
    folder = Path(tempfile.mkdtemp(prefix="curate"))
    raw(folder / "raw")
    (folder / "sources.yaml").write_text(CATALOGUE, encoding="utf-8")
    words = [f"input={folder / 'raw'}", "curate=standard", f"curate.ingest.catalogue={folder / 'sources.yaml'}", "curate.task_bytes=100000", "data.vocab_size=2000",
             f"curate.removals={folder / 'removals.jsonl'}"]
    (folder / "removals.jsonl").write_text("")
    begin = time.perf_counter()
    said = run("prepare", *words, "curate.workers=1", f"output={folder / 'one'}")
    seconds = time.perf_counter() - begin
    run("prepare", *words, "curate.workers=2", f"output={folder / 'two'}")
    hits = killed([*words, "curate.workers=2"], folder / "killed", options.kills, options.seed)
    same = content(folder / "one-text") == content(folder / "two-text") == content(folder / "killed-text")
    manifest = json.loads((folder / "one-text/manifest.json").read_text())
    train = [
        run("train", "stage=pretrain", *SMALL, f"data.path={folder / 'one'}", "train.steps=30", f"run.dir={folder / 'runs/pretrain'}"),
        run("train", "stage=adapt", *SMALL, f"data.path={folder / 'one'}", "train.steps=10", f"run.dir={folder / 'runs/adapt'}", f"checkpoint.start={folder / 'runs/pretrain'}"),
        run("train", "stage=sft", *SMALL, f"data.path={folder / 'one'}", "train.steps=10", f"run.dir={folder / 'runs/sft'}", f"checkpoint.start={folder / 'runs/adapt'}",
            f"chat.path={SHARED / 'chatbot_ko.csv'}", "chat.prompt_key=Q", "chat.response_key=A"),
    ]
    asked = run("ledger", "seen", "--document", "statutes:statutes/constitution.txt", f"run.dir={folder / 'runs'}")
    rows = [f"| {row['step']} | {row['in']:,} | {row['out']:,} | {row['changed']:,} | "
            + ", ".join(f"{count:,} {reason}" for reason, count in sorted(row["dropped"].items())) + " |" for row in manifest["steps"] if not row["step"].startswith("write_")]
    tokens = [f"| {row['split']} | {row['source']} | {row['domain'] or ''} | {row['documents']:,} | {row['tokens']:,} |"
              for row in json.loads((folder / "one/curation.json").read_text())["tokens"]]
    options.page.write_text("\n".join([
        "# Curation of the real data", "", f"`python benchmarks/campaign_curate_real.py --kills {options.kills} --seed {options.seed}` writes this page.", "",
        f"{manifest['input']['files']} files, {manifest['input']['bytes']:,} bytes, in {seconds:.0f} s with one worker.",
        f"One worker, two workers, and {hits} SIGKILLs at random moments: {'the same bytes' if same else 'NOT the same bytes'}.", "",
        "| step | in | out | changed | dropped |", "|---|---|---|---|---|", *rows, "", "| split | source | domain | documents | tokens |", "|---|---|---|---|---|", *tokens, "",
        f"Then pretrain, adapt and sft ran on it ({len(train)} stages).", "", "```", *asked.replace(str(folder), "").strip().splitlines(), "```", ""]), encoding="utf-8")
    print(said, asked, f"same bytes: {same}, kills that hit: {hits}", sep="\n")
    shutil.rmtree(folder)
    sys.exit(0 if same and "saw it" in asked else 1)


if __name__ == "__main__":
    main()
