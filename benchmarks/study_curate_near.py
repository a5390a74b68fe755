"""Near duplicates: what is found at given similarities, by ours and by datatrove's own code with its own settings, on real text.

    python benchmarks/study_curate_near.py [--trials 2000] [--documents 50] [--output benchmarks/results/curate_near.json]

sets        pairs of sets of 400 numbers with a given Jaccard similarity: the hashes alone
pairs       Korean and English documents of about 1,500 characters, edited until the Jaccard similarity of their 8-character shingles is as
            given (other endings, other words, spaces lost or gained): the share that is found. And copies with other spaces alone
pipelines   a corpus of documents and edited copies of half of them: recall (copies that go, or their originals) and precision (of what
            goes, how much has its twin still there), through datatrove's stages 1 to 4 and through our step `near`

datatrove's English splits words by spaCy (`pip install spacy`, needed here alone), its Korean by Kiwi, with the model that kiwipiepy
brings (datatrove 0.10 asks for another, "sbg", which its package no longer has). What is not installed is left out.
"""
import argparse
import contextlib
import gzip
import json
import random
import re
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from curate_texts import SHARED, chat, statutes

from megatron_ext.curate.blocks import Shards
from megatron_ext.curate.quality.block import NearDuplicates
from megatron_ext.curate.quality.config import DuplicatesConfig, QualityConfig
from megatron_ext.curate.quality.duplicates import MinHash, collision, duplicates, jaccard
from megatron_ext.curate.quality.train import cut

SETS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
PAIRS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
SIZE = 1500
ENDINGS = {"ko": "은는이가을를의에", "en": "sdyrnt"}


