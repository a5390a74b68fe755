"""The one-machine Slurm of `slurm/lab` for tests: started once a session, skipped with the reason where it cannot be.

`MEGATRON_EXT_SLURM=required` (.ci/run): packages are installed where they are missing, and a Slurm that cannot be started fails the test.
`LAB=DIR`: the lab there is used, and started where it is not; whoever started it ends it. Else each session has one of its own.
"""
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from small import ROOT, environment, records

SCRIPTS = ROOT / "slurm" / "lab"
REQUIRED = os.environ.get("MEGATRON_EXT_SLURM") == "required"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")


def script(name: str, *words: str, folder: Path, timeout: float = 120, **settings: str) -> subprocess.CompletedProcess:
    """One of the lab's scripts, on the lab in `folder`."""
    return subprocess.run([SCRIPTS / f"{name}.sh", *words], env={**os.environ, "LAB": str(folder), **settings}, capture_output=True, text=True, check=False,
                          timeout=timeout)


class Lab:
    """A running lab. Every command has a time limit: a Slurm that hangs must not hang the tests."""

    def __init__(self, folder: Path):
        self.folder = folder
        found = {name: value for name, value in environment().items() if not name.startswith("SLURM_")}
        self.environment = found | {"SLURM_CONF": str(folder / "etc" / "slurm.conf"), "WANDB_MODE": "disabled"}

    def run(self, *words: object, timeout: float = 20, code: int | None = 0) -> str:
        """What a command prints; its exit code has to be `code` (None: any)."""
        done = subprocess.run([*map(str, words)], env=self.environment, capture_output=True, text=True, check=False, timeout=timeout, stdin=subprocess.DEVNULL)
        assert code is None or done.returncode == code, f"{words[:6]}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout

    def on_login_node(self, *words: object, timeout: float = 60) -> subprocess.CompletedProcess:
        """srun wants a host name that is 127.0.0.1."""
        return subprocess.run([SCRIPTS / "login.sh", *map(str, words)], env={**self.environment, "LAB": str(self.folder)}, capture_output=True, text=True,
                              check=False, timeout=timeout, stdin=subprocess.DEVNULL)

    def submit(self, *words: str) -> list["Job"]:
        """`python -m megatron_ext submit ...`: its jobs, in order."""
        said = self.run(sys.executable, "-m", "megatron_ext", "submit", "--json", *words, timeout=60)
        return [Job(self, each["id"], Path(each["script"]), Path(each["log"]), [Path(run) for run in each["runs"]]) for each in json.loads(said)["jobs"]]

    def show(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        return dict(word.split("=", 1) for word in self.run("scontrol", "--oneliner", "show", "job", number).split() if "=" in word)

    def crash(self, node: str) -> None:
        """SIGKILL to everything on the node."""
        done = script("stop", node, folder=self.folder)
        assert done.returncode == 0, done.stderr

    def kill_daemon(self, node: str) -> None:
        """SIGKILL to slurmd alone: to Slurm the node is gone, yet its tasks live."""
        os.kill(int((self.folder / "run" / f"slurmd.{node}.daemon").read_text().split()[0]), 9)

    def revive(self) -> None:
        """Brings crashed nodes back."""
        done = script("start", folder=self.folder)
        assert done.returncode == 0, done.stdout + done.stderr

    def processes(self, needle: str) -> list[int]:
        """Living processes with `needle` in their command line."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if needle.encode() in (entry / "cmdline").read_bytes() and int(entry.name) != os.getpid():
                    found.append(int(entry.name))
            except OSError:
                continue
        return found


class Job:
    """A job of the lab, or one of an array."""

    def __init__(self, lab: Lab, number: str, script: Path, log: Path, runs: list[Path]):
        self.lab, self.number, self.script, self.log, self.runs = lab, number, script, log, runs

    @property
    def run(self) -> Path:
        return self.runs[0]

    @property
    def state(self) -> str:
        return self.lab.show(self.number)["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.lab.show(self.number)["Restarts"])

    def said(self) -> str:
        """Its log."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def steps(self) -> int:
        """The last step in metrics.jsonl."""
        path = self.run / "metrics.jsonl"
        found = re.findall(r'"step": ?(\d+)', path.read_text()) if path.exists() else []
        return int(found[-1]) if found else 0

    def until(self, condition: Callable[[], object], seconds: float = 180, poll: float = 0.1) -> None:
        """Waits; fails with the end of the log when it takes longer, or the job ends before."""
        begin = asked = time.monotonic()
        while not condition():
            now = time.monotonic()
            if now - asked > 1:
                asked, state = now, self.state
                assert state not in ENDED or condition(), f"job {self.number} is {state}\n{self.said()[-4000:]}"
                assert now - begin < seconds, f"job {self.number} ({state}) took more than {seconds} s\n{self.said()[-4000:]}"
            time.sleep(poll)

    def ends(self, state: str = "COMPLETED", seconds: float = 240) -> None:
        """Waits until it is in this state."""
        self.until(lambda: self.state == state, seconds, poll=0.3)

    def lives(self) -> list[int]:
        """The step at which each life began to train."""
        return [event["step"] for event in records(self.run, "events") if event["kind"] in ("start", "resume")]


@pytest.fixture(scope="session")
def lab(tmp_path_factory) -> Iterator[Lab]:
    """Four virtual nodes, four fake GPUs each."""
    folder = Path(os.environ["LAB"]) if "LAB" in os.environ else tmp_path_factory.mktemp("slurm") / "lab"
    before = (folder / "run" / "slurmctld.daemon").exists()
    try:
        done = script("start", folder=folder, timeout=300, INSTALL="yes" if REQUIRED else "no")
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines() or ["start.sh said nothing"]
            reason = said[-1].removeprefix("slurm lab: ").removeprefix("cannot be started here: ")
            if REQUIRED:
                pytest.fail(f"MEGATRON_EXT_SLURM=required, and no Slurm could be started: {done.stdout}{done.stderr}")
            pytest.skip(f"no Slurm could be started: {reason}")
        yield Lab(folder)
    finally:
        if not before and folder.exists():
            script("stop", folder=folder)
