"""The node check: each measurement against a known truth, two ranks for real, a rank that hangs, and the batch script's part. Its judgement:
test_node_verdict.py."""
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from spawn import spawn

from megatron_ext.contact import disk, gemm, gpus, node_check, session
from megatron_ext.contact.findings import Limits
from megatron_ext.contact.guard import Guard

ROOT = Path(__file__).resolve().parent.parent
# ---- measurements --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [64, 300])
def test_products_are_exact_in_bf16_and_one_wrong_number_shows(n):
    a, b = gemm.matrices(n, torch.device("cpu"), torch.bfloat16)
    exact = a.double() @ b.double()
    assert exact.abs().max() <= gemm.LARGEST and len(exact.unique()) > 8
    c = a @ b
    assert torch.equal(c.double(), exact) and gemm.wrong_sums(a, b, c) == 0
    c[n // 2, n // 3] += 1
    assert gemm.wrong_sums(a, b, c) == 2
    assert int((gemm.matrices(1024, torch.device("cpu"), torch.float32)[0] != 0).sum(1).max()) <= gemm.LARGEST


def test_gemm_speed_is_operations_over_time(monkeypatch):
    clock, calls = itertools.count(0.0, 0.5), []
    monkeypatch.setattr(gemm.time, "perf_counter", lambda: next(clock))
    found = gemm.measure(torch.device("cpu"), n=16, seconds=1.0, during=lambda: calls.append(1))
    assert found == {"tflops": 2 * 16**3 / 0.5 / 1e12, "wrong": 0, "n": 16, "dtype": "float32"} and calls == [1]


def test_disk(tmp_path, monkeypatch):
    found = disk.measure(tmp_path / "run", 3 << 20)
    assert found["damaged"] == 0 and found["write_mb_s"] > 0 and found["read_mb_s"] > 0 and 0 < found["free_gib"]
    assert list((tmp_path / "run").iterdir()) == []
    read, blocks = disk._read, itertools.count()
    monkeypatch.setattr(disk, "_read", lambda handle: bytes(256) + read(handle)[256:] if next(blocks) == 1 else read(handle))
    assert disk.measure(tmp_path, 3 << 20)["damaged"] == 1
    monkeypatch.setattr(disk, "_read", lambda handle: read(handle)[:-1])
    assert disk.measure(tmp_path, 3 << 20)["damaged"] == 3
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        disk.measure(tmp_path / "file", 1 << 20)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(handle, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk.os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        disk.measure(tmp_path, 1 << 20)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_not_shared(tmp_path):
    word = disk.leave_word(tmp_path / "here", "abc")
    assert disk.sees_word(tmp_path / "here", "abc", seconds=0) and not disk.sees_word(tmp_path / "elsewhere", "abc", seconds=0.1)
    word.write_text("other")
    assert not disk.sees_word(tmp_path / "here", "abc", seconds=0.1)


def test_nvml(monkeypatch):
    class NVMLError(Exception):
        pass

    def refuse(*_):
        raise NVMLError("Not Supported")

    def handle(index):
        if index == 1:
            raise NVMLError("GPU is lost")
        return f"gpu{index}"

    space = types.SimpleNamespace
    module = space(
        NVMLError=NVMLError, NVML_CLOCK_SM=1, NVML_CLOCK_MEM=2, NVML_TEMPERATURE_GPU=0, NVML_MEMORY_ERROR_TYPE_UNCORRECTED=1, NVML_VOLATILE_ECC=0,
        nvmlInit=lambda: None, nvmlShutdown=lambda: None, nvmlDeviceGetCount=lambda: 3, nvmlDeviceGetHandleByIndex=handle,
        nvmlDeviceGetUUID=lambda h: f"UUID-{h}".encode(), nvmlDeviceGetName=lambda h: "H100", nvmlDeviceGetMemoryInfo=lambda h: space(used=2**30, total=80 * 2**30),
        nvmlDeviceGetComputeRunningProcesses=lambda h: [space(pid=9), space(pid=4)], nvmlDeviceGetClockInfo=lambda h, kind: 1000 + kind,
        nvmlDeviceGetMaxClockInfo=lambda h, kind: 1980, nvmlDeviceGetTemperature=lambda h, kind: 41,
        nvmlDeviceGetCurrentClocksEventReasons=lambda h: 0x40 if h == "gpu2" else 0x4, nvmlDeviceGetTotalEccErrors=lambda h, kind, counter: 5 if h == "gpu2" else 0,
        nvmlDeviceGetRemappedRows=lambda h: (0, 1, int(h == "gpu2"), 0), nvmlDeviceGetRetiredPagesPendingStatus=refuse,
        nvmlDeviceGetCurrPcieLinkWidth=lambda h: 16, nvmlDeviceGetMaxPcieLinkWidth=lambda h: 16,
        nvmlDeviceGetNvLinkState=lambda h, link: 1 if link < 2 else refuse())
    monkeypatch.setitem(sys.modules, "pynvml", module)
    first, lost, third = gpus.read_gpus()
    assert first == {"index": 0, "uuid": "UUID-gpu0", "name": "H100", "memory": 80.0, "memory_used": 1.0, "processes": [4, 9], "clock": 1001, "clock_max": 1980,
                     "memory_clock": 1002, "temperature": 41, "throttle": ["power cap"], "ecc_uncorrected": 0, "rows_pending": False, "rows_failed": False,
                     "pcie_width": 16, "pcie_width_max": 16, "nvlinks": 2, "nvlinks_down": 0}
    assert lost == {"index": 1, "error": "GPU is lost"} and [len(gpus.faults(gpu)) for gpu in (first, lost, third)] == [0, 1, 3]
    module.nvmlInit = refuse
    assert gpus.read_gpus() == []
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert gpus.read_gpus() == []


def test_guard():
    late = []
    guard = Guard(late.append, every=0.01)
    with guard.expects("quick", 5.0):
        pass
    with guard.expects("slow", 0.02, peer=3, round=1):
        while not late:
            pass
    assert late[0].facts() == {"what": "slow", "peer": 3, "round": 1}
    guard.close()


# ---- the command ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "message"), [
    (["--gemm-share", "2"], "--gemm-share: 2.0 is not between 0 and 1"), (["--ranks", "0"], "--ranks: 0 is not above 0"), (["--gpus", "-1"], "--gpus"),
    (["--rank", "2"], "unrecognized arguments"), (["--dir", __file__], "is a file; name a directory"),
])
def test_bad_options(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        node_check.main(words)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_tasks_of_each_node(tmp_path, monkeypatch):
    (tmp_path / "scontrol").write_text('#!/bin/sh\n[ "$1 $2 $3" = "show hostnames n[1-4]" ] && printf "n1\\nn2\\nn3\\nn4\\n"\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    slurm = {"SLURM_STEP_NODELIST": "n[1-4]", "SLURM_STEP_TASKS_PER_NODE": "8(x3),4"}
    assert session.expected_tasks(slurm) == {"n1": 8, "n2": 8, "n3": 8, "n4": 4}
    assert session.expected_tasks({}) == session.expected_tasks({**slurm, "SLURM_STEP_NODELIST": "x"}) == {}
    assert session.node_name({"SLURMD_NODENAME": "n7"}) == "n7"


def test_a_rank_that_never_comes_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "scontrol").write_text('#!/bin/sh\nprintf "n0\\nn1\\n"\n')
    (tmp_path / "scontrol").chmod(0o755)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "SLURMD_NODENAME": "n0", "SLURM_STEP_NODELIST": "n[0-1]",
                        "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "PATH": f"{tmp_path}:{os.environ['PATH']}"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(session.Session, "leave", lambda self: None)  # nobody else has to hear
    options = node_check.options_of(["--dir", str(tmp_path / "run"), "--device", "cpu", "--seconds", "0.01", "--file", "1", "--timeout", "5", "--json"])
    assert node_check.rank(options) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["exclude"] == ["n1"] and found["network"] is None and (tmp_path / "run" / "node_check.bad").read_text() == "n1\n"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["node_check.bad", "node_check.json"]


def test_two_ranks_on_this_machine(tmp_path):
    (tmp_path / "node_check.bad").write_text("an-earlier-one\n")
    done = subprocess.run([str(ROOT / "slurm" / "node_check"), "--ranks", "2", "--dir", str(tmp_path), "--device", "cpu", "--seconds", "0.05", "--file", "2",
                           "--gemm-share", "0", "--pair-share", "0", "--json"], env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["good"] and found["exclude"] == [] and len(found["nodes"]) == 1 and len(found["ranks"]) == 2
    assert all(rank["gemm"]["tflops"] > 0 and rank["gemm"]["wrong"] == 0 for rank in found["ranks"])
    assert found["ranks"][0]["disk"]["shared"] and "disk" not in found["ranks"][1]
    for rank, other in ((0, 1), (1, 0)):
        (pair,) = found["network"][rank]["pairs"]
        assert pair["peer"] == other and pair["kind"] == "inside" and pair["wrong"] == 0 and pair["gb_s"] > 0
        assert found["network"][rank]["all_reduce_wrong"] == 0 and found["network"][rank]["all_reduce_gb_s"] > 0
    assert json.loads((tmp_path / "node_check.json").read_text()) == found
    assert [path.name for path in tmp_path.iterdir()] == ["node_check.json"]


# Two ranks that call themselves nodes; rank 1 stops in its first exchange, and stays.
STOPPED = '''
import os, sys, time
os.environ["SLURMD_NODENAME"] = "n" + os.environ["RANK"]
from megatron_ext.contact import network, node_check
if os.environ["RANK"] == "1":
    network._exchange = lambda *arguments: time.sleep(600)
    node_check._Check._late = lambda self, waiting: None
options = node_check.options_of(sys.argv[1:])
code = node_check.rank(options)
'''


def test_a_rank_that_hangs_is_named(tmp_path):
    script = tmp_path / "stopped.py"
    script.write_text(STOPPED)
    with pytest.raises(AssertionError):  # every rank ends with 1, the hanging one is killed
        spawn([str(script), "--dir", str(tmp_path / "run"), "--device", "cpu", "--seconds", "0.01", "--file", "1", "--limit", "3", "--gemm-share", "0"], 2, timeout=300)
    found = json.loads((tmp_path / "run" / "node_check.json").read_text())
    assert not found["good"] and found["exclude"] == ["n1"], found["problems"]
    assert (tmp_path / "run" / "node_check.bad").read_text() == "n1\n"


# ---- the batch script's part ---------------------------------------------------------------------------------------------------

SCONTROL = '''#!/bin/bash
echo "$*" >>"$LOG"
case "$1" in
show) echo "JobId=5 JobName=x ReqNodeList=(null) ExcNodeList=$(cat "$STATE") NodeList=n[1-3]" ;;
update) tries=$(($(cat "$TRIES") + 1)); echo "$tries" >"$TRIES"; [ "$tries" -gt "${BUSY:-0}" ] ;;
esac
'''


def batch(tmp_path: Path, command: str, *, before: str = "(null)", **environment: str) -> tuple[int, list[str], str]:
    """Exit code of a batch script that checks its nodes by `command`, the calls of scontrol, and what it said."""
    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)
    (tmp_path / "sleep").write_text("#!/bin/sh\n")
    (tmp_path / "sleep").chmod(0o755)
    for name, content in (("log", ""), ("tries", "0"), ("state", before)):
        (tmp_path / name).write_text(content)
    script = f'set -euo pipefail\nsource {ROOT}/megatron_ext/contact/hook.sh\ncheck_nodes "$RUN" 2 bash -c {command!r}\necho went on\n'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False, timeout=120, env={
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(tmp_path / "log"), "TRIES": str(tmp_path / "tries"), "STATE": str(tmp_path / "state"),
        "RUN": str(tmp_path), "SLURM_JOB_ID": "5", **environment})
    return done.returncode, (tmp_path / "log").read_text().splitlines(), done.stdout + done.stderr


