"""The acceptance test: all good on two ranks over gloo; a rank that adds wrong, one that fails and one that hangs are said in plain words."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from spawn import spawn

from megatron_ext.contact import acceptance
from megatron_ext.contact.course import Check, line_of

ROOT = Path(__file__).resolve().parent.parent
CHECK = Check("collectives", lambda: "", "look at the network")
GOOD = {"good": True, "said": "all exact", "hung": False}


def bad(said: str) -> dict:
    return {"good": False, "said": said, "hung": False}


HUNG = {"good": False, "said": "hung for 9 s", "hung": True}


@pytest.mark.parametrize(("answers", "good", "what"), [
    ([GOOD, GOOD], True, "all exact"),
    ([GOOD, bad("a sum is wrong")], False, "rank 1: a sum is wrong"),
    ([bad("x"), GOOD, bad("y")], False, "rank 0: x (and 1 more)"),
    ([bad("no file"), bad("no file")], False, "no file"),
    ([HUNG, bad("CUDA error"), HUNG], False, "rank 1: CUDA error"),  # the others wait for it
    ([HUNG, None, HUNG], False, "hung: rank(s) 1 gave no answer"),
    ([HUNG, HUNG], False, "hung for 9 s on rank(s) 0, 1"),
    ([GOOD, *[None] * 20], False, "hung: rank(s) 1, 2, 3, 4, 5, 6, 7, 8 and 12 more gave no answer"),
])
def test_one_line_from_what_the_ranks_say(answers, good, what):
    line = line_of(CHECK, answers, 1.0)
    assert (line.good, line.what) == (good, what)
    assert line.text() == (f"good  collectives  {what}" if good else f"BAD   collectives  {what}; what to do: look at the network")


@pytest.mark.parametrize(("words", "message"), [
    (["--ranks", "-2"], "--ranks: -2 is not above 0"), (["--checks", "everything"], "invalid choice"), (["--dir", __file__], "is a file"),
])
def test_bad_options(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        acceptance.main(words)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_a_launcher_with_other_ranks_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert acceptance.main(["--ranks", "2"]) == 2 and "the launcher started 4" in capsys.readouterr().err


def test_two_ranks_on_this_machine(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "slurm" / "acceptance.py"), "--ranks", "2", "--device", "cpu", "--dir", str(tmp_path), "--json"],
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["good"] and found["ranks"] == 2 and found["not_run"] == []
    said = {check["name"]: check["what"] for check in found["checks"]}
    assert tuple(said) == acceptance.NAMES and all(check["good"] for check in found["checks"])
    assert said["devices"] == "2 rank(s) on 1 node(s), CPU, gloo" and "GB/s" in said["bandwidth"]
    assert all(layout in said["parity"] for layout in ("TP2", "PP2", "DP2")) and "resumed to the bit" in said["checkpoint"] and "(TP2)" in said["checkpoint"]
    assert list(tmp_path.iterdir()) == []  # what was written for the test is gone


# What one rank does wrong, by its name; the others are as they are.
BROKEN = '''
import os, sys, time
import torch
import torch.distributed as dist
how, *words = sys.argv[1:]

def spoil(engine):
    with torch.no_grad():  # one weight of this rank's part is off, in the model and in the optimizer
        next(p for name, p in engine.models[0].named_parameters() if "linear_fc1.weight" in name).view(-1)[7].add_(0.5)
        engine.optimizer.reload_model_params()
    return engine

if os.environ["RANK"] == "1":
    from megatron_ext.contact.acceptance_checks import Checks
    make = Checks._engine
    if how == "adds":
        reduce = dist.all_reduce
        dist.all_reduce = lambda tensor, *a, **k: (reduce(tensor, *a, **k), tensor.view(-1)[:1].add_(1))
    elif how == "hangs":
        dist.all_to_all_single = lambda *a, **k: time.sleep(600)
    elif how == "computes":
        def engine(self, *a, **k):
            made = spoil(make(self, *a, **k))
            load = made.load_state
            made.load_state = lambda state: (load(state), spoil(made))
            return made
        Checks._engine = engine
os.environ["SLURMD_NODENAME"] = "n" + os.environ["RANK"]
from megatron_ext.contact import acceptance
sys.exit(acceptance.rank(acceptance.options_of(words)))
'''


def broken(tmp_path: Path, how: str, *words: str) -> list[str]:
    """The lines of an acceptance test over two ranks, one of which is broken."""
    script, out = tmp_path / "broken.py", tmp_path / "out.txt"
    script.write_text(BROKEN.replace("sys.exit(", f"sys.stdout = open({str(out)!r} + os.environ['RANK'], 'w')\nsys.exit("))
    with pytest.raises(AssertionError, match="ended with 1"):
        spawn([str(script), how, "--device", "cpu", "--dir", str(tmp_path / "run"), *words], 2, timeout=250)
    return Path(f"{out}0").read_text().splitlines()


@pytest.mark.parametrize(("how", "limit", "line"), [
    ("adds", "90", "BAD   collectives  rank 1: all-reduce is wrong in 1 of 4096 numbers over all ranks; what to do:"),
    ("hangs", "6", "BAD   collectives  hung for 6 s on rank(s) 0, 1; what to do:"),
], ids=["adds", "hangs"])
def test_what_is_broken_is_said(tmp_path, how, limit, line):
    said = broken(tmp_path, how, "--checks", "collectives", "bandwidth", "--limit", limit)
    assert said[0] == "good  devices      2 rank(s) on 2 node(s), CPU, gloo" and said[1].startswith(line), said
    assert said[2:] == ["      not run: bandwidth", "acceptance: bad: collectives"]


def test_a_rank_that_computes_wrong_is_found_by_each_check_of_the_model(tmp_path):
    _, kernels, parity, checkpoint, end = broken(tmp_path, "computes", "--checks", "kernels", "parity", "checkpoint")
    assert kernels.startswith("BAD   kernels      rank 1: its losses differ from those of 1 other ranks, which computed the same")
    assert parity.startswith("BAD   parity       PP2 has losses ") and "DP2 has losses" in parity and "run slurm/node_check" in parity
    assert "TP2" not in parity  # the two ranks are two nodes
    assert checkpoint.startswith("BAD   checkpoint   ") and "losses after the resume are" in checkpoint and "do all nodes see --dir" in checkpoint
    assert end == "acceptance: bad: kernels, parity, checkpoint"


def test_the_batch_script(tmp_path):
    """With a srun that only tells what it was asked for."""
    for name, body in (("srun", 'echo "$*" >>"$LOG"; case "$*" in *acceptance.py*) exit ${FAIL:-0};; esac'), ("scontrol", "printf 'n1\\nn2\\n'")):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    for fail in ("0", "1"):
        log = tmp_path / f"log{fail}"
        done = subprocess.run(["bash", str(ROOT / "slurm" / "acceptance.sbatch")], capture_output=True, text=True, check=False, timeout=30, env={
            "PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(log), "FAIL": fail, "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_GPUS_ON_NODE": "8", "PYTHON": "python", "SRUN_ARGS": "--container-image=x.sqsh", "ACCEPTANCE_DIR": "/shared/a b", "ACCEPTANCE_ARGS": "--limit 60"})
        assert done.returncode == int(fail), done.stderr
        check, accept = log.read_text().splitlines()
        assert check == "--kill-on-bad-exit=0 --container-image=x.sqsh python -m megatron_ext.contact.node_check --dir /shared/a b --gpus 8"
        assert accept == "--kill-on-bad-exit=0 --container-image=x.sqsh python slurm/acceptance.py --dir /shared/a b --gpus 8 --limit 60"
