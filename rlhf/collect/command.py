"""What the actions of `collect` do, and what they print."""
import json
from collections.abc import Sequence
from pathlib import Path

from megatron_ext.cli.options import Options
from megatron_ext.config.schema import Config
from megatron_ext.parallel import launch


def run(config: Config, options: Options) -> int:
    """Raises UserError, RunFailed."""
    return {"build": _build, "augment": _augment, "serve": _serve, "export": _export, "status": _status}[options.action](config, options)


def _build(config: Config, options: Options) -> int:
    from rlhf.collect.build import build

    return _tell(build(config), options, Path(config.output))


def _export(config: Config, options: Options) -> int:
    from rlhf.collect.export import export

    return _tell(export(config), options, Path(config.output or config.input))


def _status(config: Config, options: Options) -> int:
    from rlhf.collect import progress

    found = progress.status(Path(config.input), config.collect)
    print(json.dumps(found, ensure_ascii=False) if options.json else progress.text(found))
    return 0


def _serve(config: Config, options: Options) -> int:
    from rlhf.collect.server import serve

    return serve(config)


def _augment(config: Config, options: Options) -> int:
    from rlhf.collect.augment import Augmentation, augment

    if config.collect.endpoint is None:
        return launch.in_ranks(config, options.argv, lambda: _own(config, options))
    from rlhf.collect.endpoint import Endpoint

    work, endpoint = Augmentation.of(config, options.overrides), Endpoint(config.collect)
    if endpoint.note:
        print(f"note: {endpoint.note}", flush=True)
    return _tell(augment(work, config.collect.model, lambda: endpoint), options, Path(config.output))


def _own(config: Config, options: Options) -> int:
    """In each rank."""
    from megatron_ext import platform

    platform.quiet()  # before megatron-core is imported
    from megatron_ext.generate import inputs
    from rlhf.collect.augment import Augmentation, augment
    from rlhf.collect.own import Own, identity

    given = inputs.read(config, options)
    work = Augmentation.of(given.source.config, options.overrides)
    own = Own(given)
    if own.first:
        _tell(augment(work, identity(given), lambda: own), options, Path(config.output))
        own.end()
    else:
        own.serve()
    platform.disconnect()
    return 0


def _tell(manifest: dict, options: Options, folder: Path) -> int:
    if options.json:
        print(json.dumps(manifest, ensure_ascii=False))
    else:
        print("\n".join(_lines(manifest, folder)))
    return 0


def _lines(manifest: dict, folder: Path) -> Sequence[str]:
    found = [f"{folder / one['file']}: {one['records']:,} records" for one in manifest["outputs"]]
    if manifest["left_out"]:
        found.append("left out: " + ", ".join(f"{reason} {count:,}" for reason, count in manifest["left_out"].items()))
    if "spent" in manifest:
        spent = ", ".join(f"{name} {count:,}" for name, count in manifest["spent"].items())
        found.append(f"replies: {manifest['replies']:,}, new {manifest['new_replies']:,}; {spent}")
    if "agreement" in manifest:
        from rlhf.collect.progress import sentence

        found.append(f"agreement: {sentence(manifest['agreement'])}")
    return found + [f"warning: {line}" for line in manifest.get("warnings", ())]
