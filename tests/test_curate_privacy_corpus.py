"""De-identification measured on a labelled set, fuzzed, and searched for what it should have removed."""
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest
from privacy_corpus import corpus, documents
from privacy_score import STRUCTURED, scored

pytest.importorskip("kiwipiepy", reason="names need kiwipiepy: pip install 'megatron-ext[curate]'")
from megatron_ext.curate.privacy.block import Privacy, PrivacyFailed
from megatron_ext.curate.privacy.clean import Cleaner
from megatron_ext.curate.privacy.config import PrivacyConfig
from megatron_ext.curate.privacy.normal import Normal
from megatron_ext.curate.privacy.report import merged

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@dataclass
class Doc:
    text: str
    id: str = "0"
    metadata: dict = field(default_factory=dict)
    media: list = field(default_factory=list)


@pytest.fixture(scope="module")
def cleaner() -> Cleaner:
    return Cleaner(PrivacyConfig())


def holds(score) -> None:
    kinds = set(score.true)
    assert score.recall(STRUCTURED & kinds) >= 0.99, score.missed[:20]
    assert score.recall({"PERSON"}) >= 0.90 and score.recall({"ADDRESS"}) >= 0.90, score.missed[:20]
    assert sum(score.named.values()) >= 0.99 * sum(score.found.values())  # by its own kind, too
    assert score.precision() >= 0.95, score.wrong[:20]


def test_recall_and_precision(cleaner):
    score = scored(cleaner.find, corpus(rounds=16))
    assert sum(score.true.values()) >= 2000
    holds(score)


def test_recall_and_precision_when_spoilt(cleaner):
    """Full-width digits, other hyphens, blanks, wrapped lines, invisible characters in every second number."""
    holds(scored(cleaner.find, corpus(seed=2, rounds=16, spoil=0.5)))


def test_recall_and_precision_in_documents(cleaner):
    holds(scored(cleaner.find, documents(corpus(seed=3, rounds=8))))


def test_any_text_can_be_cleaned(cleaner):
    """Random cuts and mixtures of anything: no error, spans in order and inside, and hardly anything more is found in what comes out."""
    rng = Random(5)
    items = corpus(seed=5, rounds=2, spoil=0.5)
    first = second = 0
    for _ in range(400):
        text = "".join(rng.choice(items).text[rng.randrange(20):][:rng.randrange(60)] + rng.choice(["", " ", "\n", "\u200b", "\ud800", "－", "①", "é", "e\u0301"]) for _ in range(rng.randrange(1, 8)))
        cleaned, at = cleaner.clean(text), 0
        for span in cleaned.spans:
            assert at <= span.start < span.end <= len(text)
            at = span.end
        first += len(cleaned.spans)
        second += len(cleaner.clean(cleaned.text).spans)
    assert first > 400 and second <= 0.02 * first  # what was cut through, and is whole once its neighbour is a tag


def test_nothing_of_a_removed_item_is_left(tmp_path, caplog, capfd):
    """Outputs, metadata, verdicts, reports, logs, errors, files: searched for the bytes of every value."""
    caplog.set_level(logging.DEBUG)
    block = Privacy(PrivacyConfig(samples=50))
    kept, removed = [], set()
    for number, item in enumerate(documents(corpus(seed=9, rounds=3, spoil=0.3), each=6)):
        values = [item.text[a:b] for a, b, _ in item.spans]
        document = Doc(item.text, f"{number:032x}", {"source": f"s{number % 3}", "title": " ".join(values[:2]), "origin": f"raw/{values[0]}.hwpx" if values else "raw/x",
                                                     "images": [{"path": "a.png", "caption": item.text[:80]}], "tables": [{"rows": [["성명", "전화"], values[:2] or ["", ""]], "line": 2}]})
        found = {item.text[span.start:span.end] for span in block.cleaner.find(item.text, document.metadata["source"])}
        verdict = block.process(document)
        kept.append((found, repr(verdict) + document.text + json.dumps(document.metadata, ensure_ascii=False)))
        removed |= found
    for found, written in kept:
        for value in found:
            if len(Normal(value).text) >= 3 and any(character.isalnum() for character in value):
                assert value.encode("utf-8", "surrogatepass") not in written.encode("utf-8", "surrogatepass")
    report = block.take_report()
    (tmp_path / "report.json").write_text(json.dumps(report, ensure_ascii=False))
    (tmp_path / "report.md").write_text(merged([report], 50).markdown())
    logs = caplog.text + "".join(capfd.readouterr())
    for file in tmp_path.iterdir():
        logs += file.read_text()
    for value in removed:
        if len(value) >= 3:
            assert value not in logs
    assert sum(sum(counts.values()) for counts in report["counts"].values()) > 300


def test_an_error_holds_no_text(monkeypatch):
    block = Privacy(PrivacyConfig(morphology="none"))
    monkeypatch.setattr(block.cleaner, "clean", lambda text, source: 1 / len(text[:0]) if text else None)
    with pytest.raises(PrivacyFailed) as told:
        block.process(Doc("홍길동 010-2345-6789", "f" * 32))
    assert str(told.value) == f"document {'f' * 32}: ZeroDivisionError" and told.value.__cause__ is None and told.value.__context__ is None


def test_reports_add_up_in_any_order():
    items = documents(corpus(seed=4, rounds=1), each=5)

    def report(part):
        block = Privacy(PrivacyConfig(morphology="none", samples=3))
        for number in part:
            block.process(Doc(items[number].text, f"{number:032x}", {"source": "a" if number % 2 else "b"}))
        return block.take_report()

    count = len(items)
    whole = report(range(count))
    halves = merged([report(range(count // 2, count)), report(range(count // 2))], 3).to_json()
    assert json.dumps(whole, ensure_ascii=False) == json.dumps(halves, ensure_ascii=False)
    assert all(len(kept) <= 3 for found in whole["samples"].values() for kept in found.values())


@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data")
def test_real_text(cleaner):
    """Statutes, bills and talk: what is found there is what a person finds (numbers and names of members and officials in the bills)."""
    constitution = (SHARED / "ko_public" / "constitution.txt").read_text(encoding="utf-8")
    assert not [span for span in cleaner.find(constitution) if span.kind != "PERSON"]
    talk = (SHARED / "chatbot_ko.csv").read_text(encoding="utf-8")
    assert len(cleaner.find(talk)) <= 24  # of 11,823 questions and answers
    bill = (SHARED / "ko_public" / "1809890.txt").read_text(encoding="utf-8")
    found = [(bill[span.start:span.end], span.kind) for span in cleaner.find(bill)]
    assert ("02-788-4649", "PHONE") in found and ("정의화", "PERSON") in found and any(kind == "EMAIL" for _, kind in found)
