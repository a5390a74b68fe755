"""Texts and measures that tests and benchmarks of curation share."""
import csv
import random
from collections.abc import Sequence
from pathlib import Path

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def statutes() -> dict[str, str]:
    """The Korean constitution and ten bills, by name."""
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted((SHARED / "ko_public").glob("*.txt"))}


def chat() -> list[tuple[str, str, str]]:
    """Question, answer and label (0 daily life, 1 parting, 2 love) of chatbot_ko.csv."""
    with open(SHARED / "chatbot_ko.csv", encoding="utf-8-sig", newline="") as file:
        return [(row["Q"], row["A"], row["label"].strip()) for row in csv.DictReader(file)]


def shuffled(text: str, seed: int = 0) -> str:
    """The same words in another order, with single spaces."""
    words = text.split()
    random.Random(seed).shuffle(words)
    return " ".join(words)


def auc(low: Sequence[float], high: Sequence[float]) -> float:
    """How often one of `high` is above one of `low`; ties count half."""
    return sum((b > a) + (b == a) / 2 for a in low for b in high) / (len(low) * len(high))
