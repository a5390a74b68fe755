"""Labelled examples: JSONL or CSV with `text`, `label` and optionally `group`, or YAML with a list of texts for each label. An item
`words: ...` of such a list is a list of words: they are learnt from, together and each alone, and nothing is measured on them.

Pieces of one document share a group, so that no part of what a model is measured on was seen at training. Without one, each text is its
own group.
"""
import csv
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_ext.errors import UserError

SEED = tuple(Path(__file__).parent / "seed" / name for name in ("ko.yaml", "en.yaml", "words.yaml"))  # what this package brings


@dataclass(frozen=True)
class Example:
    """`aid`: only learnt from (words of a list)."""

    text: str
    label: str
    group: str
    aid: bool = False

    def fold(self, folds: int) -> int:
        """0 to folds - 1, by the group alone: adding examples moves no other one."""
        return int.from_bytes(hashlib.sha256(self.group.encode("utf-8", "surrogatepass")).digest()[:8], "little") % folds


def read(paths: tuple[str | Path, ...], *, key: str = "input") -> list[Example]:
    """All examples of these files, each text and label once, in a fixed order.

    Raises:
        UserError: a file that is not there, of another kind, or with a record that lacks what is needed (named by its line).
    """
    found = {}
    for path in map(Path, paths):
        try:
            records = _READERS[path.suffix.lower()](path)
        except KeyError:
            raise UserError(key, path, f"must end in {', '.join(_READERS)}") from None
        except OSError as error:
            raise UserError(key, path, f"cannot be read ({error.strerror})") from error
        except (ValueError, csv.Error, yaml.YAMLError) as error:
            raise UserError(key, path, f"cannot be read ({type(error).__name__})") from error
        for number, record in enumerate(records, 1):
            text, label = record.get("text"), record.get("label")
            if not isinstance(text, str) or not text.strip() or not isinstance(label, str) or not label:
                raise UserError(key, path, f"record {number} must have text and label, both texts")
            aid = record.get("aid") is True
            found.setdefault((text, label), Example(text, label, str(record.get("group") or text), aid))
            for word in text.split() if aid else ():
                found.setdefault((word, label), Example(word, label, word, True))
    return [found[one] for one in sorted(found)]


def _jsonl(path: Path) -> list[dict]:
    with open(path, encoding="utf-8-sig") as file:
        records = [json.loads(line) for line in file if line.strip()]
    if not all(isinstance(record, dict) for record in records):
        raise ValueError("a line is no object")
    return records


def _csv(path: Path) -> list[dict]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def _yaml(path: Path) -> list[dict]:
    fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(fields, dict) or not all(isinstance(texts, list) for texts in fields.values()):
        raise ValueError("must map labels to lists of texts")
    return [
        {"text": one["words"] if isinstance(one, dict) and set(one) == {"words"} else one, "label": str(label), "aid": isinstance(one, dict)}
        for label, texts in fields.items() for one in texts
    ]


_READERS = {".jsonl": _jsonl, ".csv": _csv, ".yaml": _yaml, ".yml": _yaml}
