"""`collect build | augment | serve | export | status`: data for SFT and the reward stage (docs/collect.md). No torch but for a checkpoint of our own."""
import importlib

from megatron_ext.cli.options import Options
from megatron_ext.config.schema import Config

COMMAND = "rlhf.collect.command"  # the front door is the one place that may name rooms above


def collect(config: Config, options: Options) -> int:
    """Raises UserError, RunFailed."""
    return importlib.import_module(COMMAND).run(config, options)
