"""Who starts the ranks of a job: this command itself on one machine, torchrun, or srun. No torch: the parent must be small and quick.

A rank is this same command again, as a subprocess, told who it is by the environment that torchrun uses (RANK, WORLD_SIZE, ...).
`job.py` starts the ranks and ends them together.

Failure. A rank that fails writes what it has to say into the parent's folder (as torchelastic's error files do) and leaves at once,
without waiting for collectives that cannot finish. Ranks that srun or torchrun started have no such parent: `failures.py` is how they agree on
which of them failed first.

Death of the parent. Each rank asks Linux to be killed with its parent (PR_SET_PDEATHSIG), then looks whether the parent is still the
one that started it, so that no moment is left uncovered.
"""
import contextlib
import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_ext.config.schema import Config
from megatron_ext.errors import RunFailed, UserError
from megatron_ext.parallel import slurm
from megatron_ext.parallel.failures import Failures, is_lost_peer
from megatron_ext.parallel.job import FAILURES, PARENT, cores, start, threads
from megatron_ext.parallel.signals import STOPS, UNFINISHED, let_through, listen
from megatron_ext.redact import redact_text

RUN_DIR = "MEGATRON_EXT_RUN_DIR"  # of a rank that srun or torchrun started: where failures are told

# ---- in a process that may be a rank -------------------------------------------------------------------------------------------

def guarded(body: Callable[[], int | None], words: Sequence[str] = ()) -> int:
    """Runs `body()` as a whole process and returns its exit code: its own, 2 for a UserError (one line, no traceback), 130 when
    interrupted, 1 with the traceback for anything else. The first failure of a job is printed once, by the parent of its ranks or, where srun or
    torchrun started them, by the rank that failed first; the others leave with its code.

    Args:
        words: the command line; its `run.dir` is where ranks without a parent of ours tell one another that they have failed.
    """
    if words[:1] == ["train"] and launched_ranks(os.environ) is not None:  # what comes before the first step counts too
        listen()
    let_through()
    follow_parent()
    lost = False
    try:
        if launched_ranks(os.environ) is not None and PARENT not in os.environ:
            named = [word.partition("=")[2] for word in words if word.lstrip("+").startswith("run.dir=")]
            os.environ[RUN_DIR] = os.path.abspath(named[-1] if named else Config().run.dir)
            _adopt_slurm()
        return _ended(body() or 0)
    except UserError as error:
        code, text = 2, str(error)
    except RunFailed as error:
        code, text = 1, f"error: {error}"
    except KeyboardInterrupt:
        return leave(130)
    except BrokenPipeError:  # `check | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return leave(1)
    except Exception as error:  # noqa: BLE001 whatever it is, a rank has to tell its parent
        code, text, lost = 1, traceback.format_exc(), is_lost_peer(error)
        if "EADDRINUSE" in text and "SLURM_JOB_ID" in os.environ:
            where = f"port {os.environ.get('MASTER_PORT')} of {os.environ.get('MASTER_ADDR')}"
            code, text = UNFINISHED, f"{where} is in use by another program; the job's next life takes another"
    text = redact_text(text)
    shared = _shared()
    if shared is not None:
        return leave(shared.end(code, text, lost=lost))
    if not report_failure(code, text):
        print(f"error: {text}" if code == 2 else text.rstrip(), file=sys.stderr)
    return leave(code)


def _ended(code: int) -> int:
    """The exit code of a body that returned. torchrun takes every code but 0 for a crash: there the file alone says that the run is unfinished."""
    shared = _shared() if code == UNFINISHED else None
    if shared is None:
        return code
    for number in STOPS:  # another one, while Python shuts down, would end this process by itself
        signal.signal(number, signal.SIG_IGN)
    shared.unfinished()
    return 0 if "TORCHELASTIC_RUN_ID" in os.environ else code


def _shared() -> Failures | None:
    """Where this rank's failure is told, where it has no parent of ours."""
    if RUN_DIR not in os.environ or "RANK" not in os.environ or PARENT in os.environ:
        return None
    return Failures.of(Path(os.environ[RUN_DIR]), os.environ)


def follow_parent() -> None:
    """In a rank that we started: die with the parent. Elsewhere: nothing."""
    parent = os.environ.get(PARENT)
    if parent is None:
        return
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(parent):
        os._exit(1)


