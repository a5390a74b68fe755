"""A Hugging Face `config.json`, read with nothing passed over: a value that we do not compute is refused by key and value, and a key that nobody has
asked for is told, since it may mean that the model computes something else.
"""
import json
from collections.abc import Sequence
from pathlib import Path

from megatron_ext.errors import UserError

FILE = "config.json"
# Of every family: what says nothing of how logits are computed. Ids of special tokens are read where text is made (carried.py).
COMMON = (
    "_name_or_path", "_attn_implementation_autoset", "activation_dropout", "architectures", "attention_dropout", "attn_pdrop", "auto_map", "bos_token_id",
    "chunk_size_feed_forward", "classifier_dropout", "dtype", "embd_pdrop", "eos_token_id", "finetuning_task", "gradient_checkpointing",
    "id2label", "initializer_range", "init_std",
    "keys_to_ignore_at_inference", "label2id", "model_type", "name_or_path", "output_attentions", "output_hidden_states", "output_past", "pad_token_id",
    "prefix", "problem_type", "return_dict", "resid_pdrop", "sep_token_id", "task_specific_params", "tokenizer_class", "torch_dtype", "torchscript",
    "transformers_version", "transformers.js_config", "unsloth_version", "use_cache", "use_bfloat16", "use_return_dict", "vocab_size",
)
GENERATION = (  # of transformers before 4.30, which kept the settings of generation here
    "bad_words_ids", "begin_suppress_tokens", "decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate",
    "suppress_tokens", "temperature", "tf_legacy_loss", "tie_encoder_decoder", "top_k", "top_p", "typical_p",
)
# Where they are set to anything else than what is named, the model is not a plain decoder with plain weights.
PLAIN = {"quantization_config": None, "is_encoder_decoder": False, "is_decoder": False, "add_cross_attention": False, "cross_attention_hidden_size": None,
         "pruned_heads": {}}


class Settings:
    """The values of a `config.json`. Every method marks the keys it is asked for as read."""

    def __init__(self, values: dict, path: Path | str = FILE):
        self.values, self.path = values, path
        self._read: set[str] = set()

    @classmethod
    def of(cls, directory: Path, key: str = "hf", *, file: str = FILE) -> "Settings":
        """Raises UserError: no such file in the directory, or no JSON object in it."""
        path = Path(directory) / file
        try:
            values = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise UserError(key, directory, f"holds no {file}; name the directory of a model as transformers saves it") from None
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(key, path, f"cannot be read ({str(error)[:80]})") from None
        if not isinstance(values, dict):
            raise UserError(key, path, "is not a table of settings")
        return cls(values, path)

    def get(self, key: str, default: object = None) -> object:
        """The value, or transformers' default where the file leaves it out."""
        self._read.add(key)
        return self.values.get(key, default)

    def size(self, key: str) -> int:
        """A whole number of at least 1. Raises UserError where it is not there either."""
        if self.values.get(key) is None:
            raise self.wrong(key, None, "is not there, and the model has no size without it")
        return self.whole(key, None)

    def whole(self, key: str, default: int | None, *, least: int = 1) -> int | None:
        """A whole number, or None. Raises UserError."""
        value = self.get(key, default)
        if value is not None and (type(value) is not int or value < least):
            raise self.wrong(key, value, f"must be a whole number of at least {least}")
        return value

    def number(self, key: str, default: float) -> float:
        """A finite number. Raises UserError."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
            raise self.wrong(key, value, "must be a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Raises UserError for what is neither true nor false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, value, "must be true or false")
        return value

    def choice(self, key: str, choices: dict[str, str], default: str) -> str:
        """What `choices` makes of a value. Raises UserError naming those that are known."""
        value = self.get(key, default)
        if not isinstance(value, str) or value not in choices:
            raise self.wrong(key, value, f"is not supported; {', '.join(choices)} {'are' if len(choices) > 1 else 'is'}")
        return choices[value]

    def must(self, key: str, *allowed: object, why: str = "") -> None:
        """Raises UserError where the value is none of `allowed` (a key that is not there passes)."""
        value = self.get(key, allowed[0])
        if value not in allowed:
            raise self.wrong(key, value, f"is not supported{why}; only {' or '.join(json.dumps(one) for one in allowed)}")

    def ignore(self, *keys: str) -> None:
        """Keys that do not change what is computed."""
        self._read.update(keys)

    def finish(self) -> Sequence[str]:
        """Checks what all families have in common; the keys that nobody asked for, with their values. Raises UserError."""
        for key, plain in PLAIN.items():
            if key in self._read:  # by a family that knows what it means
                continue
            self.must(key, plain, *((None,) if plain is not None else ()))
        self.ignore(*COMMON, *GENERATION)
        return [f"{key}={json.dumps(value)[:60]}" for key, value in sorted(self.values.items()) if key not in self._read and not key.startswith("summary_")]

    def wrong(self, key: str, value: object, reason: str) -> UserError:
        return UserError(f"{Path(self.path).name}: {key}", json.dumps(value), reason)
