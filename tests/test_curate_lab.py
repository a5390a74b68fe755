"""Curation as arrays: the scripts, and on a real Slurm (slurm/lab) the same bytes as on one machine, a killed element included."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import curate_files as made
import forked
import pytest
from slurm_lab import Job, Lab
from small import environment

from megatron_ext.submit import curating

pytest.importorskip("datatrove")


def words(root: Path, output: str) -> list[str]:
    return [f"input={root / 'raw'}", f"output={root / output}", "curate=read", "curate.task_bytes=2000", "data.vocab_size=300", "data.workers=1"]


@pytest.fixture
def raw(tmp_path) -> Path:
    (tmp_path / "raw").mkdir()
    made.write_all(tmp_path / "raw")
    lines = [json.dumps({"text": f"{made.KOREAN} 문서 {number}"}, ensure_ascii=False) for number in range(100)]
    (tmp_path / "raw/many.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".input"}


def test_scripts(raw):
    jobs = curating.parts([*words(raw, "out"), "cluster=slurm_cpu", "cluster.array_limit=3"])
    array, last = jobs
    assert array.count > 10 and last.after == (array.name,) and last.count == 0
    text = curating.script(array)
    assert f"#SBATCH --array=0-{array.count - 1}%3" in text and "#SBATCH --nodes=1" in text and "#SBATCH --signal=B:USR1@60" in text
    assert f'megatron_ext.curate.executor {raw}/out-text.work {array.command[-3]} "$SLURM_ARRAY_TASK_ID" {array.count}' in text
    assert "megatron_ext prepare input=" in curating.script(last) and "--array" not in curating.script(last)
    for job in jobs:
        done = subprocess.run(["bash", "-n"], input=curating.script(job), text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr


def test_an_element_does_its_tasks_and_no_others(raw):
    array, _ = curating.parts([*words(raw, "out"), "cluster=slurm_cpu"])
    work = raw / "out-text.work"
    done = forked.run([*array.command[2:-2], "1", "4"], env=environment(), timeout=120, program=array.command[:2])
    assert done.returncode == 0, done.stderr
    finished = sorted(int(path.name) for path in (work / "phases" / array.command[-3] / "completions").iterdir())
    assert finished == list(range(1, array.count, 4))
    done = forked.run([str(work), "99_none", "0", "1"], env=environment(), timeout=120, program=array.command[:2])
    assert done.returncode == 2 and "is none of this build's" in done.stderr


def test_on_slurm_the_same_bytes(lab: Lab, raw):
    """An element is killed while it works: Slurm queues it again, it does what was not done, and the last job finds everything."""
    alone = forked.run(["prepare", *words(raw, "alone")], env=environment(), timeout=120)
    assert alone.returncode == 0, alone.stderr
    asked = ["prepare", *words(raw, "slurm"), "cluster=slurm_cpu", "cluster.cpus_per_task=1", "cluster.array_limit=2", "cluster.requeue_on_failure=true"]
    said = json.loads(lab.run(sys.executable, "-m", "megatron_ext", "submit", "--json", *asked, timeout=120))["jobs"]
    assert len(said) == 2 and said[1]["after"] == [said[0]["id"]]
    last = Job(lab, said[1]["id"], Path(said[1]["script"]), raw / "slurm-text.slurm" / f"slurm-{said[1]['id']}.log", [raw])
    last.until(lambda: kill_element(lab, raw / "slurm-text.work"), seconds=120)
    last.ends(seconds=300)
    assert "documents" in last.said(), last.said()
    logs = "".join(path.read_text(errors="replace") for path in (raw / "slurm-text.slurm").glob("slurm-*_*.log"))
    assert "exit code 137; requeued" in logs and "life 2" in logs, logs[-3000:]
    assert content(raw / "slurm-text") == content(raw / "alone-text")
    assert {name: value for name, value in content(raw / "slurm").items() if name != "prepared.json"} == \
           {name: value for name, value in content(raw / "alone").items() if name != "prepared.json"}


def kill_element(lab: Lab, work: Path) -> bool:
    """SIGKILL to one Python process of an array; whether there was one."""
    for pid in lab.processes(str(work)):
        try:
            if "python" in Path(os.readlink(f"/proc/{pid}/exe")).name:
                os.kill(pid, signal.SIGKILL)
                return True
        except OSError:
            continue
    return False
