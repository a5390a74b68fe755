"""The GPUs of a node through NVML: how many there are, and what each says about its health. No torch.

What counts as a fault follows NVIDIA's own advice: an uncorrectable ECC error since the last reset, rows or pages that wait for a reset to be
replaced, a row that could not be replaced, a PCIe link narrower than the device has, clocks that hardware or heat hold down
(docs.nvidia.com/deploy/a100-gpu-mem-error-mgmt, docs.nvidia.com/deploy/nvml-api). A power cap is normal under load.
"""
from collections.abc import Callable, Sequence
from types import ModuleType

from megatron_ext.observe.gpu import THROTTLE

SLOWED = {"hardware slowdown", "hardware thermal", "software thermal", "power brake"}  # of THROTTLE: faults
BUSY_GIB = 1.0  # memory in use before we begin; a driver with persistence mode alone takes half of that


def read_gpus() -> list[dict]:
    """What NVML says of every GPU that this process may see; [] without NVML or without a GPU. Facts that a device does not tell are left out.

    `index`, `uuid`, `name`, `memory` and `memory_used` (GiB), `processes` (their ids), `clock`, `clock_max`, `memory_clock` (MHz), `temperature` (C),
    `throttle` (reasons), `ecc_uncorrected` (since the last reset), `rows_pending`, `rows_failed`, `pages_pending`, `pcie_width`, `pcie_width_max`,
    `nvlinks` (active), `nvlinks_down`.
    """
    try:
        import pynvml as nvml
    except ImportError:
        return []
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:  # no driver, no GPU
        return []
    try:
        found = []
        for index in range(nvml.nvmlDeviceGetCount()):
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
            except nvml.NVMLError as error:  # it fell off the bus: counted by its absence, and said
                found.append({"index": index, "error": str(error)})
                continue
            found.append({"index": index, **_read(nvml, handle)})
        return found
    except nvml.NVMLError:
        return []
    finally:
        nvml.nvmlShutdown()


def _read(nvml: ModuleType, handle: object) -> dict:
    def text(value: str | bytes) -> str:
        return value.decode() if isinstance(value, bytes) else value

    def memory() -> dict:
        m = nvml.nvmlDeviceGetMemoryInfo(handle)
        return {"memory": m.total / 2**30, "memory_used": m.used / 2**30}

    def throttle() -> dict:
        ask = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None) or nvml.nvmlDeviceGetCurrentClocksThrottleReasons
        bits = ask(handle)
        return {"throttle": [name for bit, name in THROTTLE.items() if bits & bit]}

    def rows() -> dict:
        _, _, pending, failed = nvml.nvmlDeviceGetRemappedRows(handle)
        return {"rows_pending": bool(pending), "rows_failed": bool(failed)}

    def links() -> dict:
        states = []
        for link in range(getattr(nvml, "NVML_NVLINK_MAX_LINKS", 18)):
            try:
                states.append(bool(nvml.nvmlDeviceGetNvLinkState(handle, link)))
            except nvml.NVMLError:  # the first link that this device does not have
                break
        return {"nvlinks": sum(states), "nvlinks_down": len(states) - sum(states)} if states else {}

    readings: Sequence[Callable[[], dict]] = (
        lambda: {"uuid": text(nvml.nvmlDeviceGetUUID(handle))},
        lambda: {"name": text(nvml.nvmlDeviceGetName(handle))},
        memory,
        lambda: {"processes": sorted(p.pid for p in nvml.nvmlDeviceGetComputeRunningProcesses(handle))},
        lambda: {"clock": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)},
        lambda: {"clock_max": nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)},
        lambda: {"memory_clock": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)},
        lambda: {"temperature": nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)},
        throttle,
        lambda: {"ecc_uncorrected": nvml.nvmlDeviceGetTotalEccErrors(handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC)},
        rows,
        lambda: {"pages_pending": bool(nvml.nvmlDeviceGetRetiredPagesPendingStatus(handle))},
        lambda: {"pcie_width": nvml.nvmlDeviceGetCurrPcieLinkWidth(handle)},
        lambda: {"pcie_width_max": nvml.nvmlDeviceGetMaxPcieLinkWidth(handle)},
        links,
    )
    found: dict = {}
    for reading in readings:
        try:
            found.update(reading())
        except (nvml.NVMLError, AttributeError, TypeError, ValueError):  # not every device and driver tells everything
            continue
    return found


def faults(gpu: dict) -> list[tuple[str, str]]:
    """(what is wrong with a GPU, what to do), in plain words; [] for a healthy one."""
    found = []
    if "error" in gpu:
        found.append((f"does not answer ({gpu['error']})", "reset it or reboot the node; look for Xid in dmesg"))
    if gpu.get("ecc_uncorrected"):
        found.append((f"{gpu['ecc_uncorrected']} uncorrectable memory error(s) since its last reset", "reset it; if they come back, replace it"))
    if gpu.get("rows_failed"):
        found.append(("a memory row that could not be replaced", "replace it"))
    if gpu.get("rows_pending") or gpu.get("pages_pending"):
        found.append(("memory that waits for a reset to be replaced", "reset it (nvidia-smi --gpu-reset) or reboot the node"))
    if slowed := sorted(SLOWED & set(gpu.get("throttle", ()))):
        found.append((f"slowed down ({', '.join(slowed)}), {_clocks(gpu)}", "look at cooling and power of the node"))
    if gpu.get("pcie_width", 0) < gpu.get("pcie_width_max", 0):
        # An idle link may lower its speed, never its width.
        found.append((f"PCIe with {gpu['pcie_width']} of {gpu['pcie_width_max']} lanes", "reseat the GPU or reboot the node"))
    if gpu.get("nvlinks") and gpu.get("nvlinks_down"):
        found.append((f"{gpu['nvlinks_down']} of {gpu['nvlinks'] + gpu['nvlinks_down']} NVLinks down", "look at nvidia-smi nvlink -s and the fabric manager"))
    if gpu.get("processes") and gpu.get("memory_used", 0.0) > BUSY_GIB:
        pids = ", ".join(map(str, gpu["processes"]))
        found.append((f"{gpu['memory_used']:.1f} GiB in use before the run, by process(es) {pids}", "end them: an earlier job left them"))
    return found


def _clocks(gpu: dict) -> str:
    return f"{gpu.get('clock', '?')} of {gpu.get('clock_max', '?')} MHz, {gpu.get('temperature', '?')} C"
