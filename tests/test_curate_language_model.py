"""The n-gram model: its probabilities against the definition, its files, and what it tells apart."""
import hashlib
import itertools
import math
import random
from collections import defaultdict

import numpy as np
import pytest
from curate_texts import SHARED, auc, chat, shuffled, statutes

from megatron_ext.curate.quality.language_model import NgramModel
from megatron_ext.curate.quality.train import cut, fit
from megatron_ext.errors import UserError

needs_data = pytest.mark.skipif(not SHARED.exists(), reason=f"{SHARED} is not there")
SMALL = ["abracadabra", "abra cadabra", "a barn, a bra", "cab and bar", "bad car", "a dab", "abc", "aab aab aab", "d", "cadab"]


def definition(texts: list[str], order: int):
    """Modified Kneser-Ney as kneser_ney.py's docstring has it, with dictionaries: (history, unit) -> probability."""
    framed = [("<s>", *text, "</s>") for text in texts]
    raw = [defaultdict(int) for _ in range(order + 1)]
    for text in framed:
        for n in range(1, order + 1):
            for at in range(len(text) - n + 1):
                raw[n][text[at : at + n]] += 1
    adjusted = [None] * (order + 1)
    adjusted[order] = {gram: count for gram, count in raw[order].items() if gram != ("<s>",)}
    for n in range(1, order):
        kinds = defaultdict(set)
        for gram in raw[n + 1]:
            kinds[gram[1:]].add(gram[0])
        adjusted[n] = {gram: count if gram[0] == "<s>" else len(kinds[gram]) for gram, count in raw[n].items() if n > 1 or gram != ("<s>",)}
    units = {gram[0] for gram in raw[1]} | {"<unk>"}
    discounts = [None] * (order + 1)
    for n in range(1, order + 1):
        r = {times: sum(1 for count in adjusted[n].values() if count == times) for times in (1, 2, 3, 4)}
        found = (0.5, 1.0, 1.5)
        if r[1] and r[2] and r[3]:
            y = r[1] / (r[1] + 2 * r[2])
            tried = (1 - 2 * y * r[2] / r[1], 2 - 3 * y * r[3] / r[2], 3 - 4 * y * r[4] / r[3])
            found = tried if all(0 <= one <= times for times, one in enumerate(tried, 1)) else found
        discounts[n] = (0.0, *found)

    def p(history: tuple, unit: str) -> float:
        n = len(history) + 1
        seen = {gram[-1]: count for gram, count in adjusted[n].items() if gram[:-1] == history}
        if n > 1 and not seen:
            return p(history[1:], unit)
        total, discount = sum(seen.values()), discounts[n]
        taken = sum(discount[min(count, 3)] for count in seen.values()) / total
        count = seen.get(unit, 0)
        lower = p(history[1:], unit) if n > 1 else 1 / (len(units) - 1)
        return (count - discount[min(count, 3)]) / total + taken * lower

    return p


def fitted(texts: list[str]) -> list[str]:
    """Without the one of the smallest hash, which a model of few texts is only measured on."""
    return sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())[1:]


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_are_the_definitions(order):
    model = fit(SMALL, order=order)
    kept = fitted(SMALL)
    assert model.about["documents"] == len(kept)
    p = definition(kept, order)
    for text in [*SMALL, "", "zebra", "cabcab zz", "a a a a"]:
        found, _ = model.log_probabilities(text)
        units = ["<s>", *(one if any(one in other for other in kept) else "<unk>" for one in text), "</s>"]
        for at in range(1, len(units)):
            expected = p(tuple(units[max(0, at - order + 1) : at]), units[at])
            assert math.exp(found[at - 1]) == pytest.approx(expected, rel=1e-5), (text, at)


@pytest.mark.parametrize("least", [(), (1, 2), (1, 1, 2)])
def test_probabilities_sum_to_one(least):
    model = fit(SMALL, order=4, least=least)
    letters = [*sorted(set("".join(fitted(SMALL)))), "\u2603"]  # a snowman: unknown
    for history in ["a", "ab", "abra", "zz", "cad", "aab aab"]:
        # an x behind, since space at the end goes
        found = [model.log_probabilities(history + letter + "x")[0][len(history)] for letter in letters]
        assert sum(map(math.exp, [*found, model.log_probabilities(history)[0][-1]])) == pytest.approx(1, abs=1e-5), history


