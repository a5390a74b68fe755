"""Documents and megabytes (10^6 bytes of input) a second of reading and of whole builds; memory, and how both grow with workers and input.

    python benchmarks/bench_curate_build.py formats                     each reader, one process
    python benchmarks/bench_curate_build.py builds [--documents 20000] [--workers 1 2] [--times 1 2 4] [--steps normalise,language,...]
    python benchmarks/bench_curate_build.py million [--workers 2]       a million short documents through reading, normalising and exact duplicates
    python benchmarks/bench_curate_build.py tokens                      `prepare` on shards against the tokenizers library alone

Builds read JSON lines of 1,000 characters, half Korean, made from a seed: no two are alike. Memory is the largest of any process (VmHWM), in MiB. Each row is one run; --rounds repeats.
"""
import argparse
import json
import os
import random
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

KOREAN = [
    "국민", "법률", "행정", "기관", "예산", "사업", "지원", "교육", "복지", "보건", "과학", "기술", "연구", "개발", "시설", "운영", "계획", "수립",
    "시행", "평가", "결과", "보고", "자료", "정보", "공개", "신청", "처리", "기준", "절차", "대상", "기간", "금액", "방법", "내용", "사항", "규정"
]
PARTICLES = ["은", "는", "이", "가", "을", "를", "에", "의", "로", "와", "과", "도"]
ENGLISH = [
    "people", "law", "office", "budget", "project", "support", "school", "welfare", "health", "science",
    "research", "plan", "report", "result", "public", "record", "request", "rule", "method", "case", "year",
    "amount"
]


def text(draw: random.Random, korean: bool, length: int) -> str:
    """A text of about `length` characters."""
    words, size = [], 0
    while size < length:
        word = draw.choice(KOREAN) + draw.choice(PARTICLES) if korean else draw.choice(ENGLISH)
        words.append(word + (".\n" if draw.random() < 0.08 else ""))
        size += len(words[-1]) + 1
    return f"{draw.randrange(10**9)} {' '.join(words)}"


def write(path: Path, count: int, length: int = 1000, copies: float = 0.05) -> int:
    """A file of JSON lines; a share of them are copies. Returns its bytes."""
    draw, last = random.Random(count), ""
    with path.open("w", encoding="utf-8") as stream:
        for number in range(count):
            last = last if last and draw.random() < copies else text(draw, number % 2 == 0, length)
            stream.write(json.dumps({"text": last}, ensure_ascii=False) + "\n")
    return path.stat().st_size


def memory() -> float:
    """The most that this process and any that it waited for held, MiB."""
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024


def build(raw: Path, steps: tuple[str, ...], workers: int) -> tuple[float, dict]:
    """Seconds and manifest of one build."""
    from megatron_ext.curate.command import curate
    from megatron_ext.curate.config import CurateConfig

    output = raw.parent / "out"
    shutil.rmtree(output, ignore_errors=True)
    settings = CurateConfig(steps=steps, workers=workers, task_bytes=4_000_000)
    settings = replace(settings, privacy=replace(settings.privacy, morphology=os.environ.get("MORPHOLOGY", "kiwi")))
    begin = time.perf_counter()
    found = curate(settings, raw, output, progress=False)
    return time.perf_counter() - begin, found.fields


def builds(options: argparse.Namespace, folder: Path) -> Iterator[dict]:
    steps = tuple(options.steps.split(","))
    for times in options.times:
        raw = folder / f"raw{times}"
        raw.mkdir()
        size = write(raw / "a.jsonl", options.documents * times)
        for workers in options.workers:
            seconds = statistics.median(build(raw, steps, workers)[0] for _ in range(options.rounds))
            yield {"input": f"{times}x", "workers": workers, "documents": options.documents * times, "MB": round(size / 1e6, 1), "seconds": round(seconds, 2),
                   "documents/s": round(options.documents * times / seconds), "MB/s": round(size / 1e6 / seconds, 2), "MiB": round(memory())}


def million(options: argparse.Namespace, folder: Path) -> Iterator[dict]:
    raw = folder / "raw"
    raw.mkdir()
    size = write(raw / "a.jsonl", 1_000_000, length=120)
    seconds, fields = build(raw, ("normalise", "language", "exact"), options.workers[-1])
    yield {"documents in": fields["steps"][0]["in"], "out": fields["output"]["documents"], "MB": round(size / 1e6), "seconds": round(seconds, 1),
           "documents/s": round(1_000_000 / seconds), "MiB": round(memory())}


def formats(options: argparse.Namespace, folder: Path) -> Iterator[dict]:
    import curate_files as made

    from megatron_ext.curate.ingest.config import IngestConfig
    from megatron_ext.curate.ingest.files import Readers, kind_of
    from megatron_ext.curate.ingest.items import Unreadable
    from megatron_ext.curate.ingest.records import Reading

    made.write_all(folder)
    write(folder / "lines.jsonl", 5000)
    (folder / "law.pdf").write_bytes(made.pdf([[f"제{page}조 이 법은 국민의 권리를 정하고 그 밖에 필요한 사항을 정한다. {line}" for line in range(40)] for page in range(20)]))
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
    """Both read the same shards and tokenise with the same file; the library alone keeps nothing."""
    from megatron_ext.config.schema import DataConfig
    from megatron_ext.curate.command import curate
    from megatron_ext.curate.config import CurateConfig
    from megatron_ext.curate.documents import read_records
    from megatron_ext.curate.tokens import Counted
    from megatron_ext.data.prepare import prepare
    from megatron_ext.data.tokenizer import Tokenizer

    raw = folder / "raw"
    raw.mkdir()
    write(raw / "a.jsonl", options.documents)
    found = curate(CurateConfig(steps=("normalise",), workers=1), raw, folder / "text", progress=False)
    file = prepare(DataConfig(vocab_size=8000, workers=1), str(found.shards), folder / "first", False, Counted(found)).tokenizer_path
    texts = [record["text"] for path in sorted(found.shards.iterdir()) for record in read_records(path)]
    size = sum(len(one.encode()) for one in texts) / 1e6
    for turn in range(options.rounds):
        tokenizer = Tokenizer.from_file(file)
        begin = time.perf_counter()
        for start in range(0, len(texts), 1000):
            tokenizer.encode_batch(texts[start : start + 1000])
        alone = time.perf_counter() - begin
        begin = time.perf_counter()
        prepare(DataConfig(tokenizer=str(file), workers=1), str(found.shards), folder / f"again{turn}", False, Counted(found))
        whole = time.perf_counter() - begin
        yield {"MB": round(size, 1), "library alone, MB/s": round(size / alone, 2), "prepare with ledger, MB/s": round(size / whole, 2), "share": round(alone / whole, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("formats", "builds", "million", "tokens"))
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--times", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", default="normalise,language")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for row in globals()[options.what](options, Path(folder)):
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
