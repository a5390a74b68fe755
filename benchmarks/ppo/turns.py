"""How the sides of bench_ppo.py take turns: one process each, so that their environments stay apart, and one line for each turn.

The parent writes a line with a number n to the side's standard input; the side does n iterations and answers with one JSON line on its
standard output: {"seconds": [n numbers], "cpu": [n numbers], ...}; `cpu` is the processor time of the same iterations, which other processes on
the machine do not lengthen. Between turns it waits in `readline`, which costs nothing. No torch here: every
environment imports this.
"""
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path


def asked() -> Iterator[int]:
    """On a side: the sizes of its turns, until the parent closes the pipe."""
    for line in sys.stdin:
        yield int(line)


def answer(**found: object) -> None:
    """On a side: the answer to a turn. It goes to the descriptor that `own_stdout` kept."""
    os.write(_answers(), (json.dumps(found) + "\n").encode())


def _answers() -> int:
    return int(os.environ["BENCH_PPO_ANSWERS"])


def own_stdout() -> None:
    """On a side, first of all: what libraries print goes to standard error, answers alone to standard output."""
    os.environ["BENCH_PPO_ANSWERS"] = str(os.dup(1))
    os.dup2(2, 1)


class Clock:
    """Seconds of iterations, with the waiting between turns left out. `iteration()` is called when one has ended (and once before the first)."""

    def __init__(self, describe=dict):
        self._asked, self._describe, self._left = asked(), describe, 0
        self._seconds: list[float] | None = None
        self._cpu: list[float] = []
        self._began = self._cpu_began = 0.0

    def iteration(self) -> bool:
        """Notes the iteration that has just ended and, at the end of a turn, answers and waits for the next. False: there is none."""
        now, cpu = time.perf_counter(), time.process_time()
        if self._seconds is not None:
            self._seconds.append(now - self._began)
            self._cpu.append(cpu - self._cpu_began)
            self._left -= 1
            if not self._left:
                answer(seconds=self._seconds, cpu=self._cpu, **self._describe())
        if not self._left:
            wanted = next(self._asked, None)
            if wanted is None:
                return False
            self._left, self._seconds, self._cpu = wanted, [], []
        self._began, self._cpu_began = time.perf_counter(), time.process_time()
        return True


class Side:
    """The parent's end of one side."""

    def __init__(self, name: str, command: Sequence[str | Path], *, threads: int, environment: Mapping[str, str] | None = None):
        self.name = name
        given = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", **(environment or {})}
        self.process = subprocess.Popen([str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=given)

    def turn(self, iterations: int) -> dict:
        """RuntimeError where the side ended instead of answering; what it said stands on standard error."""
        try:
            self.process.stdin.write(f"{iterations}\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"{self.name}: ended with exit code {self.process.wait()} instead of answering; its messages are above")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
