"""The reward of code that runs: the share of a record's tests that the response's code passes, in the sandbox.

The code is the last fenced block of Python in the response, else the whole response, after the record's `prefix` where it has one (such as the head
of the function that was to be completed). The record says how it is judged, by one of

    tests    Python (a text, or a list of texts), each run after the code, in its module; it passes if it raises nothing
    stdin, stdout   texts, or lists of texts of one length: the program reads the one and has to write the other (but for white space at the ends of
             lines and of the whole); each is a run, and rewards.timeout has to hold them all

0 for code that fails, loops, or takes more than it may. A sandbox that does not work is not the code's fault: the function fails, and the response
is judged like one of the others (runner.py). `sandbox.py` says what stands between the code and the machine, and what does not.
"""
from collections.abc import Iterable, Mapping

from rlhf.rewards import sandbox
from rlhf.rewards.registry import Unanswerable, reward
from rlhf.rewards.text import code_of

START = 2.0  # seconds of rewards.timeout that are left for starting interpreters


def _verify(settings: dict, timeout: float) -> None:
    if not 0 < settings["seconds"] <= timeout - START:
        raise ValueError(f"seconds={settings['seconds']:g} must be greater than 0, and at most {timeout - START:g}: {START:g} less than rewards.timeout, "
                         "which the start of interpreters has a part in")
    if settings["memory"] < 64:
        raise ValueError("memory is in MiB, and an interpreter needs 64")
    try:
        held = sandbox.available()
    except sandbox.SandboxFailed as error:
        raise ValueError(f"cannot be run here: {error}") from error
    if not settings["unconfined"] and not confined(held):
        raise ValueError(f"this kernel offers too little to confine code of a model ({', '.join(held) or 'none'} of {', '.join(sandbox.BARRIERS)}): it could "
                         "open connections, leave processes or write files. Run in a container that may go, and say unconfined=true")


def confined(barriers: Iterable[str]) -> bool:
    """Whether code can reach neither the network, nor other processes, nor files of this user for writing."""
    held = set(barriers)
    return bool(held & {"namespaces", "seccomp"} and held & {"mounts", "landlock"})


@reward("code", verify=_verify)
def code(prompt: str, response: str, *, reference: str | None, record: Mapping, tests: str = "tests", stdin: str = "stdin", stdout: str = "stdout",
         prefix: str = "prefix", seconds: float = 5.0, memory: int = 512, partial: bool = True, unconfined: bool = False) -> float:
    """
    Args:
        tests, stdin, stdout, prefix: fields of the record.
        seconds: for all tests of a response together, by the clock and of CPU time. memory: MiB.
        partial: the share of tests that pass; else 1 if all do, 0 otherwise.
        unconfined: run it even where the kernel cannot confine it.
    """
    program = _text(record.get(prefix, ""), prefix) + code_of(response)
    if record.get(tests) is not None:
        wanted = _texts(record[tests], tests)
        outcome = sandbox.run(program, tests=wanted, limits=_limits(seconds, memory))
        _hold(outcome, unconfined)
        passed = len(outcome.passed)
    elif record.get(stdout) is not None:
        wanted = _texts(record[stdout], stdout)
        given = _texts(record[stdin], stdin) if record.get(stdin) is not None else [""] * len(wanted)
        if len(given) != len(wanted):
            raise Unanswerable(f"the record's {stdin} and {stdout} differ in number")
        passed = _programs(program, given, wanted, seconds, memory, unconfined)
    else:
        raise Unanswerable(f"the record has neither {tests} nor {stdout}")
    return passed / len(wanted) if partial else float(passed == len(wanted))


def _programs(program: str, given: list[str], wanted: list[str], seconds: float, memory: int, unconfined: bool) -> int:
    passed, left = 0, seconds
    for read, written in zip(given, wanted, strict=True):
        if left <= 0:
            break
        outcome = sandbox.run(program, stdin=read, limits=_limits(left, memory))
        _hold(outcome, unconfined)
        passed += outcome.ok and _lines(outcome.stdout) == _lines(written)
        left -= outcome.seconds
    return passed


def _hold(outcome: sandbox.Outcome, unconfined: bool) -> None:
    if not unconfined and not confined(outcome.barriers):
        raise Unanswerable("the sandbox lost its barriers")


def _limits(seconds: float, memory: int) -> sandbox.Limits:
    return sandbox.Limits(seconds=seconds, memory=memory << 20)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().split("\n")]


def _texts(value: object, name: str) -> list[str]:
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not found or not all(isinstance(one, str) for one in found):
        raise Unanswerable(f"the record's {name} is no text and no list of texts")
    return found


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise Unanswerable(f"the record's {name} is no text")
    return value
