"""What a row says of the machine it was measured on: device, clocks, versions, commit."""
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def device_name(device: torch.device) -> str:
    """"NVIDIA H100 80GB HBM3", or the CPU's model name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.is_file() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@cache
def _nvml(index: int):
    """(pynvml, handle) of a visible GPU, or None where NVML is not there."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
    except Exception:  # noqa: BLE001 no library, no driver, a device that NVML does not know: clocks are left blank
        return None


def clocks(device: torch.device) -> dict[str, int | str]:
    """SM and memory clock in MHz now; blank where nothing tells. To be read while the device is busy."""
    found = _nvml(device.index or 0) if device.type == "cuda" else None
    if found is None:
        return {"sm_clock_mhz": "", "memory_clock_mhz": ""}
    nvml, handle = found
    try:
        return {"sm_clock_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
                "memory_clock_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)}
    except nvml.NVMLError:
        return {"sm_clock_mhz": "", "memory_clock_mhz": ""}


def _driver(device: torch.device) -> str:
    found = _nvml(device.index or 0) if device.type == "cuda" else None
    return str(found[0].nvmlSystemGetDriverVersion()) if found else ""


def version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """The short hash, with "+" where tracked files differ from it; BENCH_COMMIT where the tree is not a git checkout."""
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("BENCH_COMMIT", "unknown")


def command() -> str:
    """The command that a user would type to run this again."""
    script = Path(sys.argv[0])
    shown = script.resolve().relative_to(ROOT) if script.is_absolute() and script.resolve().is_relative_to(ROOT) else script
    return shlex.join(["python", str(shown), *sys.argv[1:]])


def describe(device: torch.device) -> dict[str, str | int]:
    """The columns of the schema that are the same for every row of a run."""
    return {
        "device": device_name(device), "threads": torch.get_num_threads() if device.type == "cpu" else "",
        "torch": torch.__version__, "triton": version("triton"), "cuda": torch.version.cuda or "", "driver": _driver(device),
        "commit": commit(), "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), "command": command(),
    }
