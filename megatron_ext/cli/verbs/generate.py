"""`generate checkpoint.load=DIR ...`, in as many ranks as the layout asks for."""
from megatron_ext.cli.options import Options
from megatron_ext.config.schema import Config
from megatron_ext.parallel import launch


def generate(config: Config, options: Options) -> int:
    """Starts the ranks where nobody has, and calls the room's command in each. Raises UserError."""
    given = options.prompts or options.prompt_file is not None
    return launch.in_ranks(config, options.argv, lambda: _rank(config, options), stdin=not given)


def _rank(config: Config, options: Options) -> int:
    from megatron_ext import platform

    platform.quiet()  # before megatron-core is imported
    from megatron_ext.generate.command import run

    return run(config, options) or 0
