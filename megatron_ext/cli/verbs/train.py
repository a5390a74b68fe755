"""`train stage=NAME ...`: one stage."""
import os

import os

from megatron_ext.cli import vocabulary
from megatron_ext.cli.options import Options
from megatron_ext.config.schema import Config
from megatron_ext.parallel import launch


def train(config: Config, options: Options) -> int:
    """Starts the ranks where nobody has, and trains in each."""
    if launch.launched_ranks(os.environ) is None:  # a rank has only as long as a collective may take
        from megatron_ext.data.build import ensure_prepared

        ensure_prepared(config.data)
    if launch.launched_ranks(os.environ) is None:  # once, before ranks exist
        vocab = vocabulary.words(config)
        if vocab is not None and (note := vocabulary.padding_note(config, vocab)):
            print(note, flush=True)
    return launch.in_ranks(config, options.argv, lambda: _rank(config))


def _rank(config: Config) -> int:
    from megatron_ext import platform

    platform.quiet()
    from megatron_ext.train.loop import train as loop

    loop(config)
    return 0
