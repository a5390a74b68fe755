"""Runs a program that nobody has read, and says how it went. `rlhf/rewards/sandbox.py` starts it and explains the whole.

    sandbox.py  ->  this process (the supervisor)  ->  the program
                    sets up namespaces and mounts,     takes off its privileges, raises the other barriers, tells which hold,
                    watches the clock, ends it all     then runs the code, and the tests one by one

Standard input: the job, a JSON object with `code`, `main`, `tests`, `stdin`, `folder`, `readable`, `barriers`, `seconds`, `cpu_seconds`, `memory`,
`disk`, `files`, `threads`, `word`, `parent`, `status`, `results`. To the pipe `status` go JSON lines: {"barriers": [...]} of the program's process
before it runs anything, {"end": "ended" | "timeout" | "stopped", "exit": code or -signal, "cpu": seconds, "seconds": ...} of the supervisor. The
program's process writes `word i` to the pipe `results` for each test i that passed. The program can find that pipe and forge lines; it has no way to
the other.
"""
import contextlib
import json
import os
import signal
import sys
import time
import types

import barriers


def main() -> None:
    job = json.loads(_all_of(0))
    barriers.follow_parent()
    if os.getppid() != job["parent"]:
        os._exit(1)
    barriers.adopt_orphans()
    if job["main"]:
        given = os.memfd_create("stdin")
        os.write(given, job["stdin"].encode("utf-8", "surrogatepass"))
        os.lseek(given, 0, os.SEEK_SET)
    else:
        given = os.open(os.devnull, os.O_RDONLY)
    os.dup2(given, 0)
    os.close(given)
    wanted, held = job["barriers"], []
    if "namespaces" in wanted and barriers.namespaces():
        held.append("namespaces")
        if "mounts" in wanted and barriers.mounts(job["folder"], size=job["disk"]):
            held.append("mounts")
    barriers.follow_parent()  # some kernels forget it where privileges change
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, signal.SIGTERM})
    go, confined = os.pipe(), os.pipe()
    program = os.fork()
    if program == 0:
        with _no_way_back(job):
            os.close(go[1]), os.close(confined[0])
            _confine(job, held, go[0])
            os.close(confined[1])
            _run(job)
    os.close(go[0]), os.close(confined[1])
    os.write(go[1], b"g")
    os.close(job["results"])
    os.read(confined[0], 1)  # until the program's process has closed it, or has ended: what a busy machine takes to get there is not the code's time
    started = time.monotonic()
    end, state, used = _watch(program, started + job["seconds"])
    if "namespaces" not in held:
        _sweep(program)
    _tell(job, end=end, exit=os.waitstatus_to_exitcode(state), cpu=used.ru_utime + used.ru_stime, seconds=time.monotonic() - started)


# ---- the supervisor --------------------------------------------------------------------------------------------------------------

def _watch(program: int, deadline: float):
    """Waits for the end of the program, and brings it about at the deadline or when asked to (SIGTERM)."""
    end = "ended"
    while True:
        found, state, used = os.wait4(program, os.WNOHANG)
        if found:
            return end, state, used
        seen = signal.sigtimedwait({signal.SIGCHLD, signal.SIGTERM}, max(0.0, deadline - time.monotonic()))
        if seen is None or seen.si_signo == signal.SIGTERM:
            end = "timeout" if seen is None else "stopped"
            os.kill(program, signal.SIGKILL)  # the first process of its namespace takes all others with it
            return end, *os.wait4(program, 0)[1:]


def _sweep(program: int) -> None:
    """Without a namespace: ends what the program has left, its group and all that came to this process as orphans."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            os.killpg(program, signal.SIGKILL)
        with contextlib.suppress(OSError), open("/proc/thread-self/children") as file:
            for child in file.read().split():
                os.kill(int(child), signal.SIGKILL)
        try:
            os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return


def _tell(job: dict, **what) -> None:
    os.write(job["status"], (json.dumps(what) + "\n").encode())


def _all_of(file: int) -> bytes:
    parts = []
    while part := os.read(file, 1 << 20):
        parts.append(part)
    return b"".join(parts)


# ---- the program's process -------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def _no_way_back(job: dict):
    """Whatever happens, the forked process ends here. What breaks before the program's own code runs is no fault of the program's."""
    try:
        yield
    except BaseException as error:  # noqa: BLE001
        with contextlib.suppress(OSError):
            _tell(job, broken=f"{type(error).__name__}: {error}")
    finally:
        os._exit(70)


def _confine(job: dict, held: list[str], go: int) -> None:
    """Raises the barriers that are asked for, in this process alone; tells which hold; closes the way to tell more."""
    os.setsid()
    barriers.follow_parent()
    if os.read(go, 1) != b"g":
        os._exit(1)  # the supervisor died before it could take this process with it
    os.close(go)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD, signal.SIGTERM})
    barriers.resources(seconds=job["cpu_seconds"], memory=job["memory"], file=job["disk"], files=job["files"])
    barriers.no_privileges()
    held = list(held)
    if "landlock" in job["barriers"] and barriers.landlock(job["folder"], job["readable"]):
        held.append("landlock")
    if "seccomp" in job["barriers"] and barriers.system_calls():
        held.append("seccomp")
    if "namespaces" in held or "seccomp" not in held:  # where all of the user's count, the filter is the better limit: it lets threads be
        barriers.processes(job["threads"])
    _tell(job, barriers=held)
    os.close(job["status"])


def _run(job: dict) -> None:
    """The code in a module of its own, then each test in the same module. Never returns."""
    status = 0
    try:
        name, results, word = "__main__" if job["main"] else "solution", job["results"], job["word"]
        module = types.ModuleType(name)
        sys.modules[name], sys.argv[:], sys.path[:] = module, ["solution.py"], sys.path[1:]
        os.environ.clear()
        for own in ("barriers", "seccomp"):
            del sys.modules[own]
        exec(compile(job["code"], "<response>", "exec", dont_inherit=True), module.__dict__)  # noqa: S102 - what all this is for
        for number, test in enumerate(job["tests"]):
            try:
                exec(compile(test, f"<test {number}>", "exec", dont_inherit=True), module.__dict__)  # noqa: S102
            except BaseException:  # noqa: BLE001 - a test that ends the program has not passed
                status = 1
                sys.excepthook(*sys.exc_info())
            else:
                os.write(results, f"{word} {number}\n".encode())
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:  # noqa: BLE001
        status = 1
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(BaseException):
                stream.flush()
        os._exit(status & 0xFF)


if __name__ == "__main__":
    main()
