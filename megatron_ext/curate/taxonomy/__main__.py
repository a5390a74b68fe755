"""Commands of this room.

    python -m megatron_ext.curate.taxonomy train output=MODEL.npz [input=EXAMPLES.jsonl,MORE.csv] [bits=18] [c=3]
    python -m megatron_ext.curate.taxonomy evaluate model=MODEL.npz input=EXAMPLES.jsonl
    python -m megatron_ext.curate.taxonomy classify model=MODEL.npz text="..."

Examples have text, label and optionally group (JSONL, CSV), or are YAML with a list of texts for each label; the label none is for texts
of none of the domains.
"""
import json
import sys
from dataclasses import asdict, dataclass

from megatron_ext.curate import words
from megatron_ext.curate.taxonomy import train
from megatron_ext.curate.taxonomy.classifier import Classifier


@dataclass(frozen=True)
class ClassifySettings:
    model: str
    text: str


def classify(settings: ClassifySettings) -> None:
    print(json.dumps(asdict(Classifier.load(settings.model, key="model").classify(settings.text)), ensure_ascii=False))


if __name__ == "__main__":
    sys.exit(words.run({
        "train": (train.TrainSettings, train.train), "evaluate": (train.EvaluateSettings, train.evaluate),
        "classify": (ClassifySettings, classify),
    }, sys.argv[1:], __doc__))
