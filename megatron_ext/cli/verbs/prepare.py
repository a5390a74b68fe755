"""`prepare input=PATH output=DIR ...`: text to tokenised, indexed data; with `curate=...` any files, cleaned first."""
from pathlib import Path

from megatron_ext.cli.options import Options
from megatron_ext.config.schema import Config
from megatron_ext.errors import UserError


def prepare(config: Config, options: Options) -> int:
    """Raises UserError when input or output is missing, and for what `data.prepare` and `curate.command` refuse."""
    if config.output is None:
        raise UserError("output", "null", "name the directory to write: prepare input=PATH output=DIR")
    if config.input is not None and not Path(config.input).exists():
        raise UserError("input", config.input, "is not there; name a text, .jsonl(.gz|.zst) or .parquet file, or a directory of them")
    if config.curate.steps:
        from megatron_ext.curate.command import prepare_curated

        for part in prepare_curated(config):
            print(part.describe())
        return 0
    from megatron_ext.data.prepare import prepare as write

    print(write(config.data, config.input, config.output).describe())
    return 0
