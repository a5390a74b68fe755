"""The front door: words in, exit code out. 0: it did what it says; 2: bad input, one line; 130: interrupted; 1: a bug, with traceback."""
import importlib
import sys
import traceback
from collections.abc import Sequence

from megatron_ext.cli import options as command_line
from megatron_ext.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. A rank that this project started reports its failure to its parent, which prints it once."""
    from megatron_ext.parallel import launch

    launch.follow_parent()
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return run(argv)
    except UserError as error:
        if not launch.report_failure(2, str(error)):
            print(f"error: {error}", file=sys.stderr)
        return launch.leave(2)
    except KeyboardInterrupt:
        return launch.leave(130)
    except BrokenPipeError:  # `check | head`
        sys.stderr.close()
        return launch.leave(1)
    except Exception:  # noqa: BLE001 whatever it is, a rank has to tell its parent
        text = traceback.format_exc()
        if not launch.report_failure(1, text):
            print(text, file=sys.stderr, end="")
        return launch.leave(1)


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
    from megatron_ext.config.compose import compose
    from megatron_ext.config.validate import validate

    config = compose(options.overrides)
    if options.verb in ("train", "generate", "evaluate"):
        from megatron_ext.parallel import launch

        layout = config.parallel
        asked = any(word.lstrip("+").startswith("launch.ranks=") for word in options.overrides)
        needed = layout.tp * layout.pp * layout.cp if options.verb != "train" else None
        config = launch.with_ranks(config, asked=asked, default=needed)
    validate(config, options.verb)
    return verb(config, options) or 0
