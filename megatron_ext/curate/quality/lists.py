"""Word lists with weights: what is toxic, what is biased. A list is YAML:

    match: prefix            # of the list's terms: word, prefix (an eojeol begins with it, particles may follow), inside
    terms:
      - {term: 얼간이, weight: 1}
      - {term: 시발, weight: 3, except: [시발점, 시발역], spread: true}     # spread: signs or digits may stand between its syllables
      - {pattern: '(여자|남자)(들)?은 원래', weight: 2}                      # a regular expression instead of a term

Texts are compared in NFKC and small letters. A list knows nothing of context: quotations, court rulings and works on language hold such
words too, so that a document is judged by how many there are among its words (config.ListsConfig), and by default bias is only marked.
"""
import functools
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.errors import UserError

FOLDER = Path(__file__).parent / "lists"
MATCHES = ("word", "prefix", "inside")
_SIGNS = r"\d_*.~!@#^\-"


def read_yaml(name: str, *, key: str = "curate.quality.lists") -> dict:
    """A built-in list by its stem, or any YAML file. Raises UserError: not there, or no mapping."""
    import yaml

    path = FOLDER / f"{name}.yaml" if "/" not in name and not name.endswith((".yaml", ".yml")) else Path(name)
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        known = ", ".join(sorted(one.stem for one in FOLDER.glob("*.yaml")))
        raise UserError(key, name, f"cannot be read ({error.strerror}); built in are {known}, others end in .yaml") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(key, name, f"is no YAML that can be read ({type(error).__name__})") from error
    if not isinstance(fields, dict):
        raise UserError(key, name, "must be a mapping; megatron_ext/curate/quality/lists.py has an example")
    return fields


@dataclass(frozen=True)
class Found:
    """Of one text. `count`: terms; `weight`: the sum of their weights; `words`: of the text."""

    count: int
    weight: float
    words: int

    @property
    def per_thousand(self) -> float:
        return 1000 * self.weight / max(self.words, 1)


class WordList:
    """One or more lists, compiled.

    Raises:
        UserError: a list that cannot be read, or an entry that is wrong (named by its number).
    """

    def __init__(self, *names: str, key: str = "curate.quality.lists"):
        self._weights: dict[str, float] = {}  # by term, without spaces and what may be spread in it
        self._patterns: list[tuple[re.Pattern, float]] = []
        bodies: dict[bool, list[str]] = {True: [], False: []}  # at the beginning of a word; anywhere
        for name in names:
            fields = read_yaml(name, key=key)
            entries = fields.get("terms")
            if fields.get("match", "word") not in MATCHES or not isinstance(entries, list):
                raise UserError(key, name, f"must have terms, a list, and match, one of {', '.join(MATCHES)}")
            for number, entry in enumerate(entries, 1):
                try:
                    weight = float(entry.get("weight", 1))
                    if "pattern" in entry:
                        self._patterns.append((re.compile(entry["pattern"]), weight))
                        continue
                    match, text = entry.get("match", fields.get("match", "word")), _plain(entry["term"])
                    others = [_plain(one) for one in entry.get("except", ())]
                    bodies[match != "inside"].append(_compiled(text, match, others, bool(entry.get("spread"))))
                    self._weights[_bare(text)] = weight
                except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
                    reason = f"entry {number} cannot be read ({type(error).__name__}); it needs a term or a pattern, and a weight"
                    raise UserError(key, name, reason) from error
        # Alternatives that begin with a letter are passed over quickly; so \b stands before all of them, and no group around any.
        # Longer terms come first.
        ordered = {at: sorted(found, key=lambda one: (-len(one), one)) for at, found in bodies.items()}
        parts = [(r"\b" if at else "") + f"(?:{'|'.join(found)})" for at, found in ordered.items() if found]
        self._terms = re.compile("|".join(parts)) if parts else None

    def find(self, text: str) -> Found:
        text = _plain(text)
        found = [self._weights[_bare(match.group())] for match in self._terms.finditer(text)] if self._terms else []
        for pattern, weight in self._patterns:
            found += [weight] * sum(1 for _ in pattern.finditer(text))
        return Found(len(found), sum(found), len(text.split()))


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).lower()


def _bare(text: str) -> str:
    return re.sub(rf"[{_SIGNS}\s]", "", text)


def _compiled(text: str, match: str, others: list[str], spread: bool) -> str:
    if not _bare(text) or match not in MATCHES or not all(one.startswith(text) and one != text for one in others):
        raise ValueError("an empty term, an unknown match, or an exception that does not go on from the term")
    letters = [r"\s+" if letter == " " else re.escape(letter) for letter in text]
    after = "".join(rf"(?!{re.escape(one[len(text):])})" for one in others)
    return (rf"[{_SIGNS}]{{0,2}}" if spread else "").join(letters) + (r"\b" if match == "word" else "") + after


@functools.lru_cache(maxsize=16)
def opened(*names: str) -> WordList:
    """A WordList, made once a process."""
    return WordList(*names)
