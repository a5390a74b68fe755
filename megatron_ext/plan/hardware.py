"""Which GPU is planned for: `hardware=NAME` (conf/hardware), or what a running process finds. No torch."""
from pathlib import Path

from megatron_ext.config.build import from_dict
from megatron_ext.config.overrides import conf_dir, options_of
from megatron_ext.config.schema import HardwareConfig
from megatron_ext.observe.flops import peak_flops

GIB = 1 << 30


def known() -> dict[str, HardwareConfig]:
    """Every GPU of conf/hardware, by name."""
    return {name: load(name) for name in options_of("hardware") if name != "unknown"}


def load(name: str) -> HardwareConfig:
    """One of conf/hardware. Raises FileNotFoundError."""
    import yaml

    text = Path(conf_dir() / "hardware" / f"{name}.yaml").read_text(encoding="utf-8")
    return from_dict(yaml.safe_load(text), HardwareConfig, "hardware.")


def find(device_name: str) -> HardwareConfig | None:
    """The GPU that torch calls `device_name`; None where the table has none of that name."""
    return next((one for one in known().values() if one.device == device_name.strip()), None)


def peaks(hardware: HardwareConfig) -> tuple[float | None, float | None]:
    """FLOP/s in bf16 and in fp8, as given, else by the name of the device; None = unknown."""
    def of(given: float | None, dtype: str) -> float | None:
        return given * 1e12 if given is not None else peak_flops(hardware.device, dtype) if hardware.device else None

    return of(hardware.bf16, "bf16"), of(hardware.fp8, "fp8")


def timed(hardware: HardwareConfig) -> bool:
    """Whether all is known that a step time follows from."""
    return None not in (peaks(hardware)[0], hardware.bandwidth, hardware.nvlink, hardware.network)
