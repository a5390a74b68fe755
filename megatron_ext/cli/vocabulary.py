"""How many words there are: the prepared data knows, the configuration alone does not. No torch, no numpy."""
from megatron_ext.config import sizes
from megatron_ext.config.schema import Config
from megatron_ext.errors import UserError


def words(config: Config) -> int | None:
    """Words of the tokenizer of `data.path`; None when no prepared directory is named, so that only the configuration tells.

    Raises UserError: no such directory, or a model with fewer words than the data.
    """
    if config.data.path is None:
        return None
    from megatron_ext.data.prepared import Prepared

    prepared = Prepared.load(config.data.path)
    found, of = prepared.vocab_size, "the tokenizer"
    if config.model.family != "decoder":  # the objective may have words that the tokenizer has not
        from megatron_ext.data.objective import words_of
        from megatron_ext.data.tokenizer import Tokenizer

        found, of = words_of(config.model, Tokenizer.from_file(prepared.tokenizer_path)), "the tokenizer and the objective"
    if config.model.vocab_size is not None and config.model.vocab_size < found:
        raise UserError("model.vocab_size", config.model.vocab_size, f"is below the {found} words of {of} in {config.data.path}")
    return config.model.vocab_size or found


def padding_note(config: Config, vocab: int) -> str | None:
    """What is said when the table gets rows that no word uses; None when it does not."""
    padded = sizes.padded_vocabulary(vocab, config.model.vocab_multiple, config.parallel.tp)
    if padded == vocab:
        return None
    return f"vocabulary {vocab:,}, padded to {padded:,} rows: a multiple of {config.model.vocab_multiple} that divides over {config.parallel.tp} " \
           "tensor-parallel ranks"
