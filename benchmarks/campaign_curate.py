"""A million made documents through every step of `standard` and into tokens, killed twice on the way; everything that comes out is counted against what went in.

    python benchmarks/campaign_curate.py [--documents 1000000] [--workers 2] [--folder DIR] [--out benchmarks/results/curate_campaign.json]

What is planted (curate_made.py): personal data, exact and near copies, rubbish of three kinds, lines that are no JSON. Each document has a serial word of its own, so that it can be said that
none was lost and none came twice. The command is killed (SIGKILL, with its workers) when half of the reading tasks are done and again among the near duplicates. Exit code 1 if a number is wrong.
"""
import argparse
import json
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import curate_made as made
from curate_measured import ROOT, Measured

sys.path.insert(0, str(ROOT))
PERSONAL = re.compile(r"01\d-\d{3,4}-\d{4}|\d{6}-[1-8]\d{6}|@example\.kr")


def killed(words: list[str], work: Path, phase: str, tasks: int, log: Path) -> dict:
    """Runs the command until `tasks` of the phase are done, and kills it."""
    running = Measured(words, work, log)
    while running.process.poll() is None and running.done(phase) < tasks:
        time.sleep(0.2)
    if running.process.poll() is not None:
        raise SystemExit(f"it ended before it could be killed:\n{log.read_text()[-3000:]}")
    running.process.send_signal(signal.SIGKILL)
    _, seconds, _ = running.end()
    return {"seconds": round(seconds, 1), "tasks_done": len(list(work.glob("phases/*/completions/*"))), "running": running}


def checked(found: dict, output: Path, text: Path) -> dict[str, list]:
    """What should be and what is, by name; both must be equal unless a range is given."""
    from megatron_ext.curate.documents import read_records

    fields = json.loads((text / "manifest.json").read_text(encoding="utf-8"))
    kinds, rows = found["kinds"], {row["step"]: row for row in fields["steps"]}
    serials: Counter[str] = Counter()
    leaks = 0
    for path in sorted((text / "shards").iterdir()):
        for record in read_records(path):
            serials[record["text"].split(None, 1)[0]] += 1
            leaks += len(PERSONAL.findall(record["text"]))
    expected = kinds[made.PLAIN] + kinds[made.PERSONAL]
    near = kinds[made.NEAR]
    other = sum(count for reason, count in rows["quality"]["dropped"].items() if reason not in (made.SHORT, made.DIGITS, made.AGAIN))
    tokens = json.loads((output / "prepared.json").read_text(encoding="utf-8"))
    return {
        "documents read": [sum(kinds.values()) - kinds[made.BROKEN], rows["read"]["in"]],
        "set aside": [kinds[made.BROKEN], fields["set_aside"]["entries"]],
        **{f"rubbish: {kind}": [kinds[kind], rows["quality"]["dropped"].get(kind, 0)] for kind in (made.SHORT, made.DIGITS, made.AGAIN)},
        "dropped by another rule (words are drawn at random: one document in 300,000 has no two stop words)": [[0, expected // 100_000 + 1], other],
        "exact copies": [kinds[made.EXACT], rows["exact"]["dropped"].get("exact_duplicate", 0)],
        "near copies": [[round(0.999 * near), round(1.001 * near) + 1], rows["near"]["dropped"].get("near_duplicate", 0)],
        "different documents that came out, and those": [expected, len(serials) + other],
        "documents that came out twice (near copies that were not found)": [[0, near // 1000 + 1], sum(count - 1 for count in serials.values())],
        **{f"personal: {kind}": [count, rows["privacy"]["counts"].get(kind, 0)] for kind, count in sorted(found["personal"].items())},
        "personal data that was left": [0, leaks],
        "documents in the tokens": [sum(serials.values()), sum(split["documents"] for split in tokens["splits"].values())],
    }


def holds(pair: list) -> bool:
    should, is_ = pair
    return should[0] <= is_ <= should[1] if isinstance(should, list) else should == is_


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--length", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "curate_campaign.json")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="curate"))
    begin = time.perf_counter()
    found = made.planted(folder / "raw", options.documents, options.length)
    print(f"made in {time.perf_counter() - begin:.0f} s: {found}", flush=True)
    output, text = folder / "tokens", folder / "tokens-text"
    work = folder / "tokens-text.work"
    words = ["prepare", f"input={folder / 'raw'}", f"output={output}", "curate=standard", f"curate.workers={options.workers}", "curate.task_bytes=4000000",
             "data.vocab_size=8000", "data.workers=1"]
    half = found["bytes"] // 4_000_000 // 2
    parts = [killed(words, work, "00_", half, folder / "first.log")]
    print(f"killed: {parts[-1]['seconds']} s, {parts[-1]['tasks_done']} tasks done", flush=True)
    parts.append(killed(words, work, "near_buckets", 1, folder / "second.log"))
    print(f"killed: {parts[-1]['seconds']} s, {parts[-1]['tasks_done']} tasks done", flush=True)
    running = Measured(words, work, folder / "third.log")
    code, seconds, said = running.end()
    print(said, flush=True)
    if code:
        raise SystemExit(f"exit code {code}")
    runs = [*(part["running"] for part in parts), running]
    total = sum(part["seconds"] for part in parts) + seconds
    rows = checked(found, output, text)
    wrong = [name for name, pair in rows.items() if not holds(pair)]
    for name, (should, is_) in rows.items():
        print(f"{'WRONG ' if name in wrong else ''}{name}: {should} -> {is_}", flush=True)
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps({
        "command": f"python benchmarks/campaign_curate.py --documents {options.documents} --length {options.length} --workers {options.workers}",
        "documents": options.documents, "bytes": found["bytes"], "workers": options.workers, "seconds": round(total, 1), "documents_a_second": round(options.documents / total),
        "megabytes_a_second": round(found["bytes"] / 1e6 / total, 2), "killed_after": [{key: part[key] for key in ("seconds", "tasks_done")} for part in parts],
        "last_run_seconds": round(seconds, 1), "peak_MiB": {kind: round(max(one.peaks[kind] for one in runs)) for kind in ("main", "worker")},
        "together_MiB": round(max(one.together for one in runs)), "checks": {name: {"should": should, "is": is_} for name, (should, is_) in rows.items()}, "wrong": wrong,
    }, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"{options.documents:,} documents in {total:.0f} s; wrong: {', '.join(wrong) or 'nothing'}", flush=True)
    if options.folder is None:
        shutil.rmtree(folder)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
