"""What an n-gram model counts: characters, jamo, words, or pieces of a byte-pair encoding, as numbers.

The text is normalised as CCNet does before its models (Wenzek et al., "CCNet", LREC 2020, section 3.3 and cc_net/text_normalizer.py):
lower case, every digit is 0; white space is one space, since a line break in the text of a PDF means nothing. A run of one sign (not a
letter or digit) is cut to three of it: rules drawn with hyphens would otherwise be the most predictable text of all.

Jamo are the letters that Hangul syllables are made of: NFD of Unicode. A syllable of three letters is three units, so the same context
needs a higher order.
"""
import re
import unicodedata
from dataclasses import dataclass

import numpy as np

from megatron_ext.curate.quality.text import code_points, squeeze
from megatron_ext.errors import UserError

UNKNOWN, START, END = 0, 1, 2
RESERVED = 3
KINDS = ("characters", "jamo", "words", "pieces")
PIECES = 8000  # of the byte-pair encoding; CCNet's SentencePiece models have 65,536, for corpora 1,000 times as large
_DIGIT = re.compile(r"\d")
_RUN = re.compile(r"([^\w\s])\1{3,}")


def normalise(text: str) -> str:
    return _RUN.sub(r"\1\1\1", _DIGIT.sub("0", squeeze(text).lower()))


@dataclass(frozen=True)
class Vocabulary:
    """Units and their numbers, which start at RESERVED; below are UNKNOWN, START and END.

    Attributes:
        kind: one of KINDS.
        units: of characters and jamo the code points, of words the words, sorted; of pieces the encoding's tokenizer.json.
    """

    kind: str
    units: np.ndarray | tuple[str, ...] | str

    def __post_init__(self):
        if self.kind in ("characters", "jamo"):
            table = np.zeros(0x110000, dtype=np.int32)
            table[self.units] = np.arange(RESERVED, RESERVED + len(self.units), dtype=np.int32)
            encode, size = table, len(self.units)
        elif self.kind == "words":
            encode, size = {word: number for number, word in enumerate(self.units, RESERVED)}, len(self.units)
        else:
            import tokenizers

            encode = tokenizers.Tokenizer.from_str(self.units)
            size = encode.get_vocab_size()
        object.__setattr__(self, "_encode", encode)
        object.__setattr__(self, "size", size + RESERVED)

    def encode(self, text: str) -> np.ndarray:
        """int64 [units] of a text, without START and END."""
        text = normalise(text)
        if self.kind in ("characters", "jamo"):
            return self._encode[_letters(self.kind, text)].astype(np.int64)
        if self.kind == "words":
            return np.fromiter((self._encode.get(word, UNKNOWN) for word in text.split()), dtype=np.int64)
        return np.asarray(self._encode.encode(text, add_special_tokens=False).ids, dtype=np.int64) + RESERVED

    def arrays(self) -> dict[str, np.ndarray]:
        """What `of_arrays` takes: no array of objects, so that nothing has to be unpickled."""
        if isinstance(self.units, np.ndarray):
            return {"units": self.units}
        return {"units": np.frombuffer(("\n".join(self.units) if self.kind == "words" else self.units).encode(), dtype=np.uint8)}

    @classmethod
    def of_arrays(cls, kind: str, units: np.ndarray) -> "Vocabulary":
        if kind in ("characters", "jamo"):
            return cls(kind, units)
        joined = units.tobytes().decode()
        return cls(kind, tuple(joined.split("\n")) if kind == "words" else joined)


def build(kind: str, texts: list[str]) -> Vocabulary:
    """The units of these texts, each of them: what is not there is one unknown unit, of a small probability.

    Raises:
        UserError: an unknown kind.
    """
    if kind not in KINDS:
        raise UserError("units", kind, f"must be one of {', '.join(KINDS)}")
    if kind == "words":
        return Vocabulary(kind, tuple(sorted({word for text in texts for word in normalise(text).split()})))
    if kind == "pieces":
        return Vocabulary(kind, _pieces(texts))
    seen = np.zeros(0x110000, dtype=bool)
    for text in texts:
        seen[_letters(kind, normalise(text))] = True
    return Vocabulary(kind, np.flatnonzero(seen).astype(np.uint32))


def _letters(kind: str, text: str) -> np.ndarray:
    return code_points(unicodedata.normalize("NFD", text) if kind == "jamo" else text)


def _pieces(texts: list[str]) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(
        (normalise(text) for text in texts), trainers.BpeTrainer(vocab_size=PIECES, special_tokens=["[UNK]"], show_progress=False)
    )
    return tokenizer.to_str()
