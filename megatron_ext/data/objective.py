"""The samples that a family of models is pretrained on: plain text for decoders, masked words for encoders."""
from collections.abc import Sequence

from megatron_ext.config.schema import Config
from megatron_ext.data.build import build_datasets, dataset_tokenizer
from megatron_ext.data.masked import MaskedSamples, mask_word
from megatron_ext.data.samples import Samples


def pretraining_samples(config: Config, splits: Sequence[str]) -> dict[str, Samples]:
    """The samples of each split. Raises UserError as `build_datasets`."""
    data, model = config.data, config.model
    text = build_datasets(data, splits)
    if model.family == "decoder":
        return text
    tokenizer = dataset_tokenizer(data)[1]
    return {
        split: MaskedSamples(samples, mask=mask_word(tokenizer), words=tokenizer.vocab_size, share=data.masked_share, token_types=model.token_types,
                             key=(data.seed, split))
        for split, samples in text.items()
    }
