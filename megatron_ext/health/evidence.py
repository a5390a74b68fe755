"""What is kept of a hang: all Python stacks, native ones where py-spy is installed, torch's flight recorder, the state of processes.

    rank_N.stacks        faulthandler: every thread of rank N
    rank_N.pyspy         py-spy dump: native stacks of living ranks, Python's of one that is stopped
    rank_N.flight.json   torch's flight recorder: the last collectives of all groups with sizes and states
"""
import faulthandler
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import main_thread
from typing import TYPE_CHECKING

from megatron_ext.health.heartbeat import Heartbeat, Waiting

if TYPE_CHECKING:
    from megatron_ext.health.collectives import Collectives

FLIGHT_ENTRIES = "2000"  # collectives that the recorder keeps
PY_SPY_LIMIT = 5.0  # seconds


def record_flight() -> None:
    """Switches torch's flight recorder on, for process groups that are made afterwards; a user's own setting stays."""
    if "TORCH_NCCL_TRACE_BUFFER_SIZE" not in os.environ:
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", FLIGHT_ENTRIES)


def keep(directory: Path, rank: int) -> None:
    """Writes what this process knows. A disk that fails takes away evidence, not the end of the job."""
    for write in (_stacks, _flight, _native):
        _try(write, Path(directory), rank)


def keep_of(directory: Path, record: Heartbeat, host: str) -> None:
    """Of a rank on this host that can no longer write its own stacks: what py-spy reads in its memory."""
    if process_state(record, host) not in (None, "gone"):
        _try(lambda: _py_spy(Path(directory), record.rank, record.pid, "--nonblocking"))


def _try(write: Callable, *arguments: object) -> None:
    try:
        write(*arguments)
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        os.write(2, f"watchdog: evidence is missing: {error}\n".encode())


def _stacks(directory: Path, rank: int) -> None:
    with open(directory / f"rank_{rank}.stacks", "a", encoding="utf-8") as file:
        faulthandler.dump_traceback(file=file, all_threads=True)


def _flight(directory: Path, rank: int) -> None:
    content = flight()
    if content is not None:
        (directory / f"rank_{rank}.flight.json").write_bytes(content)


def _native(directory: Path, rank: int) -> None:
    _py_spy(directory, rank, os.getpid(), "--native")


def _py_spy(directory: Path, rank: int, pid: int, option: str) -> None:
    command = shutil.which("py-spy", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))
    if command is not None:
        words = [command, "dump", option, "--pid", str(pid)]
        with open(directory / f"rank_{rank}.pyspy", "wb") as file:
            subprocess.run(words, stdin=subprocess.DEVNULL, stdout=file, stderr=file, timeout=PY_SPY_LIMIT, check=False)


def flight() -> bytes | None:
    """The flight recorder's entries as JSON; None where it is off or this torch has none."""
    from torch._C import _distributed_c10d as c10d

    dump = getattr(c10d, "_dump_fr_trace_json", None) or getattr(c10d, "_dump_nccl_trace_json", None)
    content = dump() if dump is not None else b""
    return content if b'"entries":[{' in content else None


def in_flight(content: bytes, collectives: "Collectives") -> Waiting | None:
    """The oldest collective of a flight recording that this rank has begun and that has not ended; None where there is none, or where the oldest
    has not begun on its device (something before it does not end)."""
    for entry in sorted(json.loads(content)["entries"], key=lambda entry: entry["record_id"]):
        if entry.get("retired") or entry["state"] == "completed":
            continue
        backend, _, collective = entry["profiling_name"].partition(":")  # "nccl:all_reduce", "nccl:send 0->1", "nccl:recv 1<-0"
        if backend == "nccl" and entry["state"] != "started":
            return None
        collective, _, ends = collective.partition(" ")
        group = entry["process_group"][0]
        ranks, number = collectives.recorded(group, entry["collective_seq_id"])
        other = re.fullmatch(r"\d+(?:->|<-)(\d+)", ends)
        if entry["is_p2p"] and other and int(other[1]) < len(ranks):
            return Waiting(collective, group, collectives.name(ranks), ranks, 0, ranks[int(other[1])])
        return Waiting(collective, group, collectives.name(ranks), ranks, 0 if entry["is_p2p"] else number)
    return None


def place() -> str:
    """Where the main thread stands: its innermost three calls, the innermost first."""
    frame, calls = sys._current_frames().get(main_thread().ident), []
    while frame is not None and len(calls) < 3:
        calls.append(f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})")
        frame = frame.f_back
    return " < ".join(calls)[:300]


def born(pid: int) -> int:
    """Start of a process in clock ticks since boot; 0 where the system does not tell."""
    return int((_stat(pid) or ["0"] * 20)[19])


def process_state(record: Heartbeat, host: str) -> str | None:
    """The state letter of a rank's process, "gone" where it has ended; None where it cannot be known from here."""
    if record.host != host or not record.born:
        return None
    stat = _stat(record.pid)
    return stat[0] if stat is not None and int(stat[19]) == record.born else "gone"


def _stat(pid: int) -> list[str] | None:
    try:
        # The name of the command is in brackets and may hold anything.
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
