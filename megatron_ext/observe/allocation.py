"""When this job was handed in, and when it got its nodes: what the goodput ledger calls queue and start-up. No torch.

Slurm tells both (`scontrol show job`), and sets them anew when it requeues a job. Elsewhere nobody waited for an allocation, and what started is
the command that this process, or the one that started it as a rank, belongs to.
"""
import os
import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from megatron_ext.parallel.job import PARENT

STARTED = "MEGATRON_EXT_STARTED"  # seconds since 1970: set by what runs several stages in one allocation, for each of them


def allocation_times(environ: Mapping[str, str] | None = None, *, timeout: float = 10.0) -> tuple[float | None, float | None]:
    """(submitted, started) in seconds since 1970; None for what is not known.

    Args:
        environ: os.environ, unless given. timeout: seconds that Slurm's controller is given to answer.
    """
    environ = os.environ if environ is None else environ
    if (said := _number(environ.get(STARTED))) is not None:
        return None, said
    if "SLURM_JOB_ID" not in environ:
        return None, process_start(int(environ[PARENT]) if environ.get(PARENT, "").isdigit() else os.getpid())
    job = environ["SLURM_JOB_ID"]
    submitted, started = job_times(_scontrol(job, timeout), job) if job.isdigit() else (None, None)
    return submitted, started if started is not None else _number(environ.get("SLURM_JOB_START_TIME"))


def job_times(text: str, job: str) -> tuple[float | None, float | None]:
    """(submitted, started) of a job, from what `scontrol show job --oneliner` prints: a line a job, times in local time."""
    line = next((line for line in text.splitlines() if line.startswith(f"JobId={job} ")), "")
    found = dict(re.findall(r"(?<!\S)(SubmitTime|StartTime)=(\S+)", line))
    return _local(found.get("SubmitTime")), _local(found.get("StartTime"))


def process_start(pid: int) -> float | None:
    """When a process of this machine was started, in seconds since 1970, to a hundredth; None where that cannot be known."""
    try:
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])  # the name before may hold blanks
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None
    return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")


def _scontrol(job: str, timeout: float) -> str:
    try:
        return subprocess.run(["scontrol", "show", "job", "--oneliner", job], capture_output=True, text=True, check=False, timeout=timeout,
                              stdin=subprocess.DEVNULL, env={**os.environ, "SLURM_TIME_FORMAT": "standard"}).stdout
    except (OSError, subprocess.TimeoutExpired):  # not in this container, or a controller that is down: the run goes on
        return ""


def _local(text: str | None) -> float | None:
    try:
        return time.mktime(time.strptime(text or "", "%Y-%m-%dT%H:%M:%S"))
    except ValueError:  # "Unknown" or "N/A"
        return None


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None
