"""`plan ...`: memory, time and money of a run; `plan search`: layouts for N GPUs; `plan acquire`: GPUs by when;
`plan calibrate`: fits the timing model; `plan scaling`: a loss from small runs; `--dry-run`: counts for real."""
import json
from pathlib import Path

from megatron_ext.cli import vocabulary
from megatron_ext.cli.options import Options
from megatron_ext.config import sizes
from megatron_ext.config.schema import Config
from megatron_ext.plan import calibration, text


def plan(config: Config, options: Options) -> int:
    """Prints a plan. The configuration is validated, and has what `assume` adds."""
    if options.action == "calibrate":
        return _calibrate(config, options)
    if options.action == "scaling":
        from megatron_ext.plan import scaling

        return scaling.run(config, options)
    vocab = vocabulary.words(config) or sizes.vocab_size(config)
    constants = calibration.load(config.plan.calibration)
    if options.action == "search":
        from megatron_ext.plan.search import search

        found = search(config, constants, vocab)
        print(json.dumps(text.search_dict(found)) if options.json else text.search_page(config, found))
        return 0
    if options.action == "acquire":
        from megatron_ext.plan import acquisition

        wanted = acquisition.acquire(config, constants, vocab)
        print(json.dumps(acquisition.as_dict(wanted)) if options.json else acquisition.page(config, wanted))
        return 0
    if options.dry_run:
        return _dry_run(config, options, vocab)
    made = text.make(config, constants, vocab)
    if config.output is not None:
        from megatron_ext.plan.plots import draw

        draw(made, constants, Path(config.output))
    print(json.dumps(text.as_dict(made) | {"assumed": options.assumed}) if options.json else text.page(made, options.assumed))
    return 0


def _calibrate(config: Config, options: Options) -> int:
    from megatron_ext.plan import fit

    found = fit.report() if config.output is None else fit.write(Path(config.output))
    if options.json:
        print(json.dumps(found))
        return 0
    print("\n".join(text.fit_page(found)))
    return 0


def _dry_run(config: Config, options: Options, vocab: int) -> int:
    from megatron_ext.plan import counted
    from megatron_ext.platform import quiet

    quiet()
    rows = counted.compare(config, vocab, options.ranks)
    print(json.dumps({"ranks": [row.as_dict() for row in rows]}) if options.json else counted.page(rows))
    return 0
