"""What `evaluate evaluate.harness=[...]` is given: a checkpoint and task files. No torch, so that mistakes are told in a moment, and once."""
import tempfile
from pathlib import Path

from megatron_ext.cli.options import Options
from megatron_ext.config.families import generates
from megatron_ext.config.schema import Config
from megatron_ext.errors import UserError
from megatron_ext.evaluate import tasks
from megatron_ext.generate.checks import check_layout
from megatron_ext.train.restored import Source, source


def check(config: Config, options: Options) -> None:
    """Looks at all that is given, the task files too. Raises UserError."""
    found = find(config, options)
    with tempfile.TemporaryDirectory() as folder:
        tasks.gather(found.config.evaluate, Path(folder))


def find(config: Config, options: Options) -> Source:
    """The checkpoint; the layout and the lengths fit it. Raises UserError."""
    check_layout(config.parallel)
    found = source(config, options.overrides)
    generates(found.config, found.path)
    asked, has = config.evaluate.max_length, found.config.model.max_sequence_length
    if asked is not None and asked > has:
        raise UserError("evaluate.max_length", asked, f"the model of {found.path} has positions for {has} tokens")
    found.tokenizer_file()
    return found