def test_pruning_makes_it_smaller():
    whole, pruned = fit(SMALL, order=4), fit(SMALL, order=4, least=(1, 1, 2))
    assert sum(pruned.about["ngrams"]) < sum(whole.about["ngrams"]) and pruned.about["ngrams"][:2] == whole.about["ngrams"][:2]


@pytest.mark.parametrize("kind", ["characters", "jamo", "words", "pieces"])
def test_files_give_the_same_scores_in_any_order(kind, tmp_path):
    texts = [f"{a}{b} {b}{a} 나라의 말씀이" for a, b in itertools.permutations(["집", "강", "산", "들", "bc"], 2)]
    model = fit(texts, kind=kind, order=3)
    model.save(tmp_path / "a.npz")
    fit(texts[::-1], kind=kind, order=3).save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    again = NgramModel.load(tmp_path / "a.npz")
    for text in ("집강 강집 나라의", "", "처음 보는 글 \u2603", "12,345\n\n원"):
        assert again.score(text) == model.score(text)
    assert again.score("집강 강집 나라의 말씀이").perplexity < again.score("말씀이 쾅쾅 집집").perplexity


def test_a_damaged_or_dangerous_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        NgramModel.load(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no model")
    np.savez(tmp_path / "pickled.npz", about=np.asarray([{"format": 1}], dtype=object))
    fit(SMALL, order=3).save(tmp_path / "whole.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:500])
    for name in ("text", "pickled", "cut"):
        with pytest.raises(UserError, match="is no n-gram model"):
            NgramModel.load(tmp_path / f"{name}.npz")


@pytest.mark.parametrize("values, key", [
    ({"order": 0}, "order"), ({"held_out": 1.0}, "held_out"), ({"least": (2, 1)}, "least"), ({"kind": "sounds"}, "units"),
])
def test_values_that_cannot_be_are_refused(values, key):
    with pytest.raises(UserError) as error:
        fit(SMALL, **values)
    assert error.value.key == key


def test_one_document_is_too_few():
    with pytest.raises(UserError, match="at least 2"):
        fit(["only one", "  "])


@needs_data
def test_statutes_are_told_from_their_words_shuffled():
    """Each file under a model of the ten others, in passages of 1,000 characters: AUC of the issue, .98."""
    found, of_words = ([], []), ([], [])
    texts = statutes()
    for name, text in texts.items():
        others = [other for key, other in texts.items() if key != name]
        model, words = fit(others), fit(others, kind="words", order=2)
        for number, passage in enumerate(cut(" ".join(text.split()))):
            for of, made in enumerate((passage, shuffled(passage, number))):
                found[of].append(model.word_order(made))
                of_words[of].append(words.score(made).perplexity)
    assert len(found[0]) > 60
    print(f"AUC of word order, characters {auc(*found[::-1]):.4f}; of perplexity, words {auc(*of_words):.4f}")
    assert auc(*found[::-1]) >= 0.98
    assert auc(*of_words) >= 0.98


@needs_data
def test_talk_ranks_apart_from_random_strings():
    """Under a model of statutes alone: sentences of another kind are far nearer than characters drawn at random, Hangul too."""
    model = fit(statutes().values())
    draw = random.Random(0)
    talk = [f"{question} {answer}" for question, answer, _ in draw.sample(chat(), 300)]
    letters = sorted({letter for text in talk for letter in text})
    noise = ["".join(draw.choice(letters) for _ in text) for text in talk]
    syllables = ["".join(chr(draw.randint(0xAC00, 0xD7A3)) if letter != " " else " " for letter in text) for text in talk]
    near, far, farther = ([model.score(text).perplexity for text in texts] for texts in (talk, noise, syllables))
    print(f"AUC of letters at random {auc(near, far):.4f}, of syllables at random {auc(near, farther):.4f}")
    assert auc(near, far) >= 0.98 and auc(near, farther) >= 0.99
