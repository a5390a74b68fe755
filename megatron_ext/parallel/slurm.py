"""Who a process is in a Slurm job, read from the environment that srun makes. No torch, no subprocess: a thousand ranks start at once.

Address. Rank 0 runs on the first node of the step, since tasks are dealt out block by block; the node list is read as
`scontrol show hostnames` reads it, which a container may lack.

Port. Every rank has to know it without talking. Slurm's own reservation is taken where there is one (`srun --resv-ports`); else it follows from
the job and the step, 12 ports to a job, so that no two of 1,300 successive jobs and no two of 12 successive steps of a job meet on a node. It lies
below the range that Linux gives to those who ask for any port. A restarted job moves on: a port that another program holds costs one life.
"""
import re
from collections.abc import Mapping, MutableMapping
from itertools import product

from megatron_ext.errors import UserError

FIRST_PORT = 16384
JOBS, STEPS = 1300, 12  # 16384 + 1300 * 12 = 31984, under 32768 where Linux's own choice begins
_PIECE = re.compile(r"\[([^\[\]]*)\]|([^\[\],\s]+)")


def hostnames(nodelist: str) -> list[str]:
    """The nodes of a list such as `n[1-3,07],login`, `rack[1-2]n[1-4]`, in its order. Raises UserError for what is no such list."""
    found = []
    for word in _words(nodelist):
        pieces = []
        position = 0
        while position < len(word):
            match = _PIECE.match(word, position)
            if match is None:
                raise UserError("node list", nodelist, f"cannot be read at {word[position:]!r}")
            pieces.append([match[2]] if match[1] is None else _ranges(match[1], nodelist))
            position = match.end()
        found += ["".join(parts) for parts in product(*pieces)]
    if not found:
        raise UserError("node list", nodelist, "names no node")
    return found


def _words(nodelist: str) -> list[str]:
    """Split at the commas outside brackets."""
    return [word for word in re.split(r",(?![^\[]*\])", nodelist.strip()) if word]


def _ranges(inside: str, nodelist: str) -> list[str]:
    found = []
    for part in inside.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None or match[2] is not None and int(match[2]) < int(match[1]):
            raise UserError("node list", nodelist, f"cannot be read at [{inside}]")
        width = len(match[1])  # 007-012 keeps its zeros
        found += [f"{number:0{width}}" for number in range(int(match[1]), int(match[2] or match[1]) + 1)]
    return found


def tasks_per_node(text: str) -> list[int]:
    """`2(x3),1` -> [2, 2, 2, 1]: tasks of each node of a step, in the order of its node list."""
    found = []
    for part in text.split(","):
        tasks, _, times = part.partition("(x")
        found += [int(tasks)] * int(times.rstrip(")") or 1)
    return found


def master_port(environment: Mapping[str, str]) -> int:
    """Where rank 0 of this step listens."""
    reserved = re.match(r"\d+", environment.get("SLURM_STEP_RESV_PORTS", ""))
    if reserved:
        return int(reserved[0])
    return port(int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"]), restarts(environment))


def port(job: int, step: int, restart: int = 0) -> int:
    """The port that follows from a job, its step and how often it was restarted."""
    return FIRST_PORT + job % JOBS * STEPS + (step + 5 * restart) % STEPS


def restarts(environment: Mapping[str, str]) -> int:
    """How often this job was requeued; Slurm leaves the variable out in the first life."""
    return int(environment.get("SLURM_RESTART_COUNT", "0"))


def life(environment: Mapping[str, str]) -> str | None:
    """`JOB.RESTARTS`: names this life of this job. None outside of Slurm."""
    return f"{environment['SLURM_JOB_ID']}.{restarts(environment)}" if "SLURM_JOB_ID" in environment else None


def step_ranks(environment: Mapping[str, str]) -> int | None:
    """Tasks of the step that this process is one of; None where srun did not start it, or alone. A batch script itself has no step."""
    if "SLURM_PROCID" not in environment or "SLURM_STEP_ID" not in environment:
        return None
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1")))
    return tasks if tasks > 1 else None


def adopt(environment: MutableMapping[str, str]) -> None:
    """Sets what torch reads (RANK, WORLD_SIZE, MASTER_ADDR, ...) in a task of srun; what somebody has set already stays.

    Threads: those of the task's share of cores, else one; a rank that takes the whole node's is slower than one that takes none.
    """
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["WORLD_SIZE"] = str(step_ranks(environment))
    counts = environment.get("SLURM_STEP_TASKS_PER_NODE")
    if counts and "SLURM_NODEID" in environment:
        environment["LOCAL_WORLD_SIZE"] = str(tasks_per_node(counts)[int(environment["SLURM_NODEID"])])
    if "MASTER_ADDR" not in environment:
        nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
        environment["MASTER_ADDR"] = hostnames(nodes)[0]
    environment.setdefault("MASTER_PORT", str(master_port(environment)))
    environment.setdefault("OMP_NUM_THREADS", environment.get("SLURM_CPUS_PER_TASK", "1"))
