"""Slurm's own commands: asked for what it has, told to take a job. Arguments go as lists, never through a shell. No torch."""
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ext.config.cluster import seconds
from megatron_ext.errors import UserError
from megatron_ext.submit.job import Job
from megatron_ext.submit.render import FOREIGN

NEEDED = ("sbatch", "srun", "scontrol", "squeue", "sinfo")
TIMEOUT = 60.0  # seconds that a command may take
# What sbatch says -> the key that it is about.
COMPLAINTS = {"account": "cluster.account", "partition": "cluster.partition", "qos": "cluster.qos", "time limit": "cluster.time",
              "reservation": "cluster.reservation", "feature": "cluster.constraint", "constraint": "cluster.constraint",
              "gres": "cluster.gpus_per_node", "memory": "cluster.memory", "node": "cluster.nodes", "cpu": "cluster.cpus_per_task"}


@dataclass(frozen=True)
class Partition:
    """What `scontrol show partition` says of one. Times in seconds; accounts: those that may use it, None = all."""

    name: str
    default: bool
    up: bool
    min_nodes: int
    max_nodes: float
    max_time: float
    accounts: tuple[str, ...] | None
    denied: tuple[str, ...]
    qos: tuple[str, ...] | None


@dataclass(frozen=True)
class Nodes:
    """Nodes of one kind, as `sinfo` counts them. cpus, memory (MiB), gpus: of one node."""

    count: int
    cpus: int
    memory: int
    gpus: dict[str, int]
    state: str
    features: frozenset[str]

    @property
    def usable(self) -> bool:
        return not re.match(r"(down|drain|fail|unk|inval|power_down|reboot|maint)", self.state)


def missing() -> list[str]:
    """The commands of Slurm's that are not on PATH."""
    return [name for name in NEEDED if shutil.which(name) is None]


def ask(*command: str) -> str:
    """What a command of Slurm's prints. Raises UserError where it fails or does not answer."""
    environment = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT, env=environment, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise UserError("cluster", command[0], f"did not answer within {TIMEOUT:g} seconds") from None
    except OSError as error:
        raise UserError("cluster", command[0], f"cannot be run: {error.strerror}") from None
    if done.returncode:
        said = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise UserError("cluster", " ".join(command[:3]), "Slurm says: " + (said[-1] if said else f"exit code {done.returncode}"))
    return done.stdout


def fields(line: str) -> dict[str, str]:
    """A line of `scontrol --oneliner` taken apart."""
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


def partitions() -> list[Partition]:
    """All that this user is shown."""
    return [_partition(fields(line)) for line in ask("scontrol", "--oneliner", "show", "partition").splitlines() if line.startswith("PartitionName=")]


def _partition(found: dict[str, str]) -> Partition:
    def names(key: str) -> tuple[str, ...] | None:
        value = found.get(key, "ALL")
        return None if value in ("ALL", "N/A", "(null)") else tuple(value.split(","))

    most = found.get("MaxNodes", "UNLIMITED")
    return Partition(
        found["PartitionName"], found.get("Default") == "YES", found.get("State", "UP") == "UP", int(found.get("MinNodes", "0")),
        float("inf") if most.lower() in ("unlimited", "infinite") else float(most), seconds(found.get("MaxTime", "UNLIMITED")),
        names("AllowAccounts"), names("DenyAccounts") or (), names("AllowQos"),
    )


def nodes(partition: str) -> list[Nodes]:
    """The nodes of a partition, by kind and state."""
    found = []
    for line in ask("sinfo", "--noheader", "--exact", f"--partition={partition}", "--format=%D|%c|%m|%G|%T|%f").splitlines():
        count, cpus, memory, gres, state, features = (part.strip() for part in line.split("|"))
        gpus: dict[str, int] = {}
        # gpu:4, gpu:h100:8, gpu:h100:8(S:0-1), with others beside
        for name, kind, number in re.findall(r"(?:^|,)(gpu)(?::([A-Za-z][^:,()]*))?:(\d+)", gres):
            gpus[kind] = gpus.get(kind, 0) + int(number)
        names = frozenset() if features == "(null)" else frozenset(features.split(","))
        found.append(Nodes(int(count), int(cpus.rstrip("+")), int(memory.rstrip("+")), gpus, state.rstrip("*~#!%$@+-^").lower(), names))
    return found


def settings() -> dict[str, str]:
    """Slurm's configuration."""
    pairs = (line.split("=", 1) for line in ask("scontrol", "show", "config").splitlines() if "=" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def accounts(user: str) -> tuple[list[tuple[str, str]], str | None] | None:
    """((account, partition or ""), ...) that the accounting knows of a user, and the user's default; None where it cannot be asked."""
    if shutil.which("sacctmgr") is None:
        return None
    try:
        said = ask("sacctmgr", "--noheader", "--parsable2", "show", "associations", f"user={user}", "format=account,partition")
        default = ask("sacctmgr", "--noheader", "--parsable2", "show", "user", user, "format=defaultaccount").strip()
    except UserError:
        return None
    return [(line.split("|")[0], (line.split("|") + [""])[1]) for line in said.splitlines() if line.strip()], default or None


def sbatch(job: Job, after: Sequence[str] = ()) -> str:
    """Submits the script of a job (which has been written) and returns its number.

    Args:
        after: numbers of jobs that must have ended well.

    Raises:
        UserError: Slurm's own reason.
    """
    try:
        said = ask("sbatch", "--parsable", *dependency(after), str(job.script))
    except UserError as error:
        reason = re.sub(r"^(Slurm says: |sbatch: |error: |Batch job submission failed: )*", "", error.reason)
        key = next((key for word, key in COMPLAINTS.items() if word in reason.lower()), "sbatch")
        raise UserError(key, _value(job, key), f"Slurm refuses job {job.name}: {reason}") from None
    return said.strip().split(";")[0]  # with the cluster's name after a semicolon, where there are several


def dependency(after: Sequence[str]) -> list[str]:
    """The options of sbatch that hold a job back; one whose condition can never come true is ended."""
    return [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []


def cancel(numbers: Sequence[str]) -> None:
    """scancel, where there is something to cancel."""
    if numbers:
        ask("scancel", *numbers)


def _value(job: Job, key: str) -> object:
    if key == "sbatch":
        return job.script
    value = getattr(job.cluster, key.removeprefix("cluster."))
    return "null" if value is None else value
