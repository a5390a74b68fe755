"""`train stage=NAME ...`: one stage."""
import importlib
import os

from megatron_ext.cli import vocabulary
from megatron_ext.cli.options import Options
from megatron_ext.config.schema import Config
from megatron_ext.parallel import launch

# stage -> "module:function"; the function takes the configuration, in every rank. The front door is the one place that may name rooms above.
STAGES = {"pretrain": "megatron_ext.train.pretrain:train"}


def train(config: Config, options: Options) -> int:
    """Starts the ranks where nobody has, and trains in each."""
    if launch.launched_ranks(os.environ) is None:  # a rank has only as long as a collective may take
        from megatron_ext.data.build import ensure_prepared

        ensure_prepared(config.data)
        vocab = vocabulary.words(config)
        if vocab is not None and (note := vocabulary.padding_note(config, vocab)):
            print(note, flush=True)
    return launch.in_ranks(config, options.argv, lambda: _rank(config))


def _rank(config: Config) -> int:
    from megatron_ext import platform

    platform.quiet()
    module, function = STAGES[config.stage.name].split(":")
    getattr(importlib.import_module(module), function)(config)
    return 0