def report_failure(code: int, text: str) -> bool:
    """Sees to it that `text` is told where it is the first failure of the job: by the parent that started us, or here. False where this process is
    no rank of several: then the caller prints it."""
    text = redact_text(text)
    shared = _shared()
    if shared is not None:
        shared.end(code, text)
        return True
    folder = os.environ.get(FAILURES)
    if folder is None:
        return False
    content = json.dumps({"time": time.time(), "code": code, "text": text})
    name = Path(folder) / f"rank_{int(os.environ['RANK']):05d}.json"
    with contextlib.suppress(OSError):
        name.with_suffix(".part").write_text(content, encoding="utf-8")
        name.with_suffix(".part").rename(name)
        return True
    return False


def leave(code: int) -> int:
    """The exit code of a failed command. A rank leaves at once: Python's own exit may wait for threads of a broken collective."""
    if "RANK" in os.environ and code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


# ---- who starts the ranks ------------------------------------------------------------------------------------------------------

def with_ranks(config: Config, *, asked: bool, default: int | None = None) -> Config:
    """`config` with the number of ranks that this job really has.

    Args:
        asked: whether the user named `launch.ranks`.
        default: ranks where nobody did (generate and evaluate: as many as the layout needs); None keeps the configuration's.

    Raises:
        UserError: a launcher (torchrun, srun) started another number than was asked for.
    """
    launched = launched_ranks(os.environ)
    if launched is None:
        launched = config.launch.ranks if asked or default is None else default
    elif asked and config.launch.ranks != launched:
        raise UserError("launch.ranks", config.launch.ranks, f"but the launcher started {launched} ranks; leave launch.ranks out")
    return replace(config, launch=replace(config.launch, ranks=launched))


def in_ranks(config: Config, argv: Sequence[str], body: Callable[[], int | None], *, stdin: bool = False) -> int:
    """Runs `body()` in every rank of the job and returns the exit code.

    Launched already (by us, torchrun or srun): this process is a rank. Else `config.launch.ranks` of them are started here as
    `python -m megatron_ext *argv`; a single one is this process itself.

    Args:
        stdin: every rank reads our standard input, the whole of it (else ranks have none).

    Raises:
        UserError: more ranks than this machine can carry, a port in use.
    """
    if launched_ranks(os.environ) is not None:
        _adopt_slurm()
        if config.launch.master_port and "TORCHELASTIC_RUN_ID" not in os.environ and PARENT not in os.environ:
            os.environ["MASTER_PORT"] = str(config.launch.master_port)
        if config.launch.threads:
            os.environ["OMP_NUM_THREADS"] = str(config.launch.threads)
        if PARENT not in os.environ:
            os.environ[RUN_DIR] = os.path.abspath(config.run.dir)
            _shared().watch()
        return body() or 0
    check_machine(config)
    if config.launch.ranks == 1:
        os.environ["OMP_NUM_THREADS"] = threads(config)
        return body() or 0
    content = sys.stdin.buffer.read() if stdin else None
    return start([sys.executable, "-m", "megatron_ext", *argv], config, stdin=content)


def visible_gpus(environment: Mapping[str, str], devices: Path = Path("/dev")) -> int:
    """NVIDIA GPUs that a process with this environment would see, without asking CUDA."""
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return len([name for name in listed.split(",") if name.strip() not in ("", "-1")])
    return len(list(devices.glob("nvidia[0-9]*")))


def check_machine(config: Config) -> None:
    """Refuses what this machine cannot carry, before anything is started. Raises UserError."""
    launch, gpus = config.launch, visible_gpus(os.environ)
    if launch.device == "cuda" and gpus == 0:
        raise UserError("launch.device", "cuda", "no NVIDIA GPU is visible here; use launch.device=cpu or auto")
    if launch.device != "cpu" and gpus and launch.ranks > gpus:
        raise UserError("launch.ranks", launch.ranks, f"this machine has {gpus} visible GPU(s), one a rank; launch.device=cpu runs without")
    most = max(16, 4 * cores())
    if launch.ranks > most and not gpus:
        raise UserError("launch.ranks", launch.ranks, f"this machine has {cores()} cores; at most {most} ranks are started on it. "
                                                      "`check` works at any size; a cluster starts its ranks by srun or torchrun")


def launched_ranks(environment: Mapping[str, str]) -> int | None:
    """Ranks of the job that this process was launched into; None when it was not launched as a rank."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return int(environment["WORLD_SIZE"])
    return slurm.step_ranks(environment)


def _adopt_slurm() -> None:
    """In a task of srun: what torch reads, said by Slurm."""
    if "RANK" not in os.environ:
        slurm.adopt(os.environ)
