"""`evaluate checkpoint.load=DIR ...`, in as many ranks as the layout asks for."""
import os

from megatron_ext.cli.options import Options
from megatron_ext.config.schema import Config
from megatron_ext.parallel import launch


def evaluate(config: Config, options: Options) -> int:
    """Starts the ranks where nobody has, and calls the room's command in each. Raises UserError."""
    if config.evaluate.harness:
        from megatron_ext.evaluate import tasks

        tasks.offline(os.environ)  # before anything of Hugging Face's is imported
    if config.launch.ranks > 1 and launch.launched_ranks(os.environ) is None:  # a mistake is told once, before ranks are started
        from megatron_ext.train.restored import source

        if config.evaluate.harness:
            from megatron_ext.evaluate.harness_inputs import check

            check(config, options)
        else:
            source(config, options.overrides)
    return launch.in_ranks(config, options.argv, lambda: _rank(config, options))


def _rank(config: Config, options: Options) -> int:
    from megatron_ext import platform

    platform.quiet()  # before megatron-core is imported
    from megatron_ext.evaluate.command import run

    return run(config, options) or 0
