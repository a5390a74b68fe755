"""`generate checkpoint.load=DIR --prompt TEXT ...`, in as many ranks as the layout asks for."""
import os

from megatron_ext.cli.options import Options
from megatron_ext.config.schema import Config
from megatron_ext.parallel import launch


def generate(config: Config, options: Options) -> int:
    """Starts the ranks where nobody has, and calls the room's command in each. Raises UserError."""
    from megatron_ext.generate import inputs

    stdin = inputs.from_stdin(options)
    if config.launch.ranks > 1 and launch.launched_ranks(os.environ) is None:  # a mistake is told once, before ranks are started
        given = inputs.read(config, options)
        if not stdin:
            given.encode(inputs.read_prompts(options))
    return launch.in_ranks(config, options.argv, lambda: _rank(config, options), stdin=stdin)


def _rank(config: Config, options: Options) -> int:
    from megatron_ext import platform

    platform.quiet()  # before megatron-core is imported
    from megatron_ext.generate.command import run

    return run(config, options) or 0
