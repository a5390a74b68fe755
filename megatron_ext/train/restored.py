"""An engine from a checkpoint alone, at any layout: for generation and evaluation.

The model, its adapters, its precision and its data are what the checkpoint's record says; the layout, and how many ranks there are, is the present
command's. Keys that were typed on the command line win where they may (`precision=fp32`, `data.path=DIR`); another model is refused.
No torch until `restored_engine`.
"""
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ext import checkpoint
from megatron_ext.config.build import from_dict
from megatron_ext.config.compose import compose
from megatron_ext.config.schema import Config
from megatron_ext.config.validate import check_layout
from megatron_ext.convert import carried
from megatron_ext.data.tokenizer import Tokenizer, tokenizer_file
from megatron_ext.errors import UserError
from megatron_ext.train import record as records

if TYPE_CHECKING:
    from megatron_ext.platform import Platform
    from megatron_ext.train.engine import Engine

KEY = "checkpoint.load"


@dataclass(frozen=True)
class Source:
    """A checkpoint that was found, and what this command makes of it.

    Attributes:
        path: the step's directory.
        record: what it says of its run.
        config: the present command's, with the checkpoint's model, precision and data.
    """

    path: Path
    record: dict
    config: Config

    @property
    def vocab_size(self) -> int:
        return self.record["vocab_size"]

    @property
    def tokenizer_sha256(self) -> str:
        return self.record["data"]["tokenizer"]

    @property
    def imported(self) -> bool:
        """Whether the weights are as they came out of a Hugging Face directory."""
        return self.record.get("stage") == "import"

    @property
    def run(self) -> Path:
        """The directory of the run that it lies in, absolute."""
        return self.path.absolute().parent.parent

    @property
    def folder(self) -> Path:
        """Where the files lie that were imported beside the weights, if there are any."""
        return self.run / carried.FOLDER

    @property
    def ends(self) -> tuple[int, ...] | None:
        """The tokens that end a completion, where the imported settings of generation name them; None: the tokenizer's end of document."""
        return tuple(token for token in carried.ends(self.folder) if 0 <= token < self.vocab_size) or None

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the run (see `tokenizer_file`)."""
        return self._tokenizer[1]

    def tokenizer_file(self) -> Path:
        """The run's tokenizer.json, in its directory, `data.tokenizer`, or the data it was trained on.

        Raises:
            UserError: none of them is there, or none is the one the model was trained with.
        """
        return self._tokenizer[0]

    @cached_property  # a large file takes a second to parse
    def _tokenizer(self) -> tuple[Path, Tokenizer]:
        if not self.tokenizer_sha256:
            raise UserError(KEY, self.path, "was imported from a directory without a tokenizer: save one there with "
                                            "AutoTokenizer.from_pretrained(NAME).save_pretrained(DIR) and convert it again")
        data = self.config.data
        seen = []
        for place in (self.run, data.tokenizer, data.path, *data.paths):
            file = None if place is None else tokenizer_file(place)
            if file is None or not file.is_file():
                continue
            found = Tokenizer.from_file(file, end=carried.end_text(self.folder))
            if found.sha256 == self.tokenizer_sha256:
                return file, found
            seen.append(str(file))
        other = f"; {', '.join(seen)}: another one" if seen else ""
        reason = f"the tokenizer of {self.path} (sha256 {self.tokenizer_sha256[:12]}...) is not in its run directory{other}; name its file"
        raise UserError("data.tokenizer", data.tokenizer, reason)


def source(config: Config, words: Sequence[str]) -> Source:
    """Finds the checkpoint that `checkpoint.load` means and reads its record. No tensors yet.

    Args:
        words: the overrides that were typed.

    Raises:
        UserError: no checkpoint, a damaged record, another model than the one that was typed, a layout that the model does not fit.
    """
    path = checkpoint.find(config.checkpoint.load, Path(config.run.dir) / "checkpoints", best=True)
    if path is None:
        raise UserError(KEY, config.checkpoint.load, f"{config.run.dir}/checkpoints holds no complete checkpoint; name one, or run.dir")
    record = checkpoint.read_record(path)
    try:
        stored = from_dict(record["config"])
        vocab_size, has = int(record["vocab_size"]), record["model"]
        record["data"]["tokenizer"][:1].encode()
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(KEY, path, f"its record is not that of a training run ({type(error).__name__}: {error})") from None
    except UserError as error:
        raise UserError(KEY, path, f"its record holds {error}; it was written by another version of this program") from None
    data = stored.data
    if any(word.lstrip("+").startswith(("data.path=", "data.paths=")) for word in words):
        data = replace(data, path=None, paths=(), weights=())  # they name the data together
    merged = compose(words, base=replace(config, model=stored.model, precision=stored.precision, data=data, lora=stored.lora))
    asked = records.architecture(merged.model, vocab_size)
    if (key := records.different(asked, has, words)) is not None:
        raise UserError(f"model.{key}", asked.get(key), f"the model of {path} has {has.get(key)}; leave model keys out, the checkpoint knows them")
    check_layout(merged)
    return Source(path, record, merged)


def restored_engine(found: Source, device: "Platform") -> "Engine":
    """The model of a checkpoint on this job's ranks, without optimizer. Collective.

    Raises:
        UserError: ranks that do not divide; a damaged file.
    """
    from megatron_ext.train.engine import Engine
    from megatron_ext.train.stage import layout_of
    from megatron_ext.train.weights import load_weights

    engine = Engine(found.config, layout_of(found.config), device, vocab_size=found.vocab_size, train=False)
    load_weights(engine, found.path, average=found.config.checkpoint.average, merge_adapters=False)
    return engine

