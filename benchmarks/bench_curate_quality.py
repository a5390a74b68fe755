"""Documents and megabytes (10^6 bytes of UTF-8) a second of each step of quality and taxonomy, on real text of ../shared/data.

    python benchmarks/bench_curate_quality.py [--documents 2000] [--workers 1] [--rounds 3] [--steps minhash ...] [--output benchmarks/results/curate_quality.json]

Documents are statutes, bills, talk, Shakespeare and dialogues, joined and cut to about 2,000 characters, half of them Korean. With several
workers each has its share of the documents, and the time is that until the last one is done; processes are started before the clock. In
turns, the median of the rounds. "datatrove" rows are its own blocks on the same documents, where it is installed.
"""
import argparse
import gzip
import json
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from curate_texts import SHARED, chat, statutes

SIZE = 2000


def documents(count: int) -> list[str]:
    """`count` documents, the same at each call: passages of real text, each with a word of its own so that no two are equal."""
    from megatron_ext.curate.quality.train import cut

    korean = [*statutes().values(), "\n".join(f"{question}\n{answer}" for question, answer, _ in chat())]
    with gzip.open(SHARED / "hh_harmless_test.jsonl.gz", "rt", encoding="utf-8") as file:
        english = [json.loads(line)["chosen"].strip() for line in file]
    english = ["\n\n".join(english), (SHARED / "tinyshakespeare.txt").read_text(encoding="utf-8")]
    draw, pools = random.Random(0), [[passage for text in texts for passage in cut(text, SIZE)] for texts in (korean, english)]
    found = []
    for number in range(count):
        text = draw.choice(pools[number % 2])
        found.append(f"{text}\n문서 {draw.randrange(10**9)} document.")
    return found


def model_files(folder: Path) -> dict[str, str]:
    """A language model of statutes and talk, an index of 1,000 talk questions, a domain model: what steps load."""
    from megatron_ext.curate.quality.decontaminate import Index
    from megatron_ext.curate.quality.train import fit
    from megatron_ext.curate.taxonomy.examples import SEED, read
    from megatron_ext.curate.taxonomy.train import fit as fit_domains

    fit([*statutes().values(), "\n".join(answer for _, answer, _ in chat())]).save(folder / "model.npz")
    Index.of_texts(f"{question} {answer}" for question, answer, _ in chat()[:1000]).save(folder / "index.npz")
    fit_domains(read(SEED)).save(folder / "domains.npz")
    return {"model": str(folder / "model.npz"), "index": str(folder / "index.npz"), "domains": str(folder / "domains.npz")}


def steps(files: dict[str, str]) -> dict[str, Callable[[], Callable[[str], object]]]:
    """By name: makes, in the process that uses it, a function of one text."""
    from megatron_ext.curate.quality import boilerplate, duplicates, heuristics, lists, repetition, text
    from megatron_ext.curate.quality.block import Quality
    from megatron_ext.curate.quality.config import LanguageModelConfig, QualityConfig
    from megatron_ext.curate.quality.decontaminate import Index
    from megatron_ext.curate.quality.judge import Judge
    from megatron_ext.curate.quality.language_model import NgramModel
    from megatron_ext.curate.taxonomy.classifier import Classifier

    def quality():
        step = Quality(QualityConfig(language_model=LanguageModelConfig(path=files["model"])))
        return lambda one: step.process(Page(one))

    def minhash():
        made = duplicates.MinHash()
        return lambda one: made.signature(made.shingles(one))

    return {
        "boilerplate": lambda: boilerplate.clean,
        "heuristics": lambda: lambda one: heuristics.judge(one, korean=text.is_korean(one)),
        "repetition": lambda: lambda one: repetition.repeated(one, korean=text.is_korean(one)),
        "lists": lambda: lists.opened("toxic_ko", "toxic_en", "bias_ko", "bias_en").find,
        "language model, perplexity": lambda: NgramModel.load(files["model"]).score,
        "language model, with word order": lambda: Judge(NgramModel.load(files["model"]), LanguageModelConfig()).look,
        "quality (all of these)": quality,
        "exact key": lambda: duplicates.exact_key,
        "paragraph keys": lambda: lambda one: duplicates.paragraph_keys(one, least=40),
        "minhash": minhash,
        "decontaminate": lambda: Index.load(files["index"]).hits,
        "taxonomy": lambda: Classifier.load(files["domains"]).classify,
        "datatrove minhash, English": lambda: _datatrove_minhash("eng"),
        "datatrove Gopher repetition": lambda: _datatrove_filter("gopher_repetition_filter", "GopherRepetitionFilter"),
        "datatrove Gopher quality": lambda: _datatrove_filter("gopher_quality_filter", "GopherQualityFilter"),
    }


