"""What fault_campaign.py found, as JSON and as docs/faults.md."""
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path

from fault_kinds import DECLARED, HANG

FINAL = {
    "same": "losses and last checkpoint of the undisturbed run, bit for bit", "near": "losses to 2e-6",
    "skipped": "those of a clean run with `recovery.skip`, bit for bit",
}

ABOUT = """
## What the runtime does

| fault | what happens |
|---|---|
| a rank dies | its parent (`parallel/job.py`; srun or torchrun on a cluster) ends the others and says which rank failed first; the next life goes on from the newest checkpoint |
| the whole job dies | nothing is told; what a save left unfinished is cleared by the next life |
| a rank hangs | the watchdog names it, keeps all stacks and ends the job with exit code 1 ([health.md](health.md)) |
| SIGTERM, SIGUSR1 | the step is finished, all is saved, exit code 75: unfinished, `checkpoint.load=auto` goes on |
| a disk that is full | training goes on, `save_failed` in events.jsonl, the checkpoints that are there stay valid; the save is tried again after a tenth of the interval |
| a damaged checkpoint | with `checkpoint.load=auto` the newest one whose hashes are right is taken. One that is damaged is renamed to `step_N.damaged`, never deleted, and named on the screen and in events.jsonl (`checkpoint_damaged`). One that is named explicitly, or is the only one, is refused with exit code 2 |
| a loss or gradient that is not finite | the step has changed nothing and is done once more. Finite this time: the hardware is blamed. Not finite again: the data is, and its samples are left out |
| a loss that jumps | back to the newest checkpoint, and on. The same jump again: the data; its samples are left out |
| another layout, other ranks | a checkpoint in the format `fully_reshardable` is read by any layout |

## Keys

| key | meaning |
|---|---|
| `recovery.skip` | samples FIRST:LAST, counted from 0 in the order of training, that are left out |
| `recovery.spike_factor` | a loss above this many times the median of the last `window` losses is a jump; null = off |
| `recovery.window` | how many losses that are |
| `recovery.max_rewinds` | how often a run goes back; beyond, it stops |
| `train.max_bad_steps` | steps in a row that are not finite, after which the run stops |
| `health.hang_timeout` | seconds without progress that are a hang; null = off |
| `health.straggler_factor`, `health.straggler_window` | a rank that computes this many times as long as its peers is named; steps between two such looks |
"""


def between(events: Sequence[dict], first: str, then: str, sample: int) -> float | None:
    """Seconds from one event about a sample to another."""
    times = {event["kind"]: datetime.datetime.fromisoformat(event["time"]) for event in events
             if event["kind"] in (first, then) and event["samples"][0] == sample}
    return round((times[then] - times[first]).total_seconds(), 3) if len(times) == 2 else None


def write(rows: Sequence[dict], *, command: str, seconds: float, output: Path, page: Path) -> None:
    """Both files."""
    import torch

    machine = {"python": platform.python_version(), "torch": torch.__version__, "megatron_core": importlib.metadata.version("megatron-core"),
               "cores": os.cpu_count(), "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"}
    found = {"command": command, "seconds": round(seconds, 1), "faults": len(rows), "as_declared": sum(not row["problems"] for row in rows),
             **machine, "rows": list(rows)}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    page.write_text(text(rows, command=command, seconds=seconds, machine=machine), encoding="utf-8")
    print(f"{found['as_declared']} of {found['faults']} faults as declared, {seconds / max(1, len(rows)):.1f} s a fault")


def text(rows: Sequence[dict], *, command: str, seconds: float, machine: dict) -> str:
    """docs/faults.md."""
    lines = []
    for kind, declared in DECLARED.items():
        mine = [row for row in rows if row["kind"] == kind]
        times = [row["seconds"] for row in mine if row["seconds"] is not None]
        codes = ", ".join(map(str, declared.codes))
        lines.append(f"| {declared.text} | {codes} | {FINAL[declared.final]} | {len(mine)} | {sum(not row['problems'] for row in mine)} "
                     f"| {f'{statistics.median(times):.1f}' if times else '-'} |")
    wrong = [row for row in rows if row["problems"]]
    verdict = f"All {len(rows)} faults came out as declared." if rows and not wrong else (
        f"**{len(wrong)} of {len(rows)} faults did not come out as declared:** "
        + "; ".join(f"{row['kind']} in {row['run']}: {' / '.join(row['problems'])[:300]}" for row in wrong))
    table = "\n".join(lines)
    return f"""<!-- Written by `{command}`; not by hand. -->
# Faults: {len(rows)} of them, against what is declared

    {command}

Short runs of a tiny model on one or two ranks, a random fault in each life (seeded), then the same command again. Exit code: of the life that was hit.
After each fault every checkpoint is hashed and the next life has to go on from the newest sound one; a job with a dead rank is to end
within 10 s, one that hangs within the limit of its watchdog ({HANG:.0f} s here) and what it takes to end it. A life that
began with a damaged checkpoint, or that is to go on elsewhere, is killed by the campaign once it is under way (-9). The disk that fills is one of
its own under checkpoints/: logs are elsewhere.

| fault | exit code | the run in the end | faults | as declared | seconds to recover (median) |
|---|---|---|---|---|---|
{table}

{verdict}

Seconds to recover: from the fault to the first new step, the end of the job and the start of the next one included; of a full disk to the next
checkpoint; of a NaN from the first look to the verdict. A lost node is tried on a real Slurm
too (tests/test_slurm.py). Python {machine['python']},
torch {machine['torch']}, megatron-core {machine['megatron_core']}, {machine['cores']} cores, {machine['date']}; {seconds / 60:.0f} minutes.
{ABOUT}"""
