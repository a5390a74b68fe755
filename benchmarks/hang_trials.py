"""Does the watchdog name the right rank, and how soon does a job end? Stops (SIGSTOP) and kills (SIGKILL) random ranks at random moments.

    python benchmarks/hang_trials.py [--trials 20] [--kills 10] [--ranks 2] [--timeout 3] [--seed 1] [--output benchmarks/results/hang_trials.json]

Each trial is a job of its own: ranks of tests/watchdog_ranks.py (gloo, all_reduces and all_gathers without end), started and ended by
parallel/job.py as a user's are. What is right is read from Linux and not from the watchdog: /proc/PID/environ says which rank a stopped process is.
A stop counts as right where events.jsonl holds one hang with exactly that rank and pid, the diagnosis was printed once, the exit code is 1, the
living ranks kept their stacks, and no process is left. A kill counts where the job ended in under 10 s with another code than 0.

Seconds: from the signal to the end of the whole job. Of a stop they are the limit, the look that finds it, and the 5.5 s that job.py leaves ranks
between their first failure and SIGKILL. Prints the table as JSON; exit code 1 where a trial went wrong.
"""
import argparse
import datetime
import json
import os
import platform
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_ext.health import heartbeat

KILL_BAR = 10.0  # seconds
START = 120.0  # seconds that a job may take to start


def job(directory: str, ranks: int) -> int:
    """The parent of a job: what `python -m megatron_ext train launch.ranks=N` does."""
    from megatron_ext.config.schema import Config, LaunchConfig
    from megatron_ext.parallel.job import start

    return start([sys.executable, "-W", "ignore", str(ROOT / "tests" / "watchdog_ranks.py"), directory], Config(launch=LaunchConfig(ranks=ranks, threads=1)))


def rank_of(pid: int) -> int | None:
    """Which rank a process is, as Linux knows its environment; None for what is no rank."""
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((int(word[5:]) for word in words if word.startswith(b"RANK=")), None)


def children(pid: int) -> dict[int, int]:
    """Rank -> process id, of the ranks below `pid`."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError):
            continue
        if parent == pid and (rank := rank_of(int(path.name))) is not None:
            found[rank] = int(path.name)
    return found


def trial(sent: int, draw: random.Random, *, ranks: int, timeout: float) -> dict:
    """One job and its fault. Returns its row."""
    with tempfile.TemporaryDirectory(prefix="hang_trial_") as name:
        directory = Path(name)
        environment = {**os.environ, "HANG_TIMEOUT": str(timeout), "PYTHONPATH": str(ROOT)}
        with open(directory / "said", "wb") as said:
            parent = subprocess.Popen([sys.executable, __file__, "--job", name, "--ranks", str(ranks)], env=environment, stdin=subprocess.DEVNULL,
                                      stdout=said, stderr=said)
        try:
            deadline = time.monotonic() + START
            while not all((beat := heartbeat.read(directory / "health", rank)) and beat.step > 0 for rank in range(ranks)):
                if parent.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the job did not start: {(directory / 'said').read_text()[-2000:]}")
                time.sleep(0.05)
            time.sleep(draw.uniform(0, 1.5))
            pids = children(parent.pid)
            rank = draw.choice(sorted(pids))
            began = time.monotonic()
            os.kill(pids[rank], sent)
            code = parent.wait(timeout=4 * timeout + 60)
            seconds = time.monotonic() - began
            left = [pid for pid in pids.values() if rank_of(pid) is not None]
        finally:
            if parent.poll() is None:
                parent.terminate()
                parent.wait(timeout=60)
        row = {"signal": signal.Signals(sent).name, "rank": rank, "seconds": round(seconds, 2), "exit_code": code, "left": left}
        if sent == signal.SIGKILL:
            return row | {"right": code != 0 and seconds < KILL_BAR and not left}
        return row | _stopped(directory, rank, pids, code, left)


def _stopped(directory: Path, rank: int, pids: dict[int, int], code: int, left: list[int]) -> dict:
    path = directory / "events.jsonl"
    hangs = [event for line in (path.read_text().splitlines() if path.exists() else []) if (event := json.loads(line))["kind"] == "hang"]
    named = [[suspect["rank"] for suspect in hang["suspects"]] for hang in hangs]
    who = [[(suspect["host"], suspect["pid"]) for suspect in hang["suspects"]] for hang in hangs]
    stacks = [other for other in pids if other != rank and (directory / "health" / f"rank_{other}.stacks").exists()]
    right = named == [[rank]] and who == [[(socket.gethostname(), pids[rank])]] and (directory / "said").read_text().count("hang: ") == 1
    return {
        "named": named, "waiting_in": [f"{hang['collective']} of {hang['group']}" for hang in hangs], "stacks": stacks,
        "right": right and code == 1 and len(stacks) == len(pids) - 1 and not left,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20, help="SIGSTOPs")
    parser.add_argument("--kills", type=int, default=10, help="SIGKILLs")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=3.0, help="seconds of health.hang_timeout")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        return job(options.job, options.ranks)

    draw, rows = random.Random(options.seed), []
    for sent in [signal.SIGSTOP] * options.trials + [signal.SIGKILL] * options.kills:
        rows.append(trial(sent, draw, ranks=options.ranks, timeout=options.timeout))
        print(f"{len(rows)}: {rows[-1]}", file=sys.stderr, flush=True)
    table = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "python": platform.python_version(), "ranks": options.ranks, "hang_timeout": options.timeout, "seed": options.seed,
    }
    for name in ("SIGSTOP", "SIGKILL"):
        mine = [row for row in rows if row["signal"] == name]
        seconds = [row["seconds"] for row in mine]
        table[name] = {
            "trials": len(mine), "right": sum(row["right"] for row in mine),
            "seconds_median": statistics.median(seconds) if seconds else None, "seconds_max": max(seconds, default=None),
        }
    table["rows"] = rows
    text = json.dumps(table, indent=1)
    print(text)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text + "\n", encoding="utf-8")
    return 0 if all(row["right"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
