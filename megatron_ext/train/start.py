"""What a stage takes over from the one it starts from (the model's sizes, precision, sequence length and tokenizer), and which models it asks. No torch.

Keys that were typed (and those of a stage's file) have the last word; a model that the weights do not fit is refused when they are loaded.
"""
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_ext import checkpoint
from megatron_ext.config.build import from_dict
from megatron_ext.config.compose import compose
from megatron_ext.config.schema import Config
from megatron_ext.errors import UserError

KEY = "checkpoint.start"


def stored_config(path: Path, key: str = KEY) -> Config:
    """The configuration that wrote a checkpoint. Raises UserError: no record of a training run."""
    record = checkpoint.read_record(path)
    try:
        return from_dict(record["config"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(key, path, f"its record is not that of a training run ({type(error).__name__}: {error})") from None
    except UserError as error:
        raise UserError(key, path, f"its record holds {error}; it was written by another version of this program") from None


def tokenizer_of(path: Path) -> Path | None:
    """The tokenizer.json of the run that a checkpoint lies in."""
    file = Path(path).absolute().parent.parent / "tokenizer.json"
    return file if file.is_file() else None


def adopt(config: Config, words: Sequence[str]) -> Config:
    """`config` with what its `checkpoint.start` says of the model, where `words` (the overrides typed) do not say otherwise.

    Raises:
        UserError: no such checkpoint, or one without a record.
    """
    if config.checkpoint.start is None:
        return config
    path = checkpoint.find(config.checkpoint.start, Path(config.run.dir) / "checkpoints", key=KEY, best=True)
    if path is None:
        raise UserError(KEY, config.checkpoint.start, "name a checkpoint or run directory; auto is for checkpoint.load")
    stored = stored_config(path)
    tokenizer = tokenizer_of(path)
    data = replace(config.data, sequence_length=stored.data.sequence_length,
                   tokenizer=str(tokenizer) if tokenizer else stored.data.tokenizer)
    model = replace(stored.model, vocab_size=stored.model.vocab_size or int(checkpoint.read_record(path)["vocab_size"]))
    return compose(words, base=replace(config, model=model, precision=stored.precision, data=data, lora=config.lora))


def same_tokenizer(key: str, path: Path, sha256: str) -> None:
    """Raises UserError where a model was trained on other tokens."""
    theirs = checkpoint.read_record(path)["data"].get("tokenizer")
    if theirs != sha256:
        raise UserError(key, path, f"was trained with another tokenizer (sha256 {str(theirs)[:12]}..., the policy's is {sha256[:12]}...): its "
                                   "numbers would be of other words")


def scalar_checkpoint(key: str, load: str, run_dir: str) -> Path:
    """The checkpoint of a reward model. Raises UserError: none there, or a model without a scalar head."""
    path = checkpoint.find(load, Path(run_dir) / "checkpoints", key=key, best=True)
    if path is None:
        raise UserError(key, load, "name a checkpoint or run directory of the reward stage")
    if checkpoint.read_record(path).get("head") != "scalar":
        raise UserError(key, path, "is a language model, not one of the reward stage: it gives no rewards")
    return path
