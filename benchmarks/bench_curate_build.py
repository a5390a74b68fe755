"""Documents and megabytes (10^6 bytes of input) a second of curation; its memory, and how both grow with workers and input.

    python benchmarks/bench_curate_build.py formats                     each reader, one process
    python benchmarks/bench_curate_build.py steps  [--documents 8000]   each step of `standard`, two workers
    python benchmarks/bench_curate_build.py growth [--documents 3000] [--workers 1 2] [--times 1 2 4]      whole builds; and `steps` of the last one
    python benchmarks/bench_curate_build.py tokens [--documents 20000] [--rounds 3]     `prepare` on shards against the tokenizers library alone

Builds read made JSON lines (curate_made.py: 1,000 characters, half Korean, a tenth with personal data, copies and rubbish as there). Each build is a command of its own; memory is the largest
of each process (VmHWM), in MiB. Rows are added to benchmarks/results/curate_build.json (--out), one key a subcommand.
"""
import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import curate_made as made
import numpy as np
from curate_measured import Measured

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
WHAT = ("formats", "steps", "growth", "tokens")


def build(raw: Path, workers: int, folder: Path) -> tuple[Measured, float]:
    """One build with every step of `standard`, without the tokens (the command is `executor`'s own main job: curate)."""
    program = "import sys; from megatron_ext.curate.command import curate; from megatron_ext.config.compose import compose; " \
              "config = compose(sys.argv[3:]); curate(config.curate, sys.argv[1], sys.argv[2], progress=False)"
    output = folder / f"out{len(list(folder.iterdir()))}"
    words = [str(raw), str(output), "curate=standard", f"curate.workers={workers}", "curate.task_bytes=1000000"]
    running = Measured(words, output.with_name(f"{output.name}.work"), folder / f"{output.name}.log", program)
    code, seconds, said = running.end()
    if code:
        raise SystemExit(said)
    return running, seconds


def growth(options: argparse.Namespace, folder: Path) -> Iterator[dict]:
    for times in options.times:
        raw = folder / f"raw{times}"
        count = options.documents * times
        size = made.planted(raw, count, options.length, files=1)["bytes"] / 1e6
        for workers in options.workers:
            running, seconds = build(raw, workers, folder)
            begin = min(first for first, _ in running.phases.values())
            yield {"input": f"{times}x", "workers": workers, "documents": count, "MB": round(size, 1), "seconds": round(seconds, 1),
                   "seconds until the first task": round(begin, 1), "processor seconds": round(running.processor, 1), "documents/s": round(count / seconds),
                   "MB/s": round(size / seconds, 2), "MiB main": round(running.peaks["main"]), "MiB worker": round(running.peaks["worker"])}
    yield from _steps(running, count, size, workers, seconds)


def steps(options: argparse.Namespace, folder: Path) -> Iterator[dict]:
    raw, workers = folder / "raw", options.workers[-1]
    size = made.planted(raw, options.documents, options.length, files=1)["bytes"] / 1e6
    running, seconds = build(raw, workers, folder)
    yield from _steps(running, options.documents, size, workers, seconds)


def _steps(running: Measured, documents: int, size: float, workers: int, seconds: float) -> Iterator[dict]:
    """Seconds in each step, over all workers; and what that makes a second with so many workers, if a step were alone."""
    for phase, rows in sorted(running.steps.items()):
        for step, took in rows.items():
            if took > 0.001:
                yield {"phase": phase, "step": step, "seconds": round(took, 2), "documents/s": round(documents * workers / took),
                       "MB/s": round(size * workers / took, 2)}
    yield {"phase": "all, by the clock", "step": "", "seconds": round(seconds, 2), "documents/s": round(documents / seconds), "MB/s": round(size / seconds, 2)}


def formats(options: argparse.Namespace, folder: Path) -> Iterator[dict]:
    import curate_files as files

    from megatron_ext.curate.ingest.config import IngestConfig
    from megatron_ext.curate.ingest.files import Readers, kind_of
    from megatron_ext.curate.ingest.items import Unreadable
    from megatron_ext.curate.ingest.records import Reading

    files.write_all(folder)
    made.write(folder / "lines.jsonl", 5000)
    (folder / "law.pdf").write_bytes(files.pdf([[f"제{page}조 이 법은 국민의 권리를 정하고 그 밖에 필요한 사항을 정한다. {line}" for line in range(40)] for page in range(20)]))
    readers = Readers()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and "bad" not in path.parts):
        def once(path=path) -> int:
            return sum(1 for _ in readers.read(path, kind_of(path.name), Reading(IngestConfig())))
        try:
            count = once()
        except Unreadable:
            continue
        begin, rounds = time.perf_counter(), 0
        while time.perf_counter() - begin < 0.5:
            once()
            rounds += 1
        seconds = (time.perf_counter() - begin) / rounds
        yield {"file": path.relative_to(folder).as_posix(), "documents": count, "ms": round(1000 * seconds, 2), "documents/s": round(count / seconds),
               "MB/s": round(path.stat().st_size / 1e6 / seconds, 2)}
    readers.close()


