"""The domain classifier: against scikit-learn's own probabilities, its class of none, held-out accuracy on real labels, its files."""
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from curate_texts import SHARED, chat, statutes

from megatron_ext.curate.quality.train import cut
from megatron_ext.curate.taxonomy.block import Taxonomy
from megatron_ext.curate.taxonomy.classifier import NONE, Classifier
from megatron_ext.curate.taxonomy.config import TaxonomyConfig
from megatron_ext.curate.taxonomy.examples import SEED, Example, read
from megatron_ext.curate.taxonomy.features import features
from megatron_ext.curate.taxonomy.train import fit, measure
from megatron_ext.errors import UserError

needs_data = pytest.mark.skipif(not SHARED.exists(), reason=f"{SHARED} is not there")


HELD_OUT = Path(__file__).with_name("curate_domains.yaml")


@pytest.fixture(scope="module")
def domains(tmp_path_factory):
    """The model of the seed as the command writes it, and what it prints."""
    pytest.importorskip("sklearn")
    path = tmp_path_factory.mktemp("domains") / "domains.npz"
    done = command("train", f"output={path}")
    assert done.returncode == 0 and "10 domains" in done.stdout, done.stderr
    return Classifier.load(path), path


def command(*words):
    return subprocess.run([sys.executable, "-m", "megatron_ext.curate.taxonomy", *words], capture_output=True, text=True, check=False)


def test_features_are_counts_of_n_grams_inside_words():
    indices, values = features("가나,  가나\n다", bits=24)
    # " 가나 ": 2-grams " 가", "가나", "나 ", 3-grams " 가나", "가나 ", 4-gram " 가나 ", each twice; " 다 ": " 다", "다 ", " 다 "; none over the space
    expected = 1 + np.log(np.asarray([2] * 6 + [1] * 3))
    assert len(indices) == 9 and np.all(np.diff(indices) > 0)
    assert sorted(values) == pytest.approx(sorted(expected / np.linalg.norm(expected)), rel=1e-5)
    scale = np.ones(2**24)
    scale[indices[0]] = 0.0
    scaled = dict(zip(*features("가나 가나 다", bits=24, scale=scale)))
    assert scaled[indices[0]] == 0 and sum(one**2 for one in scaled.values()) == pytest.approx(1, rel=1e-5)
    assert not len(features(" \n", bits=10)[0])


def test_served_probabilities_are_scikit_learns():
    linear = pytest.importorskip("sklearn.linear_model")
    from scipy.sparse import lil_matrix

    words = [("학교", "a"), ("병원", "b"), ("가을", NONE)] * 20
    examples = [Example(f"{word} {number}번 문서의 {word}", label, str(number)) for number, (word, label) in enumerate(words)]
    model = fit(examples, bits=12, c=3.0)
    matrix = lil_matrix((len(examples), 2**12))
    for row, example in enumerate(examples):
        indices, values = features(example.text, bits=12, scale=model.scale)
        matrix[row, indices] = values
    for number, domain in enumerate(model.domains):
        truth = linear.LogisticRegression(C=3.0, class_weight="balanced", tol=1e-8, max_iter=5000)
        expected = truth.fit(matrix.tocsr(), [one.label == domain for one in examples]).predict_proba(matrix.tocsr())[:, 1]
        assert [model.probabilities(one.text)[number] for one in examples] == pytest.approx(expected, abs=2e-3)


def test_seed_examples_teach_domains_and_none(domains, capsys):
    """In 5 folds, each sentence by a model without it; and sentences that stand in no list of the package. Word lists are never measured on."""
    model, path = domains
    found = model.about["cross_validation"]
    sentences = [one for one in read(SEED) if not one.aid]
    assert found["examples"] == len(sentences) > 700
    assert set(model.domains) == set("education welfare health law budget science administration environment economy safety".split())
    done = command("evaluate", f"model={path}", f"input={HELD_OUT}")
    held = json.loads(done.stdout)
    assert not {one.text for one in read((HELD_OUT,))} & {one.text for one in read(SEED)}
    with capsys.disabled():
        for name, one in (("5 folds", found), ("held out", held)):
            none = one["domains"]["none"]
            print(f"\nseed, {name}: {one['examples']} sentences, right with none {one['accuracy']:.3f}, among ten domains "
                  f"{one['accuracy_without_none']:.3f}; none: precision {none['precision']:.3f}, recall {none['recall']:.3f}", end="")
        print(f"; threshold {model.threshold}")
    for one in (found, held):
        assert one["accuracy_without_none"] > 0.85 and one["accuracy"] > 0.8 and one["domains"]["none"]["recall"] > 0.75


def test_words_are_learnt_from_and_not_measured_on(tmp_path):
    lists = tmp_path / "lists.yaml"
    lists.write_text("a:\n  - words: 하나 둘\n  - 하나는 문장이다\n")
    found = {(one.text, one.aid) for one in read((lists,))}
    assert found == {("하나 둘", True), ("하나", True), ("둘", True), ("하나는 문장이다", False)}


