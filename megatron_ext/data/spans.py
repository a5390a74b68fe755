"""Samples of span corruption (Raffel et al. 2019, arXiv 1910.10683, section 3.1.4), T5's objective; config/spans.py has the lengths.

    text      Thank you for inviting me to your party last week
    encoder   Thank you <0> me to your party <1> week <end>
    decoder   <0> for inviting <1> last <end>              each predicted from those before it; the first from the end of nothing

Where the spans lie is a function of the seed, the split and the number of the sample, and of nothing else. Text and spans take turns, beginning with
text; how long each is comes from cuts drawn at random, so that all ways to cut are alike (`random_spans_noise_mask` of T5's code).

Sentinels are words of the tokenizer where it has them (<extra_id_0> to <extra_id_99>), else the words behind its vocabulary.
"""
import numpy as np

from megatron_ext.config.spans import SENTINELS, Spans
from megatron_ext.data.draws import Draws
from megatron_ext.data.samples import Sample, Samples
from megatron_ext.data.tokenizer import Tokenizer


def sentinel_words(tokenizer: Tokenizer) -> list[int]:
    """The ids of the sentinels, the first span's first."""
    special = tokenizer.special_tokens()
    known = [special.get(f"<extra_id_{number}>") for number in range(SENTINELS)]
    return known if None not in known else list(range(tokenizer.vocab_size, tokenizer.vocab_size + SENTINELS))


class SpanSamples(Samples):
    """Samples with spans cut out.

    Args:
        inner: text in samples of `spans.text` tokens.
        spans: the lengths; sentinels: at least `spans.spans` ids.
        key: what the cuts depend on beside the number of the sample: seed and split.
    """

    bytes_per_token = None  # a loss over spans says nothing of bytes

    def __init__(self, inner: Samples, *, spans: Spans, sentinels: list[int], key: tuple):
        self._inner, self._spans, self._key = inner, spans, key
        self._sentinels = np.array(sentinels, dtype=np.int64)
        self.sequence_length, self.samples_per_epoch = spans.encoder, inner.samples_per_epoch
        self.eod, self.masking, self.vocab_size = inner.eod, inner.masking, max(inner.vocab_size, max(sentinels) + 1)

    def __getitem__(self, k: int) -> Sample:
        lengths, draws = self._spans, Draws(*self._key, k, "spans")
        text = self._inner[k].tokens[: lengths.text]
        kept, cut = (_cuts(draws, total, lengths.spans) for total in (lengths.text - lengths.noise, lengths.noise))
        read, said, place = [], [], 0
        for sentinel, before, inside in zip(self._sentinels, kept, cut):
            read += [text[place : place + before], [sentinel]]
            said += [[sentinel], text[place + before : place + before + inside]]
            place += before + inside
        tokens, target = (np.full(length, self.eod, dtype=np.int64) for length in (lengths.encoder, lengths.decoder))
        _fill(tokens, read)
        count = _fill(target, said) + 1  # the end is learnt, what fills up behind it is not
        return Sample(
            tokens, np.zeros(len(tokens), dtype=np.int32), (np.arange(len(target)) < count).astype(np.float32), target,
            {"decoder_tokens": np.concatenate(([self.eod], target[:-1]))},
        )


def _cuts(draws: Draws, total: int, parts: int) -> np.ndarray:
    """`parts` lengths of at least 1 whose sum is `total`; all such are as likely."""
    ends = np.concatenate((draws.choice(total - 1, parts - 1) + 1, [total]))
    return np.diff(ends, prepend=0)


def _fill(target: np.ndarray, parts: list) -> int:
    """Writes the parts one after the other; how many tokens they were."""
    joined = np.concatenate(parts)
    target[: len(joined)] = joined
    return len(joined)
