"""How long the sequences of span corruption are (Raffel et al. 2019, arXiv 1910.10683, section 3.1.4; `random_spans_helper` of T5's code). No torch.

Of T tokens of text n = round(share T) lie in k = round(n / span) spans. The encoder reads the T - n others, a sentinel in the place of each span, and the
end: T - n + k + 1. The decoder says each sentinel, what its span was, and the end: n + k + 1. T is the largest that fits the encoder's sequence (512
takes 568 tokens of text, and 114 to say); where it leaves a place free the end stands twice.
"""
from dataclasses import dataclass

SENTINELS = 100  # words that stand for a span, as in T5's vocabulary
MULTIPLE = 8  # the decoder's sequence is padded to it, so that it divides over tensor-parallel ranks as the encoder's does


@dataclass(frozen=True)
class Spans:
    """Lengths in tokens: `text` is read, `noise` of it in `spans` spans; `encoder` and `decoder` are what the model sees, fillings within."""

    text: int
    noise: int
    spans: int
    encoder: int
    decoder: int


def spans_of(sequence_length: int, share: float, span: float) -> Spans:
    """The lengths for an encoder's sequence of `sequence_length`, at least 4."""

    def split(text: int) -> tuple[int, int, int]:
        noise = min(max(round(text * share), 1), text - 1)
        count = min(max(round(noise / span), 1), noise, text - noise)
        return noise, count, text - noise + count + 1

    text = 2
    while split(text + 1)[2] <= sequence_length:
        text += 1
    noise, count, _ = split(text)
    return Spans(text, noise, count, sequence_length, -(-(noise + count + 1) // MULTIPLE) * MULTIPLE)
