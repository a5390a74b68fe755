"""How fast data is collected: `build` at 1x, 2x, 4x, `augment` over an endpoint that replies at once, and the desk with 50,000 tasks.

    python benchmarks/bench_collect.py [--documents 500] [--replies 500] [--tasks 50000] [--decisions 200]

One process. Prints JSON: documents and MB (of input) a second, and the peak of memory over that at the start, for each size; replies a second
(each fsynced into the cache), with httpx alone against the same endpoint beside it; seconds to open a desk with its tasks and earlier decisions, and
milliseconds of a decision with the state that follows it (two fsyncs: the decision, and the next task being opened), medians.
"""
import argparse
import asyncio
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent / "tests")]

LINE = "제{number}조(항목 {number}) 이 조는 문서 {which}의 {number}번째 항목에 관한 사항을 정하며, 그 밖에 필요한 사항은 따로 정한다. "


def documents(path: Path, count: int) -> int:
    """Statutes of about 4 kB, all different. Returns bytes."""
    with path.open("w", encoding="utf-8") as stream:
        for which in range(count):
            text = f"시험법 {which}\n\n" + "\n".join(LINE.format(number=number, which=which) for number in range(1, 21))
            stream.write(json.dumps({"text": text, "id": f"doc/{which}", "metadata": {"title": f"시험법 {which}", "domain": "law"}}, ensure_ascii=False) + "\n")
    return path.stat().st_size


def built(folder: Path, count: int) -> dict:
    """In a process of its own, so that its peak of memory is its own."""
    size = documents(folder / f"{count}.jsonl", count)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        from megatron_ext.config.compose import compose
        from rlhf.collect.build import build

        config = compose((f"input={folder / f'{count}.jsonl'}", f"output={folder / f'out{count}'}"))
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        found = build(config)
        seconds = time.perf_counter() - start
        facts = {"documents": count, "records": sum(one["records"] for one in found["outputs"]), "seconds": round(seconds, 3), "documents_a_second": round(count / seconds),
                 "MB_a_second": round(size / 1e6 / seconds, 2), "peak_over_start_MB": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, 1)}
        os.write(writer, json.dumps(facts).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    return json.loads(os.read(reader, 1 << 16))


def augmented(folder: Path, count: int) -> dict:
    import httpx
    from collecting import FakeEndpoint, write

    from megatron_ext.config.compose import compose
    from rlhf.collect.augment import Augmentation, augment
    from rlhf.collect.endpoint import Endpoint

    write(folder / "passages.jsonl", [{"id": f"p{number}", "passage": f"문서 {number}의 본문입니다. " * 20} for number in range(count)])
    with FakeEndpoint(lambda body, number: json.dumps([{"question": f"질문 {number}?", "answer": "답변입니다."}], ensure_ascii=False)) as endpoint:
        config = compose((f"input={folder / 'passages.jsonl'}", f"output={folder / 'augmented'}", f"collect.endpoint={endpoint.url}", "collect.model=m"))
        start = time.perf_counter()
        augment(Augmentation.of(config, ()), "m", lambda: Endpoint(config.collect))
        ours = time.perf_counter() - start
        bodies = list(endpoint.asked)

        async def bare() -> None:
            waiting = iter(bodies)
            async with httpx.AsyncClient(timeout=60) as client:
                async def work() -> None:
                    for body in waiting:
                        (await client.post(f"{endpoint.url}/chat/completions", json=body)).json()

                await asyncio.gather(*(work() for _ in range(config.collect.concurrency)))

        start = time.perf_counter()
        asyncio.run(bare())
        alone = time.perf_counter() - start
    return {"replies": count, "concurrency": config.collect.concurrency, "replies_a_second": round(count / ours), "httpx_alone": round(count / alone)}


def desk(folder: Path, tasks: int, decisions: int) -> dict:
    from collecting import task, write_tasks

    from megatron_ext.config.schema import CollectConfig
    from rlhf.collect import ballots
    from rlhf.collect import tasks as files
    from rlhf.collect.desk import Desk
    from rlhf.collect.log import AppendLog

    write_tasks(folder, [task(number, answers=4, domain=f"domain {number % 6}") for number in range(tasks)])
    # Half of them ordered already, a tenth of those by two.
    with (folder / ballots.FILE).open("w", encoding="utf-8") as stream:
        for number in range(tasks // 2):
            for name in ("kim", "lee")[: 1 + (number % 10 == 0)]:
                stream.write(json.dumps({"event": "decide", "annotator": name, "task": f"t{number:04d}", "at": 0, "order": [["a0"], ["a1"], ["a2"], ["a3"]]}) + "\n")
    start = time.perf_counter()
    loaded = files.load(folder / "tasks.jsonl")
    with AppendLog(folder / ballots.FILE, key="x") as log:
        at = Desk(loaded, log, CollectConfig())
        at.state("kim")
        opened, times = time.perf_counter() - start, []
        for number in range(decisions):
            name = ("kim", "lee", "park", "choi")[number % 4]
            found = at.current(name)
            start = time.perf_counter()
            at.decide(name, found.id, [[answer.id] for answer in found.answers])
            json.dumps(at.state(name))
            times.append(time.perf_counter() - start)
    times.sort()
    return {"tasks": tasks, "decided_before": tasks // 2, "open_seconds": round(opened, 2), "decision_ms": round(statistics.median(times) * 1e3, 2),
            "decision_ms_p99": round(times[len(times) * 99 // 100] * 1e3, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("documents", 500), ("replies", 500), ("tasks", 50_000), ("decisions", 200)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {"build": [built(Path(folder), options.documents * factor) for factor in (1, 2, 4)]}
        (Path(folder) / "a").mkdir()
        found["augment"] = augmented(Path(folder) / "a", options.replies)
        (Path(folder) / "d").mkdir()
        found["desk"] = desk(Path(folder) / "d", options.tasks, options.decisions)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