def bases(language: str, count: int) -> list[str]:
    """Different documents of similar kinds; of real near duplicates (bills moved together share their reasons) one each."""
    if language == "ko":
        talk = "\n".join(f"{question} {answer}" for question, answer, _ in chat())
        law = [one for text in statutes().values() for one in cut(" ".join(text.split()), SIZE)]
        pool = [*law[:: max(1, 2 * len(law) // count)], *cut(talk, SIZE)]
    else:
        with gzip.open(SHARED / "hh_harmless_test.jsonl.gz", "rt", encoding="utf-8") as file:
            dialogues = [json.loads(line)["chosen"].strip() for line in file]
        plays = cut((SHARED / "tinyshakespeare.txt").read_text(encoding="utf-8"), SIZE)
        long = [one[:SIZE] for one in dialogues if len(one) > 1000]
        pool = [one for two in zip(long, plays) for one in two]
    found: list[str] = []
    kept: list[np.ndarray] = []
    for text in pool:
        own = MinHash().shingles(text)
        if len(found) < count and all(jaccard(own, other) < 0.3 for other in kept):
            found.append(text)
            kept.append(own)
    return found


def edited(text: str, share: float, language: str, draw: random.Random) -> str:
    """A share of the words changed as editors and scanners do: another ending, another word, a space lost or gained."""
    words = text.split()
    for at in sorted(draw.sample(range(len(words)), round(share * len(words))), reverse=True):
        word, kind = words[at], draw.randrange(4)
        if kind == 0:
            words[at] = re.sub(r"\w$", draw.choice(ENDINGS[language]), word)
        elif kind == 1:
            words[at] = draw.choice(words)
        elif kind == 2 and at + 1 < len(words):
            words[at : at + 2] = [word + words[at + 1]]
        elif len(word) > 1:
            words[at : at + 1] = [word[: len(word) // 2], word[len(word) // 2 :]]
    return " ".join(words)


def respaced(text: str, draw: random.Random) -> str:
    """The same letters with a third of the spaces gone and some more, as a PDF or another writer has them."""
    return "".join("" if one.isspace() and draw.random() < 0.33 else one + " " * (draw.random() < 0.04) for one in text)


def at_similarity(text: str, wanted: float, language: str, seed: str) -> tuple[str, float]:
    """An edited copy whose similarity in 8-character shingles is within .015 of `wanted` (the nearest found), and its share of edits."""
    ours, best = MinHash(), (2.0, "", 0.0)
    own, low, high = ours.shingles(text), 0.0, 1.0
    for number in range(14):
        share = (low + high) / 2
        copy = edited(text, share, language, random.Random(f"{seed} {number}"))
        found = jaccard(own, ours.shingles(copy))
        best = min(best, (abs(found - wanted), copy, share))
        low, high = (share, high) if found > wanted else (low, share)
        if best[0] < 0.005 or high - low < 0.002:
            break
    return best[1], best[2]


def theirs(language: str):
    """datatrove's stage 1 with its default settings, or None."""
    try:
        from datatrove.pipeline.dedup import MinhashDedupSignature
        from datatrove.utils.word_tokenizers import KiwiTokenizer

        step = MinhashDedupSignature(tempfile.mkdtemp(), language=language if language == "eng" else KiwiTokenizer("cong"))
        inner = step._hash_func
        step._hash_func = lambda words: inner(words.encode("utf-8"))  # the same hash; xxhash 4 takes no str, which datatrove 0.10 gives it
        step.get_shingles("one two three 하나 둘 셋 넷 다섯 여섯")
    except (ImportError, OSError, ValueError) as error:
        print(f"datatrove, {language}: left out ({type(error).__name__})")
        return None
    return step


def methods(language: str) -> dict:
    """By name: shingles of a text, signature of shingles."""
    made = {}
    for shingle, size in (("characters", 8), ("characters", 5), ("words", 5)):
        one = MinHash(DuplicatesConfig(shingle=shingle, shingle_size=size))
        made[f"ours, {size} {shingle}" + (" (default)" if (shingle, size) == ("characters", 8) else "")] = one.shingles, one.signature
    for code in ("eng", "kor") if language == "ko" else ("eng",):
        step = theirs(code)
        if step:
            made[f"datatrove, 5 words, {code}" + (" (default)" if code == "eng" else "")] = (
                lambda text, step=step: np.unique(step.get_shingles(text).ravel()),
                lambda found, step=step: np.asarray(step.get_signature(found.reshape(-1, 1)), dtype=np.uint64),
            )
    return made


def sets(trials: int) -> list[dict]:
    ours, other, rows = MinHash(), theirs("eng") or theirs("kor"), []
    print(f"sets of 400: share found, {trials} pairs each\n{'J':>5} {'1-(1-J^8)^14':>13} {'ours':>8} {'datatrove':>10}")
    for similarity in SETS:
        draw, hits = np.random.default_rng(int(100 * similarity)), [0, 0]
        for _ in range(trials):
            every = draw.integers(0, 2**63, 400, dtype=np.uint64)
            both = round(similarity * 400)
            half = both + (400 - both) // 2
            a, b = np.unique(every[:half]), np.unique(np.concatenate([every[:both], every[half:]]))
            hits[0] += duplicates(ours.signature(a), ours.signature(b))
            if other:
                one, two = (np.asarray(other.get_signature(found.reshape(-1, 1))) for found in (a, b))
                hits[1] += duplicates(one, two)
        rows.append({
            "jaccard": similarity, "formula": round(collision(similarity, buckets=14, hashes=8), 4), "ours": hits[0] / trials,
            "datatrove": hits[1] / trials if other else None,
        })
        print(f"{similarity:5.2f} {rows[-1]['formula']:13.3f} {rows[-1]['ours']:8.3f} {rows[-1]['datatrove'] or 0:10.3f}", flush=True)
    return rows


def pairs(language: str, count: int) -> list[dict]:
    texts, draw, rows = bases(language, count), random.Random(0), []
    copies = {wanted: [at_similarity(text, wanted, language, f"{at} {wanted}") for at, text in enumerate(texts)] for wanted in PAIRS}
    shares = {wanted: float(np.mean([share for _, share in found])) for wanted, found in copies.items()}
    versions = {f"{wanted}": [copy for copy, _ in found] for wanted, found in copies.items()}
    versions["spaces"] = [respaced(text, draw) for text in texts]
    print(f"\n{language}: {len(texts)} documents; words edited: {({key: round(one, 3) for key, one in shares.items()})}")
    print(f"{'share found (mean J of its shingles)':32} " + " ".join(f"{name:>12}" for name in versions) + "  different documents")
    for name, (shingles, signature) in methods(language).items():
        own = [shingles(text) for text in texts]
        signatures = [signature(one) for one in own]
        row = {"language": language, "method": name, "found": {}, "mean_jaccard": {}, "words_edited": shares}
        for version, others in versions.items():
            found = [shingles(text) for text in others]
            row["found"][version] = float(np.mean([duplicates(a, signature(b)) for a, b in zip(signatures, found)]))
            row["mean_jaccard"][version] = float(np.mean([jaccard(a, b) for a, b in zip(own, found)]))
        stacked = np.stack(signatures)
        row["different_pairs"] = len(texts) * (len(texts) - 1) // 2
        row["different_pairs_found"] = sum(int((stacked[at] == stacked[at + 1 :]).all(axis=2).any(axis=1).sum()) for at in range(len(texts)))
        rows.append(row)
        cells = [f"{row['found'][one]:.2f} ({row['mean_jaccard'][one]:.2f})" for one in versions]
        print(f"{name:32} " + " ".join(f"{cell:>12}" for cell in cells) + f"  {row['different_pairs_found']} of {row['different_pairs']}",
              flush=True)
    return rows


def pipelines(language: str, count: int) -> list[dict]:
    """Documents 0 to count - 1 are the texts, those after them copies of every second one, whose twin is `twin`."""
    texts, draw, rows = bases(language, count), random.Random(1), []
    corpus, twin = list(texts), {}
    for at in range(0, len(texts), 2):
        wanted = draw.choice((0.8, 0.9, 0.95, None))
        twin[len(corpus)] = at
        corpus.append(respaced(texts[at], draw) if wanted is None else at_similarity(texts[at], wanted, language, f"p{at}")[0])
    order = list(range(len(corpus)))
    draw.shuffle(order)
    found = {"ours, step near": _ours, "datatrove, its default (eng)": lambda one: _datatrove(one, "eng")}
    if language == "ko":
        found["datatrove, kor"] = lambda one: _datatrove(one, "kor")
    print(f"\n{language}: {len(corpus)} documents, {len(twin)} of them copies at J .8, .9, .95 or with other spaces, in random order")
    for name, run in found.items():
        start = time.monotonic()
        gone = run([corpus[at] for at in order])
        if gone is None:
            continue
        spent, out = time.monotonic() - start, {order[place] for place in gone}
        hit = sum((copy in out) != (at in out) for copy, at in twin.items())
        both = sum(copy in out and at in out for copy, at in twin.items())
        row = {"language": language, "pipeline": name, "copies": len(twin), "removed": len(out), "recall": (hit + both) / len(twin),
               "precision": hit / max(len(out), 1), "seconds": round(spent, 2)}
        rows.append(row)
        print(f"{name:32} removed {len(out):4}, recall {row['recall']:.3f}, precision {row['precision']:.3f}, {spent:.1f} s", flush=True)
    return rows


def _documents(texts: list[str]) -> list:
    from datatrove.data import Document

    return [Document(text=text, id=str(number)) for number, text in enumerate(texts)]


def _ours(texts: list[str]) -> set[int] | None:
    with tempfile.TemporaryDirectory() as folder:
        block, shards = NearDuplicates(QualityConfig()), Shards(Path(folder), 1, lambda: None, Path(folder))
        for phase in block.phases(shards):
            for rank in range(phase.tasks):
                *reading, step = phase.steps()
                list(step.run(_documents(texts) if reading else None, rank, phase.tasks) or ())
        deciding = block.decide(shards, 0)
        return {at for at, text in enumerate(texts) if deciding.process(SimpleNamespace(text=text, metadata={})).action == "drop"}


def _datatrove(texts: list[str], language: str) -> set[int] | None:
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter

    first = theirs(language)
    if first is None:
        return None
    from datatrove.io import get_datafolder

    with tempfile.TemporaryDirectory() as folder:
        paths = {name: f"{folder}/{name}" for name in ("signatures", "buckets", "gone")}
        first.output_folder = get_datafolder(paths["signatures"])
        first.run(_documents(texts), 0, 1)
        for rank in range(first.config.num_buckets):
            MinhashDedupBuckets(paths["signatures"], paths["buckets"]).run(None, rank, first.config.num_buckets)
        MinhashDedupCluster(paths["buckets"], paths["gone"]).run(None, 0, 1)
        kept = {int(one.id) for one in MinhashDedupFilter(paths["gone"]).run(_documents(texts), 0, 1)}
        return set(range(len(texts))) - kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--documents", type=int, default=50, help="of the pairs; the pipelines have four times as many")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the tables as JSON")
    options = parser.parse_args()
    with contextlib.suppress(ImportError):
        from loguru import logger

        logger.disable("datatrove")  # it tells of each bucket
    if not SHARED.exists():
        parser.exit(2, f"error: {SHARED} is not there\n")
    found = {"sets": sets(options.trials)}
    found["pairs"] = [row for language in ("ko", "en") for row in pairs(language, options.documents)]
    found["pipelines"] = [row for language in ("ko", "en") for row in pipelines(language, 4 * options.documents)]
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
