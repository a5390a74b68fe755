"""Tokenizers: byte-level BPE trained on the corpus, or any Hugging Face `tokenizer.json`.

Byte-level BPE (Sennrich et al. 2016; bytes: Radford et al. 2019, GPT-2) merges the most frequent pair of neighbouring symbols until the vocabulary is full. It starts
from all 256 bytes and has no normaliser, so `decode(encode(text)) == text` for every text of any script. The end-of-document token is special: the same
characters inside a document are plain text and never become it.
"""
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_ext.errors import UserError

EOD = "<|endoftext|>"
EOD_NAMES = (
    EOD, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<EOS>", "[EOS]", "<｜end▁of▁sentence｜>", "<|im_end|>", "[SEP]",
)
SMALLEST_VOCABULARY = 257  # the bytes and the end-of-document token


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        vocab_size: ids are in [0, vocab_size).
        eod: id of the end-of-document token; `eod_text` is how it is written.
        sha256: of the file it was read from.
    """

    def __init__(self, inner, *, eod_text: str, sha256: str):
        self._inner = inner
        self.eod_text = eod_text
        self.eod: int = inner.token_to_id(eod_text)
        self.vocab_size: int = max(inner.get_vocab(with_added_tokens=True).values()) + 1
        self.sha256 = sha256
        # Unigram models may take the eod's spelling for a piece of their vocabulary even when special tokens are off.
        self._cut = self.eod in inner.encode(eod_text, add_special_tokens=False).ids

    def lossless(self, texts: Iterable[str]) -> bool:
        """Whether each text comes back from its ids byte for byte (a tokenizer that normalises does not give it back)."""
        return all(self.decode(self.encode(text)) == text for text in texts)

    @classmethod
    def from_file(cls, path: str | Path, *, key: str = "data.tokenizer", end: str | None = None) -> "Tokenizer":
        """Reads a `tokenizer.json`, or the one in a directory.

        Args:
            end: how the end of a document is written, where it is none of EOD_NAMES.

        Raises:
            UserError: not there, not a tokenizer, or without an end-of-document token.
        """
        path = tokenizer_file(path)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(key, path, f"cannot be read ({error.strerror}); give a Hugging Face tokenizer.json") from error
        return cls.from_bytes(content, name=path, key=key, end=end)

    @classmethod
    def from_bytes(cls, content: bytes, *, name: object = "tokenizer.json", key: str = "data.tokenizer", end: str | None = None) -> "Tokenizer":
        import tokenizers

        try:
            inner = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise UserError(key, name, f"not a Hugging Face tokenizer.json: {str(error).splitlines()[0][:200]}") from error
        inner.no_truncation()
        inner.no_padding()
        eod_text = next((text for text in (*EOD_NAMES, *((end,) if end else ())) if inner.token_to_id(text) is not None), None)
        if eod_text is None:
            raise UserError(key, name, f"has no end-of-document token; add one of {', '.join(EOD_NAMES)} to its added_tokens")
        # Not stored in the file: special tokens written out in a document are plain text.
        inner.add_special_tokens([tokenizers.AddedToken(eod_text, special=True, normalized=False)])
        inner.encode_special_tokens = True
        return cls(inner, eod_text=eod_text, sha256=hashlib.sha256(content).hexdigest())

    def special_tokens(self) -> dict[str, int]:
        """Spelling -> id of the end-of-document token and of the other special tokens that the file names."""
        added = self._inner.get_added_tokens_decoder()
        return {token.content: number for number, token in added.items() if token.special} | {self.eod_text: self.eod}

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone: no token is added before or behind it."""
        if self._cut and self.eod_text in text:
            return [token for part in self._parts(text) for token in self._inner.encode(part, add_special_tokens=False).ids]
        return self._inner.encode(text, add_special_tokens=False).ids

    def begin(self) -> list[int]:
        """Ids that the file's own template puts before a text, such as the begin-of-sequence token of Llama. Training data has none of them."""
        bare = self._inner.encode("a", add_special_tokens=False).ids
        whole = self._inner.encode("a", add_special_tokens=True).ids
        return next((whole[:start] for start in range(len(whole)) if whole[start : start + len(bare)] == bare), [])

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; the library's threads share the work (`RAYON_NUM_THREADS`)."""
        if self._cut:
            return [self.encode(text) for text in texts]
        return [encoding.ids for encoding in self._inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _parts(self, text: str) -> list[str]:
        """`text` cut behind the first character of each spelled-out eod, so that no part holds one."""
        head, tail = self.eod_text[:1], self.eod_text[1:]
        pieces = text.split(self.eod_text)
        return [(tail if number else "") + piece + (head if number < len(pieces) - 1 else "") for number, piece in enumerate(pieces)]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of `ids`; bytes that are no UTF-8 (a sequence that was cut) become U+FFFD."""
        return self._inner.decode(list(ids), skip_special_tokens=skip_special_tokens)


def tokenizer_file(path: str | Path) -> Path:
    """`path` itself, or the `tokenizer.json` of that directory."""
    path = Path(path)
    return path / "tokenizer.json" if path.is_dir() else path


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, progress: bool = False) -> bytes:
    """Trains byte-level BPE and returns the `tokenizer.json`; the same texts in the same order give the same bytes.

    Args:
        texts: training documents.
        vocab_size: size to reach, the 256 bytes and the end-of-document token within; a small corpus may give fewer.
        progress: the library's own bars, on stderr.

    Raises:
        UserError: vocabulary smaller than 257.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError("data.vocab_size", vocab_size, f"at least {SMALLEST_VOCABULARY}: the 256 bytes and the end-of-document token")
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=progress,
    )
    inner.train_from_iterator(texts, trainer=trainer)
    return json.dumps(json.loads(inner.to_str()), ensure_ascii=False, separators=(",", ":")).encode("utf-8")
