"""`check ...`: what a configuration means, without torch. It has been validated by the time it comes here."""
import json

from megatron_ext.cli import vocabulary
from megatron_ext.cli.options import Options
from megatron_ext.config import geometry
from megatron_ext.config.schema import Config


def check(config: Config, options: Options) -> int:
    """Prints the rank grid and the batch geometry."""
    vocab = vocabulary.words(config)
    print(json.dumps(geometry.report(config, vocab)) if options.json else geometry.text(config, vocab))
    return 0
