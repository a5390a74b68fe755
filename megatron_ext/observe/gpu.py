"""Figures of this process's GPU through NVML (`nvidia-ml-py`): how busy, how full, how warm, and whether it is being slowed down.

Without an NVIDIA GPU or without nvidia-ml-py there are none, and `read` gives an empty dictionary. A reading takes about a millisecond.
"""
import os

# NVML_CLOCKS_THROTTLE_REASONS_*: https://docs.nvidia.com/deploy/nvml-api/group__nvmlClocksEventReasons.html
# Idle (0x1) and the clocks that somebody chose (0x2, 0x100) are not throttling.
THROTTLE = {0x4: "power cap", 0x8: "hardware slowdown", 0x10: "sync boost", 0x20: "software thermal", 0x40: "hardware thermal",
            0x80: "power brake"}


class GpuMonitor:
    """Reads one GPU.

    Args:
        index: local index among the visible devices (`CUDA_VISIBLE_DEVICES` is honoured: indices and UUIDs); NVML itself counts all.
    """

    def __init__(self, index: int = 0):
        self._nvml = self._handle = None
        try:
            import pynvml
        except ImportError:
            return
        try:
            pynvml.nvmlInit()
            self._nvml = pynvml
            self._handle = self._find(index)
        except (pynvml.NVMLError, IndexError, ValueError):
            self.close()

    def _find(self, index: int) -> object:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        name = visible.split(",")[index].strip() if visible is not None else str(index)
        if name.isdigit():
            return self._nvml.nvmlDeviceGetHandleByIndex(int(name))
        return self._nvml.nvmlDeviceGetHandleByUUID(name)

    def read(self) -> dict[str, float | str]:
        """`gpu_utilisation` (%), `gpu_memory_used` and `gpu_memory_total` (GiB), `gpu_power` and `gpu_power_limit` (W),
        `gpu_temperature` (C), `gpu_clock` and `gpu_memory_clock` (MHz), `gpu_throttle` (reasons, "" = none),
        `gpu_energy` (J since the driver was loaded; Volta and later).
        What a device does not tell is left out; {} without a GPU."""
        if self._handle is None:
            return {}
        nvml, handle, figures = self._nvml, self._handle, {}

        def memory() -> dict:
            m = nvml.nvmlDeviceGetMemoryInfo(handle)
            return {"gpu_memory_used": m.used / 2**30, "gpu_memory_total": m.total / 2**30}

        def throttle() -> dict:
            ask = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None) or nvml.nvmlDeviceGetCurrentClocksThrottleReasons
            bits = ask(handle)
            return {"gpu_throttle": ", ".join(name for bit, name in THROTTLE.items() if bits & bit)}

        for reading in (
            lambda: {"gpu_utilisation": nvml.nvmlDeviceGetUtilizationRates(handle).gpu},
            memory,
            lambda: {"gpu_power": nvml.nvmlDeviceGetPowerUsage(handle) / 1000},
            lambda: {"gpu_power_limit": nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000},
            lambda: {"gpu_temperature": nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)},
            lambda: {"gpu_clock": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)},
            lambda: {"gpu_memory_clock": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)},
            throttle,
            lambda: {"gpu_energy": nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000},
        ):
            try:
                figures.update(reading())
            except (nvml.NVMLError, AttributeError):  # not every device tells everything (MIG slices, laptops)
                continue
        return figures

    def close(self) -> None:
        nvml, self._nvml, self._handle = self._nvml, None, None
        if nvml is not None:
            try:
                nvml.nvmlShutdown()
            except nvml.NVMLError:
                pass
