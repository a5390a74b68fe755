"""A command while it runs: the peak memory of its processes, the seconds of each phase of a build, and what datatrove's statistics say of each step."""
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def _family(pid: int) -> list[int]:
    """A process and all below it."""
    try:
        below = [int(word) for task in Path(f"/proc/{pid}/task").iterdir() for word in (task / "children").read_text().split()]
    except (OSError, ValueError):
        return []
    return [pid, *(one for child in below for one in _family(child))]


def _field(pid: int, name: str) -> int:
    try:
        return next((int(line.split()[1]) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(name)), 0)
    except OSError:
        return 0


class Measured:
    """Runs `python -m megatron_ext WORDS`, or a program of one line with these words.

    Attributes:
        peaks: MiB that each process held at most: "main", and "worker", the largest of the others. together: of all at one moment.
        phases: name -> [first, last] second at which a task of it was seen to be under way or done.
        steps: phase -> step -> seconds in it, over all tasks.
        processor: seconds that all processes used.
    """

    def __init__(self, words: list[str], work: Path, out: Path, program: str | None = None):
        self.peaks: dict[str, float] = {"main": 0, "worker": 0}
        self.together, self.processor, self.work = 0.0, 0.0, work
        self.phases: dict[str, list[float]] = {}
        self.steps: dict[str, dict[str, float]] = {}
        self.begin = time.perf_counter()
        self._out = out.open("w+")
        self.process = subprocess.Popen([sys.executable, *(["-m", "megatron_ext"] if program is None else ["-c", program]), *words], cwd=ROOT, stdout=self._out, stderr=subprocess.STDOUT,
                                        env={**os.environ, "PYTHONPATH": str(ROOT)})
        self._stop = threading.Event()
        self._seen: set[Path] = set()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            family = _family(self.process.pid)
            for pid in family:
                kind = "main" if pid == self.process.pid else "worker"
                self.peaks[kind] = max(self.peaks[kind], _field(pid, "VmHWM") / 1024)
            self.together = max(self.together, sum(_field(pid, "VmRSS") for pid in family) / 1024)
            self._look()

    def _look(self) -> None:
        now = time.perf_counter() - self.begin
        for folder in sorted((self.work / "phases").glob("*")):
            for path in (folder / "stats").glob("[0-9]*.json"):
                if path not in self._seen:
                    try:
                        self._add(folder.name, json.loads(path.read_text()))
                    except (OSError, ValueError):
                        continue
                    self._seen.add(path)
                    self.phases.setdefault(folder.name, [now, now])[1] = now

    def _add(self, phase: str, stats: list[dict]) -> None:
        before = 0.0  # seconds of the step in front: those of duplicates read through it
        for one in stats:
            time_stats = one.get("time_stats") or {}
            total = time_stats.get("total", 0.0)
            name = one["name"].split(": ", 1)[-1].strip()
            own = total - before if "duplicates" in one["name"] and total > before else total
            rows = self.steps.setdefault(phase, {})
            rows[name] = rows.get(name, 0.0) + own
            before = total

    def done(self, phase: str) -> int:
        """Tasks of a phase (a part of its name) that are done."""
        return len(list(self.work.glob(f"phases/*{phase}*/completions/*")))

    def end(self) -> tuple[int, float, str]:
        """Exit code, seconds and what it printed."""
        _, status, usage = os.wait4(self.process.pid, 0)
        self.process.returncode = code = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - self.begin
        self._stop.set()
        self._thread.join()
        self.processor = usage.ru_utime + usage.ru_stime
        self._out.seek(0)
        text = self._out.read()
        self._out.close()
        return code, seconds, text