BAD = 'echo n2,n3 >"$RUN/node_check.bad"; exit 1'


def test_good_nodes_go_on(tmp_path):
    code, calls, text = batch(tmp_path, "true")
    assert code == 0 and calls == [] and "went on" in text


def test_bad_nodes_are_excluded_after_the_requeue_beside_earlier_ones(tmp_path):
    code, calls, text = batch(tmp_path, BAD)
    assert code == 0 and "went on" not in text
    assert calls == ["requeue 5", "show job --oneliner 5", "update JobId=5 ExcNodeList=n2,n3"]
    assert not (tmp_path / "node_check.bad").exists()
    _, calls, _ = batch(tmp_path, BAD, before="n[7-9]", BUSY="2")
    assert calls[-1] == "update JobId=5 ExcNodeList=n[7-9],n2,n3" and sum(call.startswith("update") for call in calls) == 3
    _, calls, _ = batch(tmp_path, BAD, SLURM_ARRAY_JOB_ID="4", SLURM_ARRAY_TASK_ID="1")
    assert calls[0] == "requeue 4_1" and calls[-1] == "update JobId=4_1 ExcNodeList=n2,n3"


@pytest.mark.parametrize(("command", "environment", "words"), [
    ("exit 3", {}, "names no node to leave out"), (BAD, {"SLURM_RESTART_COUNT": "2"}, "n2,n3 fall short, and 2 lives are used up"),
])
def test_a_job_that_cannot_be_helped_ends(tmp_path, command, environment, words):
    code, calls, text = batch(tmp_path, command, **environment)
    assert code in (1, 3) and calls == [] and words in text and "went on" not in text


def test_names_from_a_file_are_never_run(tmp_path):
    (tmp_path / "hostile").write_text('n2;$(touch "$RUN/owned")\n')
    _, calls, text = batch(tmp_path, 'cp "$RUN/hostile" "$RUN/node_check.bad"; exit 1')
    assert "holds no list of nodes" in text and not [call for call in calls if call.startswith("update")] and not (tmp_path / "owned").exists()


def test_limits_are_the_options():
    assert {field.name for field in dataclasses.fields(Limits)} == {"gpus", "gemm_share", "gemm_floor", "pair_share", "pair_floor", "disk_floor", "free_gib"}
    options = node_check.options_of([])
    assert (options.gemm_share, options.pair_share) == (Limits.gemm_share, Limits.pair_share)
