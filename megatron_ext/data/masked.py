"""Samples of masked language modelling (Devlin et al. 2018, arXiv 1810.04805, section 3.1 and appendix A.1).

Of the words of a sample, `masked_share` (15 %) are to be found again. Of those 80 % are replaced by the mask, 10 % by a random word, and 10 % stay.
Which ones is a function of the seed, the split and the number of the sample, and of nothing else: a sample that comes again in the next epoch has
another number, and is masked anew, as RoBERTa does. The end of a document is not masked.

The mask is a word of the tokenizer where it has one, else the first word behind its vocabulary. Token types are the documents of a sample in turns
(0, 1, 0, ...), so that neighbours differ, as BERT's two sentences do. There is no next-sentence objective: it was found to be of no use (Liu et al.
2019, arXiv 1907.11692, section 4.2).
"""
import numpy as np

from megatron_ext.data.draws import Draws
from megatron_ext.data.samples import Sample, Samples
from megatron_ext.data.tokenizer import Tokenizer

MASKS = ("[MASK]", "<mask>", "<|mask|>")
REPLACED, RANDOM = 0.8, 0.1  # the rest stays as it is


def mask_word(tokenizer: Tokenizer) -> int:
    """The id of the mask."""
    special = tokenizer.special_tokens()
    return next((special[text] for text in MASKS if text in special), tokenizer.vocab_size)


class MaskedSamples(Samples):
    """Samples with words hidden.

    Args:
        inner: the text.
        mask: id of the mask; words: random words are drawn below this.
        share: of the words that are masked.
        token_types: kinds of text; 0 = the model knows none.
        key: what the choice depends on beside the number of the sample: seed and split.
    """

    bytes_per_token = None  # a loss over masked words says nothing of bytes

    def __init__(self, inner: Samples, *, mask: int, words: int, share: float, token_types: int, key: tuple):
        self._inner, self._mask, self._words, self._share, self._types, self._key = inner, mask, words, share, token_types, key
        self.sequence_length, self.samples_per_epoch = inner.sequence_length, inner.samples_per_epoch
        self.eod, self.masking, self.vocab_size = inner.eod, inner.masking, max(inner.vocab_size, mask + 1)

    def __getitem__(self, k: int) -> Sample:
        text, draws = self._inner[k], Draws(*self._key, k, "masked")
        labels, documents = text.tokens[:-1], text.documents[:-1]
        candidates = np.flatnonzero(labels != self.eod)
        count = min(len(candidates), max(1, round(self._share * len(candidates))))
        chosen = candidates[draws.choice(len(candidates), count)]
        fate, others = draws.uniform(count), draws.integers(count, self._words)
        tokens, loss_mask = labels.copy(), np.zeros(len(labels), dtype=np.float32)
        tokens[chosen] = np.where(fate < REPLACED, self._mask, np.where(fate < REPLACED + RANDOM, others, labels[chosen]))
        loss_mask[chosen] = 1.0
        inputs = {"token_types": (documents % self._types).astype(np.int64)} if self._types else {}
        return Sample(tokens, documents, loss_mask, labels, inputs)
