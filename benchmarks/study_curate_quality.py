"""The measurements behind the defaults of quality and taxonomy (docs/curate_quality.md), on real text of ../shared/data. Near duplicates are
study_curate_near.py.

    python benchmarks/study_curate_quality.py model      units and orders: AUC against shuffled words, sizes, speed
    python benchmarks/study_curate_quality.py rules      statutes under the rules; morphemes in an eojeol, where kiwipiepy is installed
    python benchmarks/study_curate_quality.py domains    the domain classifier on labels that it has not seen
"""
import random
import re
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from curate_texts import auc, chat, shuffled, statutes


def model() -> None:
    """Each of the eleven files under a model of the other ten, in passages of 1,000 characters and of 300, and whole."""
    from megatron_ext.curate.quality.train import cut, fit

    texts = statutes()
    print(f"{'units':11} {'order':>5} | AUC perplexity: {'whole':>6} {'1000':>6} {'300':>6} | word order: {'1000':>6} {'300':>6} |"
          " n-grams     MB/s")
    for kind, orders in (("characters", (3, 4, 5, 6, 8)), ("jamo", (8, 12)), ("words", (2, 3)), ("pieces", (2, 3))):
        for order in orders:
            found = {size: ([], [], [], []) for size in (None, 1000, 300)}
            spent = read = ngrams = 0.0
            for name, text in texts.items():
                made = fit([other for key, other in texts.items() if key != name], kind=kind, order=order)
                ngrams += sum(made.about["ngrams"]) / len(texts)
                flat = " ".join(text.split())
                for size, lists in found.items():
                    for number, passage in enumerate(cut(flat, size) if size else [flat]):
                        start = time.perf_counter()
                        true = made.score(passage)
                        spent, read = spent + time.perf_counter() - start, read + len(passage.encode())
                        false = made.score(shuffled(passage, number))
                        orders_worth = made.word_order(passage, true), made.word_order(shuffled(passage, number))
                        for values, value in zip(lists, (true.perplexity, false.perplexity, *orders_worth)):
                            values.append(value)
            by_perplexity = [auc(found[size][0], found[size][1]) for size in (None, 1000, 300)]
            by_gain = [auc(found[size][3], found[size][2]) for size in (1000, 300)]
            print(f"{kind:11} {order:5} | {'':16}{by_perplexity[0]:6.3f} {by_perplexity[1]:6.3f} {by_perplexity[2]:6.3f} | {'':11}"
                  f"{by_gain[0]:6.3f} {by_gain[1]:6.3f} | {ngrams:7,.0f} {read / spent / 1e6:8.2f}", flush=True)
    made, draw = fit(texts.values()), random.Random(0)
    talk = [f"{question} {answer}" for question, answer, _ in draw.sample(chat(), 500)]
    letters = sorted({letter for text in talk for letter in text})
    noise = {
        "talk": talk, "talk, words shuffled": [shuffled(text) for text in talk],
        "letters of talk at random": ["".join(draw.choice(letters) for _ in text) for text in talk],
        "syllables at random": ["".join(chr(draw.randint(0xAC00, 0xD7A3)) if one != " " else one for one in text) for text in talk],
    }
    scores = {name: [made.score(text).perplexity for text in found] for name, found in noise.items()}
    print(f"\nmodel of the eleven files, held-out 95th percentile {made.about['held_out']['perplexity']['95']:.0f}")
    for name, found in scores.items():
        shares = " ".join(f"{np.percentile(found, q):9,.0f}" for q in (5, 50, 95))
        print(f"{name:28} perplexity 5/50/95 %: {shares}   AUC against talk {auc(scores['talk'], found):.4f}")


