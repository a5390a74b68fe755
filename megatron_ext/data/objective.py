"""The samples that a family of models is pretrained on: plain text for decoders, masked words for encoders, corrupted spans for encoder-decoders."""
from collections.abc import Sequence
from dataclasses import replace

from megatron_ext.config.schema import Config, ModelConfig
from megatron_ext.config.spans import spans_of
from megatron_ext.data.build import build_datasets, dataset_tokenizer
from megatron_ext.data.masked import MaskedSamples, mask_word
from megatron_ext.data.samples import Samples
from megatron_ext.data.spans import SpanSamples, sentinel_words
from megatron_ext.data.tokenizer import Tokenizer


def pretraining_samples(config: Config, splits: Sequence[str]) -> dict[str, Samples]:
    """The samples of each split. Raises UserError as `build_datasets`."""
    data, model = config.data, config.model
    if model.family == "decoder":
        return build_datasets(data, splits)
    tokenizer = dataset_tokenizer(data)[1]
    if model.family == "encoder":
        return {
            split: MaskedSamples(samples, mask=mask_word(tokenizer), words=tokenizer.vocab_size, share=data.masked_share, token_types=model.token_types,
                                 key=(data.seed, split))
            for split, samples in build_datasets(data, splits).items()
        }
    spans = spans_of(data.sequence_length, data.masked_share, data.span_length)
    return {
        split: SpanSamples(samples, spans=spans, sentinels=sentinel_words(tokenizer), key=(data.seed, split))
        for split, samples in build_datasets(replace(data, sequence_length=spans.text), splits).items()
    }


def words_of(model: ModelConfig, tokenizer: Tokenizer) -> int:
    """Words of the tokenizer and of the objective."""
    more = {"decoder": lambda _: [], "encoder": lambda t: [mask_word(t)], "encoder_decoder": sentinel_words}[model.family](tokenizer)
    return max([tokenizer.vocab_size, *(word + 1 for word in more)])