class Page:
    def __init__(self, text: str):
        self.text, self.metadata, self.id, self.media = text, {}, "", []


def _datatrove_minhash(language: str):
    from datatrove.pipeline.dedup import MinhashDedupSignature

    step = MinhashDedupSignature(output_folder=tempfile.mkdtemp(), language=language)
    return lambda one: step.get_signature(step.get_shingles(one))


def _datatrove_filter(module: str, name: str):
    import importlib

    from datatrove.data import Document

    step = getattr(importlib.import_module(f"datatrove.pipeline.filters.{module}"), name)()
    return lambda one: step.filter(Document(text=one, id=""))


def _worker(name: str, files: dict[str, str], count: int, number: int, workers: int, barrier, results) -> None:
    try:
        function = steps(files)[name]()
        own = documents(count)[number::workers]
        function(own[0])  # what is loaded at the first text
    except (ImportError, OSError, ValueError, TypeError) as error:  # a package that is missing, or one that does not fit another
        results.put((number, type(error).__name__))
        barrier.abort()
        return
    barrier.wait()
    start = time.monotonic()
    for one in own:
        function(one)
    results.put((number, (start, time.monotonic())))


def seconds(name: str, files: dict[str, str], count: int, workers: int) -> float | str:
    """From the first worker's start to the last one's end; or why it cannot be."""
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(workers), context.Queue()
    processes = [context.Process(target=_worker, args=(name, files, count, number, workers, barrier, results)) for number in range(workers)]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    failed = [one for _, one in found if isinstance(one, str)]
    return failed[0] if failed else max(end for _, (_, end) in found) - min(start for _, (start, _) in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the table as JSON")
    options = parser.parse_args()
    if not SHARED.exists():
        parser.exit(2, f"error: {SHARED} is not there\n")
    size = sum(len(one.encode()) for one in documents(options.documents)) / 1e6
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = model_files(Path(folder))
        known = list(steps(files))
        unknown = [name for name in options.steps if name not in known]
        if unknown:
            parser.exit(2, f"error: {unknown[0]} is none of {', '.join(known)}\n")
        taken = {name: [] for name in options.steps or known}
        for _ in range(options.rounds):
            for name, found in taken.items():
                if not found or not isinstance(found[0], str):
                    found.append(seconds(name, files, options.documents, options.workers))
    print(f"{options.documents:,} documents, {size:.1f} MB, {options.workers} worker(s), median of {options.rounds} rounds")
    print(f"{'step':32} {'documents/s':>12} {'MB/s':>8}")
    for name, found in taken.items():
        if isinstance(found[0], str):
            print(f"{name:32} {found[0]:>21}")
            continue
        spent = statistics.median(found)
        rows.append({"step": name, "workers": options.workers, "documents": options.documents, "mb": round(size, 3),
                     "seconds": round(spent, 4), "documents_per_s": round(options.documents / spent, 1), "mb_per_s": round(size / spent, 3)})
        print(f"{name:32} {options.documents / spent:12,.0f} {size / spent:8.2f}")
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
