"""Text to tokens as Hugging Face's own tokenizer makes them, so that numbers are those that others publish.

Training reads text as data: a special token that is spelled out in a document stays text, and nothing is added around it (`data/tokenizer.py`).
Evaluation of others' models does it as they did: `<|im_end|>` in a prompt is that token, and a tokenizer that puts a beginning-of-sequence
token before every text puts it here too.
"""
from collections.abc import Sequence
from pathlib import Path

from megatron_ext.convert import carried


class PlainTokenizer:
    """A `tokenizer.json` as `transformers.PreTrainedTokenizerFast` uses it.

    Args:
        file: the tokenizer.json.
        eos: id of the end-of-document token.
        folder: the files that were imported with a model: they say which token begins a text.

    Attributes:
        eos_token, eos_token_id; bos_token, bos_token_id: None without one. pad_token, pad_token_id: None.
    """

    def __init__(self, file: Path, *, eos: int, folder: Path | None = None):
        import tokenizers

        self._inner = tokenizers.Tokenizer.from_file(str(file))
        self._inner.no_truncation()
        self._inner.no_padding()
        self.eos_token_id, self.eos_token = eos, self._inner.id_to_token(eos)
        self.bos_token_id = self._beginning(None if folder is None else carried.begin_text(folder))
        self.bos_token = None if self.bos_token_id is None else self._inner.id_to_token(self.bos_token_id)
        self.pad_token = self.pad_token_id = None

    def _beginning(self, named: str | None) -> int | None:
        """What the files call it, else what the tokenizer itself puts first."""
        if named is not None and self._inner.token_to_id(named) is not None:
            return self._inner.token_to_id(named)
        added = self._inner.encode("", add_special_tokens=True).ids
        return added[0] if added and added[0] != self.eos_token_id else None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self._inner.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: int | Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return self._inner.decode([ids] if isinstance(ids, int) else list(ids), skip_special_tokens=skip_special_tokens)