def rules() -> None:
    from megatron_ext.curate.quality import heuristics, repetition
    from megatron_ext.curate.quality.text import lines, paragraphs

    texts = {**statutes(), "talk": "\n".join(f"{question} {answer}" for question, answer, _ in chat())}
    print(f"{'text':14} {'words':>7} {'length':>6} {'letters':>7} {'ended':>6} {'short':>6} {'breaks':>6} {'runs':>6} {'lines':>6} {'paras':>6}"
          "  verdicts")
    for name, text in texts.items():
        words, found = text.split(), lines(text)
        ended = sum(1 for line in found if heuristics._ends(line, True)) / len(found)
        short = sum(1 for line in found if len(line) <= heuristics.KOREAN.short_line) / len(found)
        letters = sum(1 for word in words if re.search(r"[^\W\d_]", word)) / len(words)
        parts = paragraphs(text)
        print(f"{name:14} {len(words):7} {sum(map(len, words)) / len(words):6.2f} {letters:7.3f} {ended:6.3f} {short:6.3f} "
              f"{(len(found) - 1) / len(words):6.3f} {heuristics._in_runs(text) / len(text):6.3f} "
              f"{repetition._before(found)[0] / len(found):6.3f} {repetition._before(parts)[0] / len(parts):6.3f}  "
              f"{heuristics.judge(text, korean=True)} {repetition.repeated(text, korean=True)}")
    try:
        import kiwipiepy
    except ImportError:
        print("kiwipiepy is not installed: no count of morphemes")
        return
    kiwi = kiwipiepy.Kiwi()
    for name, text in (("statutes and bills", "\n".join(statutes().values())), ("talk", texts["talk"])):
        start = time.perf_counter()
        morphemes = sum(len(kiwi.tokenize(line)) for line in lines(text))
        spent = time.perf_counter() - start
        start = time.perf_counter()
        eojeol = len(text.split())
        size, splitting = len(text.encode()) / 1e6, time.perf_counter() - start
        print(f"{name}: {morphemes / eojeol:.2f} morphemes an eojeol; kiwi {size / spent:.2f} MB/s, split {size / splitting:.0f} MB/s")


def domains() -> None:
    from megatron_ext.curate.quality.train import cut
    from megatron_ext.curate.taxonomy.classifier import NONE
    from megatron_ext.curate.taxonomy.examples import SEED, Example, read
    from megatron_ext.curate.taxonomy.train import fit, measure

    made = fit(read(SEED))
    held = made.about["cross_validation"]
    print(f"seed sentences, 5-fold: {held['examples']} examples, accuracy {held['accuracy']:.3f} with none, "
          f"{held['accuracy_without_none']:.3f} among ours, threshold {made.threshold}")
    for name, row in held["domains"].items():
        print(f"  {name:15} {row['examples']:4} examples, precision {row['precision'] or 0:.2f}, recall {row['recall'] or 0:.2f}")
    real = [Example(passage, "law", name) for name, text in statutes().items() for passage in cut(" ".join(text.split()), 600)]
    talk = [Example(f"{question} {answer}", NONE, answer) for question, answer, _ in chat()[::10]]
    for name, found in (("statutes and bills", real), ("talk", talk)):
        answers = [made.classify(one.text) for one in found]
        counts = {}
        for answer in answers:
            counts[answer.domain] = counts.get(answer.domain, 0) + 1
        with_law = sum("law" in answer.domains for answer in answers) / len(answers)
        print(f"the seed's model on {len(found)} passages of {name}: {dict(sorted(counts.items(), key=lambda one: -one[1]))}; "
              f"law among the domains of {with_law:.2f}")
    names = {"0": "daily", "1": "parting", "2": "love"}
    examples = [Example(question, names[label], answer) for question, answer, label in chat()]
    train, held_out = [one for one in examples if one.fold(5)], [one for one in examples if not one.fold(5)]
    start = time.perf_counter()
    found = measure(fit(train), held_out)
    print(f"chatbot_ko.csv, three labels, {len(train)} for training, {len(held_out)} held out by answer: accuracy "
          f"{found['accuracy_without_none']:.3f} ({time.perf_counter() - start:.0f} s)")
    for name, row in found["domains"].items():
        if row["examples"]:
            print(f"  {name:15} {row['examples']:4} examples, precision {row['precision'] or 0:.2f}, recall {row['recall'] or 0:.2f}")
    scores = []
    for name in statutes():
        law = [one for one in real if one.group != name]
        model = fit([*law, *(one for one in talk if one.fold(5)), *(one for one in read(SEED) if one.label not in ("law", NONE) and not one.aid)])
        scores.append(measure(model, [*(one for one in real if one.group == name), *(one for one in talk if not one.fold(5))]))
        row = scores[-1]["domains"]
        print(f"  law, {name} held out: recall {row['law']['recall']:.3f} of {row['law']['examples']}, none {row['none']['recall']:.3f} of "
              f"{row['none']['examples']}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in ("model", "rules", "domains"):
        print(__doc__)
        sys.exit(2)
    {"model": model, "rules": rules, "domains": domains}[sys.argv[1]]()
