"""The front door: words in, exit code out. 0: it did what it says; 2: bad input, one line; 130: interrupted; 1: a bug, with traceback."""
import importlib
import sys
from collections.abc import Sequence
from dataclasses import replace

from megatron_ext.cli import options as command_line
from megatron_ext.parallel import launch


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    return launch.guarded(lambda: run(words), words)


def run(argv: Sequence[str]) -> int:
    """Parses, composes, validates, and calls the verb. Raises UserError."""
    from megatron_ext.cli import help as pages

    if not argv or argv[0] in ("-h", "--help", "help"):
        print(pages.overview())
        return 0
    if argv[0] in ("--version", "-V"):
        print(f"megatron-ext {pages.version()}")
        return 0
    options = command_line.parse(argv)
    if options.help:
        print(pages.verb_page(options.verb))
        return 0
    verb = getattr(importlib.import_module(f"megatron_ext.cli.verbs.{options.verb}"), options.verb)
    # doctor has to work where Hydra is missing; submit composes a configuration for each of its runs
    if options.verb == "submit" or options.verb == "doctor" and not options.overrides:
        from megatron_ext.config.schema import Config

        return verb(Config(), options)
    from megatron_ext.config.compose import compose
    from megatron_ext.config.validate import validate

    words = options.overrides
    if options.verb == "run":
        from megatron_ext.cli import recipe

        words = recipe.with_defaults(words)
    if options.verb == "plan" and options.action != "scaling":
        from megatron_ext.plan import assume

        options = replace(options, assumed=assume.assumed(words))
        words = (*words, *options.assumed)
    config = compose(words)
    if options.verb in ("train", "check") and config.checkpoint.start is not None:
        from megatron_ext.train.start import adopt

        config = adopt(config, options.overrides)
    if options.verb in ("train", "generate", "evaluate") or options.verb == "collect" and config.checkpoint.load is not None:
        layout = config.parallel
        asked = any(word.lstrip("+").startswith("launch.ranks=") for word in options.overrides)
        needed = layout.tp * layout.pp * layout.cp if options.verb != "train" else None
        config = launch.with_ranks(config, asked=asked, default=needed)
    validate(config, "search" if options.action in ("search", "calibrate", "scaling") else f"collect {options.action}" if options.verb == "collect" else options.verb)
    if options.verb in ("train", "check") and config.hardware.memory is not None:
        from megatron_ext.cli import vocabulary
        from megatron_ext.config.sizes import vocab_size
        from megatron_ext.plan.search import refuse

        refuse(config, vocabulary.words(config) or vocab_size(config))
    return verb(config, options) or 0