def test_files_are_the_same_and_load_without_pickle(domains, tmp_path):
    examples = [one for one in read(SEED) if not one.aid and one.label in ("health", "law", NONE)]
    model, path = fit(examples, bits=16), tmp_path / "model.npz"
    model.save(path)
    random.Random(0).shuffle(examples)
    again = fit(sorted(examples, key=lambda one: (one.text, one.label)), bits=16)
    again.save(tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == path.read_bytes()
    loaded = Classifier.load(path)
    for text in ("기초연금을 받으려면 나이가 몇이어야 하나요?", "", "오늘 점심 뭐 먹지"):
        assert loaded.classify(text) == model.classify(text)
    assert loaded.classify("").domain == NONE
    assert loaded.classify("국세 환급", threshold=0.999999).domain == NONE
    answer = loaded.classify("병원 진료비 건강보험 환자 백신")
    assert answer.domain == "health" and answer.domains[0] == "health" and answer.score == max(answer.probabilities.values())
    np.savez(tmp_path / "pickled.npz", about=np.asarray([{}], dtype=object))
    (tmp_path / "text.npz").write_text("no")
    for name in ("pickled", "text"):
        with pytest.raises(UserError, match="is no domain model"):
            Classifier.load(tmp_path / f"{name}.npz")
    with pytest.raises(UserError, match="cannot be read"):
        Classifier.load(tmp_path / "none.npz")


def test_serving_needs_numpy_alone(domains):
    """A server that refuses questions loads this class: no scikit-learn, torch or datatrove comes with it."""
    program = ("import sys; from megatron_ext.curate.taxonomy.classifier import Classifier; "
               f"print(Classifier.load({str(domains[1])!r}).classify('병원 환자 진료 백신').domain); "
               "assert not {'sklearn', 'scipy', 'torch', 'datatrove'} & set(sys.modules)")
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip() == "health"


def test_wrong_words_are_named(tmp_path):
    wrong = command("train", f"output={tmp_path / 'm.npz'}", "bit=14")
    assert wrong.returncode == 2 and "did you mean bits" in wrong.stderr and "Traceback" not in wrong.stderr


@pytest.mark.parametrize("content, name, reason", [
    ("{", "a.jsonl", "cannot be read"), ('{"text": "x"}', "a.jsonl", "record 1"), ("text,label\nx,\n", "a.csv", "record 1"),
    ("a: 3", "a.yaml", "cannot be read"), ("", "a.txt", "must end in"),
])
def test_wrong_examples_are_named(content, name, reason, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=reason):
        read((tmp_path / name,))


def test_too_few_examples_are_refused():
    with pytest.raises(UserError, match="at least two domains"):
        fit([Example(str(number), "a", str(number)) for number in range(20)])
    with pytest.raises(UserError, match="at least 5"):
        fit([Example(str(number), "ab"[number > 16], str(number)) for number in range(20)])


class Page:
    def __init__(self, text, **metadata):
        self.text, self.metadata, self.id, self.media = text, metadata, "", []


def test_the_step_writes_domains(domains):
    path = str(domains[1])
    page = Page("병원에서 환자가 진료비와 건강보험, 예방접종 안내를 받았다.")
    verdict = Taxonomy(TaxonomyConfig(path=path)).process(page)
    assert page.metadata["domain"] == "health" and verdict.counts == {"domain_health": 1} and 0 < page.metadata["domain_score"] <= 1
    given = Page("병원에서 진료를 받았다.", domain="law")
    assert Taxonomy(TaxonomyConfig(path=path)).process(given).counts == {"domain_given": 1} and given.metadata["domain"] == "law"
    assert Taxonomy(TaxonomyConfig(path=path, trust_given=False)).process(given) and given.metadata["domain"] == "health"
    assert Taxonomy(TaxonomyConfig(path=path, threshold=0.9999, drop_none=True)).process(Page("오늘 뭐 하지")).reason == "no_domain"
    assert Taxonomy(TaxonomyConfig()).process(Page("병원")).action == "keep"


@needs_data
def test_held_out_accuracy_on_real_labels():
    """The labels of chatbot_ko.csv (0 daily life, 1 parting, 2 love), questions that share an answer on one side: a fifth is held out."""
    pytest.importorskip("sklearn")
    names = {"0": "daily", "1": "parting", "2": "love"}
    examples = [Example(question, names[label], answer) for question, answer, label in chat()]
    train, held = [one for one in examples if one.fold(5)], [one for one in examples if not one.fold(5)]
    found = measure(fit(train[::3], bits=17), held)
    print(f"{len(held)} held out: {found['accuracy_without_none']:.3f}", found["domains"])
    assert found["accuracy_without_none"] > 0.75


@needs_data
def test_law_is_told_from_talk_across_documents():
    """Passages of statutes against talk as "none", a whole document held out at a time."""
    pytest.importorskip("sklearn")
    talk = [Example(f"{question} {answer}", NONE, answer) for question, answer, _ in chat()[::25]]
    laws = [Example(passage, "law", name) for name, text in statutes().items() for passage in cut(" ".join(text.split()), 300)]
    places, amounts = ("서울", "부산", "강릉"), ("많이", "조금")
    weather = [f"내일은 {place}에 비가 {much} 오고 기온은 {at}도입니다." for place in places for much in amounts for at in range(5)]
    other = [Example(text, "weather", text) for text in weather]
    model = fit([*(one for one in talk if one.fold(2)), *(one for one in laws if one.group not in ("constitution", "1809896")), *other])
    found = measure(model, [*(one for one in talk if not one.fold(2)), *(one for one in laws if one.group in ("constitution", "1809896"))])
    print(found["accuracy"], found["domains"])
    assert found["accuracy"] > 0.95
