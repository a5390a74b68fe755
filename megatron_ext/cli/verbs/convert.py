"""`convert hf=DIR output=DIR` and `convert checkpoint.load=DIR output=DIR`: Hugging Face directories to checkpoints, and back."""
from pathlib import Path

from megatron_ext import checkpoint
from megatron_ext.cli.options import Options
from megatron_ext.config.schema import Config
from megatron_ext.errors import UserError
from megatron_ext.parallel import launch


def convert(config: Config, options: Options) -> int:
    """Raises UserError for what cannot be read, is not known, or lies where the output shall be."""
    output = Path(config.output)
    if output.is_file() or output.is_dir() and any(output.iterdir()):
        raise UserError("output", config.output, "is a file, or a directory that is not empty; name a new one")
    if config.hf is not None or config.megatron is not None:
        return launch.in_ranks(config, options.argv, lambda: _import(config, options))
    return _export(config)


def _import(config: Config, options: Options) -> int:
    from megatron_ext.convert import importer

    several = config.launch.ranks > 1
    if several:
        import torch

        from megatron_ext import platform

        # Nothing is computed: the ranks talk over gloo wherever they are, and megatron-core is not needed.
        platform.connect(platform.Platform(torch.device("cpu"), "gloo"), config.launch.timeout)
    found = importer.plan(config, options.overrides)
    sealed = importer.write(found, Path(config.output), private=config.run.private)
    if not several or platform.is_first_rank():
        print("\n".join(importer.described(found, Path(config.output), sealed)))
    if several:
        platform.disconnect()
    return 0


def _export(config: Config) -> int:
    from megatron_ext import platform

    platform.quiet()  # before megatron-core is imported
    from megatron_ext.convert import exporter

    path = checkpoint.find(config.checkpoint.load, Path(config.run.dir) / "checkpoints", best=True)
    if path is None:
        raise UserError("checkpoint.load", config.checkpoint.load, "names no checkpoint; give a checkpoint or run directory")
    found = exporter.plan(path, average=config.checkpoint.average)
    files = exporter.write_directory(found, Path(config.output), adapter=config.adapter is not None)
    print("\n".join(exporter.described(found, Path(config.output), files)))
    return 0
