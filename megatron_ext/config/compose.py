"""`conf/` and the command line's overrides, composed by Hydra into a `Config`; and a run's `config.yaml`, written and read back.

Hydra and OmegaConf are imported inside: `--help` must not wait for them.
"""
from collections.abc import Sequence
from pathlib import Path

from megatron_ext.config import build
from megatron_ext.config.overrides import GROUPS, Override, conf_dir, parse_all
from megatron_ext.config.schema import Config
from megatron_ext.errors import UserError
from megatron_ext.redact import redact


def compose(overrides: Sequence[str] = (), base: Config | None = None) -> Config:
    """The configuration that `overrides` (as typed) make of `conf/`.

    Args:
        overrides: `key=value` and `group=option`, in any order; options of groups come first, keys have the last word.
        base: start from this configuration (a checkpoint's, say) instead of the defaults: only what `overrides` name changes.

    Raises:
        UserError: unknown key or option, wrong type, malformed override.
    """
    parsed = parse_all(list(overrides))
    values = _hydra(parsed)
    if base is not None:
        values = _only_named(values, build.to_dict(base), parsed)
    return build.from_dict(values)


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML, without secrets: what `run.dir/config.yaml` holds."""
    import yaml

    return yaml.safe_dump(redact(build.to_dict(config)), sort_keys=False, allow_unicode=True)


def from_yaml(text: str, name: str = "config.yaml") -> Config:
    """Reads `to_yaml` back. `name` is what an error calls it. Raises UserError."""
    import yaml

    try:
        values = yaml.load(text, _loader())
    except yaml.YAMLError as error:
        raise UserError("config", name, f"is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError("config", name, "does not hold a configuration (a mapping of keys)")
    try:
        return build.from_dict(values)
    except UserError as error:
        raise UserError(error.key, error.value, f"{error.reason} (in {name})") from None


def load_config(path: Path | str) -> Config:
    """The configuration of a run: `path` is its `config.yaml` or the directory that holds one. Raises UserError."""
    path = Path(path)
    file = path / "config.yaml" if path.is_dir() else path
    try:
        return from_yaml(file.read_text(encoding="utf-8"), str(file))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError("config", str(file), "is not there; name a run directory or its config.yaml") from None
    except UnicodeDecodeError:
        raise UserError("config", str(file), "is not UTF-8 text") from None


def _loader() -> type:
    """YAML 1.1 reads `1e-3` as text; OmegaConf's loader reads it as a number, as Hydra did when the value was first composed."""
    from omegaconf._utils import get_yaml_loader

    return get_yaml_loader()


def _hydra(parsed: list[Override]) -> dict[str, object]:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            composed = hydra_compose("config", overrides=[str(override) for override in parsed])
        return OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        text = " ".join(str(error).split())
        guilty = next((override for override in parsed if override.key in text or override.value in text), None)
        key, value = (guilty.key, guilty.value) if guilty else ("overrides", " ".join(map(str, parsed)))
        raise UserError(key, value, text) from None


def _only_named(composed: dict, base: dict, parsed: list[Override]) -> dict:
    """`base`, with the keys that `parsed` names (directly, or through the file of an option) taken from `composed`."""
    import yaml

    keys = [override.key for override in parsed if not override.group]
    for override in parsed:
        if override.group:
            content = yaml.load((conf_dir() / override.key / f"{override.value}.yaml").read_text("utf-8"), _loader()) or {}
            shown = (conf_dir() / override.key / f"{override.value}.yaml").read_text("utf-8")
            keys += _leaves(content, "" if "@package _global_" in shown else override.key + ".")
    for key in keys:
        *sections, name = key.split(".")
        source, target = composed, base
        for section in sections:
            source, target = source[section], target[section]
        target[name] = source[name]
    return base


def _leaves(content: dict, prefix: str) -> list[str]:
    found: list[str] = []
    for name, value in content.items():
        if name != "defaults":
            found += _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]
    return found


__all__ = ["GROUPS", "compose", "from_yaml", "load_config", "to_yaml"]
