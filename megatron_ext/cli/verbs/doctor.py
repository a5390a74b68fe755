"""`doctor`: what serves each op here, and why not something better."""
import json

from megatron_ext import doctor as examination
from megatron_ext.cli.options import Options
from megatron_ext.config.schema import Config


def doctor(config: Config, options: Options) -> int:
    """Prints the findings; 1 when something keeps a run from working."""
    found = examination.examine()
    print(json.dumps(found) if options.json else examination.text(found))
    return 1 if found["problems"] else 0