def tokens(options: argparse.Namespace, folder: Path) -> Iterator[dict]:
    """Both tokenise the same text with the same file and as many threads. The library alone has it in memory, keeps nothing, and is asked in the same batches, before and behind each round; `tokenising` is
    what `prepare` does (reading shards, splits, ids into files), `prepare` the whole command's half with hashes, ledger and checks."""
    from megatron_ext.config.schema import DataConfig
    from megatron_ext.curate.command import curate
    from megatron_ext.curate.config import CurateConfig
    from megatron_ext.curate.documents import read_records
    from megatron_ext.curate.tokens import Counted
    from megatron_ext.data import prepare as module
    from megatron_ext.data.tokenize import BATCH
    from megatron_ext.data.tokenizer import Tokenizer

    raw = folder / "raw"
    raw.mkdir()
    made.write(raw / "a.jsonl", options.documents, options.length, copies=0)
    found = curate(CurateConfig(steps=("normalise",), workers=1), raw, folder / "text", progress=False)
    file = module.prepare(DataConfig(vocab_size=8000, workers=1), str(found.shards), folder / "first", False, Counted(found)).tokenizer_path
    texts = [record["text"] for path in sorted(found.shards.iterdir()) for record in read_records(path)]
    size, batch = sum(len(one.encode()) for one in texts) / 1e6, max(BATCH // options.length, 1)
    inner, took = module._tokenize, []

    def timed(*words):
        begin, used = time.perf_counter(), time.process_time()
        done = inner(*words)
        took.append((time.perf_counter() - begin, time.process_time() - used))
        return done

    module._tokenize = timed
    def alone() -> tuple[float, float]:
        tokenizer = Tokenizer.from_file(file)
        begin, used = time.perf_counter(), time.process_time()
        for start in range(0, len(texts), batch):
            tokenizer.encode_batch(texts[start : start + batch])
        return time.perf_counter() - begin, time.process_time() - used

    rows, before = [], alone()
    for turn in range(options.rounds):
        begin = time.perf_counter()
        module.prepare(DataConfig(tokenizer=str(file), workers=1), str(found.shards), folder / f"again{turn}", False, Counted(found))
        whole, after = time.perf_counter() - begin, alone()
        clock, processor = (np.array(before) + after) / 2  # a machine that slows down slows one side of it as much as the other
        before, (ours, used) = after, took[-1]
        rows.append({"library alone, MB/s": size / clock, "tokenising, MB/s": size / ours, "tokenising / library": clock / ours,
                     "of the processor's time": processor / used, "prepare, MB/s": size / whole, "prepare / library": clock / whole})
        yield {"MB": round(size, 1), "documents": len(texts), "threads": len(os.sched_getaffinity(0))} | _rounded(rows[-1])
    yield {"median of rounds": len(rows)} | _rounded({name: np.median([one[name] for one in rows]) for name in rows[0]})


def _rounded(row: dict[str, float]) -> dict[str, float]:
    return {name: round(float(value), 3) for name, value in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=WHAT)
    parser.add_argument("--documents", type=int)
    parser.add_argument("--length", type=int, default=1000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--times", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "curate_build.json")
    options = parser.parse_args()
    options.documents = options.documents or {"steps": 8000, "growth": 3000, "tokens": 20_000, "formats": 0}[options.what]
    with tempfile.TemporaryDirectory() as folder:
        rows: dict[str, list] = {}
        for row in globals()[options.what](options, Path(folder)):
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            rows.setdefault("steps" if "step" in row else options.what, []).append(row)
            kept = json.loads(options.out.read_text()) if options.out.exists() else {}
            kept |= {what: {"load": round(os.getloadavg()[0], 2), "rows": found} for what, found in rows.items()}
            options.out.write_text(json.dumps(kept, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
