"""`report run.dir=DIR`: writes report.md again, of a run that goes on or has ended, of any stage, or of a folder of stages. No torch."""
import importlib
import json
from pathlib import Path

from megatron_ext.cli.options import Options
from megatron_ext.config.schema import Config
from megatron_ext.errors import UserError

PAGES = "rlhf.chain_report"  # the front door is the one place that may name rooms above


def report(config: Config, options: Options) -> int:
    """Prints where the page is, and each run's goodput. Raises UserError: no run there, or a directory that cannot be written."""
    directory = Path(config.run.dir)
    if not directory.is_dir():
        raise UserError("run.dir", config.run.dir, "is not there; name the run.dir of a `train`, or that of a `run`")
    from megatron_ext.observe import timeline
    from megatron_ext.observe.goodput import read_goodput

    pages = importlib.import_module(PAGES)
    try:
        path = pages.render(directory)
    except OSError as error:
        raise UserError("run.dir", config.run.dir, f"report.md cannot be written there: {error.strerror}") from None
    runs = [directory] if pages.is_run(directory) else [directory / stage for stage in pages.stages_of(directory)]
    found = {run.absolute().name: goodput for run in runs if (goodput := read_goodput(run)).lives}
    if options.json:
        print(json.dumps({"report": str(path), "runs": {name: timeline.summary(goodput) for name, goodput in found.items()}}))
        return 0
    print(path)
    for name, goodput in found.items():
        print(f"{name}: {timeline.sentence(goodput)}")
    return 0
