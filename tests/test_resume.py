"""Stop, be killed, and go on, through the command line: the same run as if nothing had happened.

Each uninterrupted run keeps a checkpoint half way. Whatever goes on from there is compared with its second half: every loss exactly, and
every tensor of weights and optimizer bit for bit (checkpoint/compare.py), or across layouts to 2e-6.
"""
import contextlib
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from small import command, environment, losses, newest, records, train

from megatron_ext.checkpoint.compare import compare
from megatron_ext.checkpoint.manifest import leftovers, steps

HALF = ("checkpoint.every=4", "checkpoint.keep=0")
LAYOUTS = {
    "tp2": ("parallel.tp=2", "parallel.sp=true", "launch.ranks=2"), "pp2": ("parallel.pp=2", "launch.ranks=2"),
    "dp2": ("launch.ranks=2",), "one": (),
}
DROPOUT = ("model.hidden_dropout=0.1", "model.attention_dropout=0.1")


def half(run: Path) -> str:
    return f"checkpoint.load={run}/checkpoints/step_00000004"


def identical(run: Path, reference: Path) -> None:
    """From the step at which `run` begins: the same losses to the last bit, and the same state at the end."""
    mine, theirs = losses(run), losses(reference)
    assert mine and mine == {step: theirs[step] for step in mine} and max(mine) == max(theirs)
    assert compare(newest(run), newest(reference)) == []


@pytest.fixture(scope="module")
def one(small_data, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("one") / "run"
    train(run, small_data, *HALF)
    return run


@pytest.fixture(scope="module")
def tp2(small_data, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("tp2") / "run"
    train(run, small_data, *LAYOUTS["tp2"], *HALF)
    return run


def test_a_run_that_is_stopped_and_given_more_steps_is_the_long_run(one, small_data, tmp_path):
    """Also: `auto` begins where there is nothing, and the order of samples does not depend on the length of the run."""
    run, words = tmp_path / "run", ("optim.decay_steps=8", "checkpoint.load=auto")  # the schedule of `one`, said explicitly
    train(run, small_data, *words, "train.steps=5")
    assert max(losses(run)) == 5
    train(run, small_data, *words)
    identical(run, one)
    assert losses(run).keys() == losses(one).keys()
    events = records(run, "events")
    assert [(event["kind"], event["step"]) for event in events if event["kind"] in ("start", "resume", "stop")] == [
        ("start", 0), ("stop", 5), ("resume", 5), ("stop", 8)
    ]
    assert events[-1]["reason"] == "all 8 steps are done" and [event["samples"] for event in events if event["kind"] == "resume"] == [40]


def test_nothing_is_left_to_do(one, small_data, tmp_path):
    run = tmp_path / "run"
    train(run, small_data, f"checkpoint.load={one}")
    assert losses(run) == {} and records(run, "events")[-1]["criterion"] == "steps"


@pytest.mark.parametrize("name, layout, words", [
    ("dropout on two data ranks", "dp2", DROPOUT), ("bf16", "one", ("precision=bf16",)), ("tp2", "tp2", ()),
    ("FP8 with its history", "one", ("precision=fp8_delayed", "precision.fp8_history=3")),
])
def test_the_same_layout_goes_on_bit_for_bit(request, small_data, tmp_path, name, layout, words):
    if name == "tp2":
        reference = request.getfixturevalue("tp2")
    else:
        reference = tmp_path / "reference"
        train(reference, small_data, *LAYOUTS[layout], *words, *HALF)
    run = tmp_path / "run"
    train(run, small_data, *LAYOUTS[layout], *words, half(reference))
    assert min(losses(run)) == 5
    identical(run, reference)


@pytest.mark.parametrize("layout", ["pp2", "dp2", "one"])
def test_another_layout_goes_on_with_the_same_losses(tp2, small_data, tmp_path, layout):
    run = tmp_path / "run"
    train(run, small_data, *LAYOUTS[layout], half(tp2))
    mine, theirs = losses(run), losses(tp2)
    assert sorted(mine) == [5, 6, 7, 8]
    assert max(abs(mine[step] - theirs[step]) / theirs[step] for step in mine) <= 2e-6


# ---- SIGKILL -------------------------------------------------------------------------------------------------------------------


class Life:
    """A process of the command line, to be killed with all it started."""

    def __init__(self, run: Path, data: Path, *words: str):
        self.run = run
        self.process = subprocess.Popen(
            command(run, data, *words), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )

    def until(self, condition) -> None:
        """Returns with the life stopped (SIGSTOP) in such a moment. One that was over before it stopped, as a short save may be, is waited for anew."""
        deadline = time.monotonic() + 240
        while True:
            if condition():
                os.killpg(self.process.pid, signal.SIGSTOP)
                os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
                if condition():
                    return
                os.killpg(self.process.pid, signal.SIGCONT)
            assert self.process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.0005)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def test_three_kills_lose_no_more_than_the_steps_since_the_last_checkpoint(small_data, tmp_path):
    words = ("train.steps=60", "checkpoint.every=3", "checkpoint.keep=2", "checkpoint.load=auto")
    reference, run = tmp_path / "reference", tmp_path / "run"
    train(reference, small_data, *words, "checkpoint.every=0")
    checkpoints = run / "checkpoints"

    def saving(least: int):
        return lambda: len(losses_so_far(run)) >= least and checkpoints.is_dir() and leftovers(checkpoints)

    moments = (
        lambda: len(losses_so_far(run)) >= 8,  # while it steps
        saving(11),  # while a save is being written
        lambda: sum(event["kind"] == "resume" for event in records(run, "events", growing=True)) == 2,  # as it comes back
    )
    resumed, cut = [], 0
    for moment in moments:
        life = Life(run, small_data, *words)
        life.until(moment)
        life.kill()
        cut += bool(leftovers(checkpoints))
        good = [int(path.name[-8:]) for path in steps(checkpoints)]
        done = max(losses_so_far(run))
        assert done - good[-1] <= 3 + 1 + 3  # the steps since; one whose line was not written yet; those that ran while a save was written
        resumed.append(good[-1])
    train(run, small_data, *words)
    assert [event["step"] for event in records(run, "events") if event["kind"] == "resume"] == resumed
    assert cut >= 1, "no kill hit a save"
    assert not leftovers(checkpoints)
    identical(run, reference)
    assert losses(run) == losses(reference)


def losses_so_far(run: Path) -> list[int]:
    """Steps in metrics.jsonl; its last line may be torn."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [int(line.split('"step": ')[1].split(",")[0]) for line in lines]


# ---- refusals, weights alone ------------------------------------------------------------------------------------------------------


def test_other_data_is_refused_and_weights_alone_are_taken(one, small_data, tmp_path):
    run = tmp_path / "run"
    done = train(run, small_data, half(one), "data.seed=5", code=2)
    assert "its position is counted in other samples (data seed: 1234 / 5" in done.stderr and "Traceback" not in done.stderr
    assert "checkpoint.weights_only=true" in done.stderr
    train(run, small_data, f"checkpoint.load={one}", "data.seed=5", "checkpoint.weights_only=true")
    found, before = losses(run), losses(one)
    assert sorted(found) == list(range(1, 9))
    assert found[1] < before[1] - 0.1  # it begins with what was learned, and counts steps and samples anew
    start = records(run, "events")[0]
    assert (start["kind"], start["step"], start["samples"]) == ("start", 0, 0) and start["checkpoint"].endswith("step_00000008")


def test_fp8_starts_from_a_checkpoint_without_it_and_its_history_has_one_length(one, small_data, tmp_path):
    run = tmp_path / "run"
    train(run, small_data, half(one), "precision=fp8_delayed", "precision.fp8_history=3", "checkpoint.every=0")
    found, plain = losses(run), losses(one)
    assert sorted(found) == [5, 6, 7, 8]
    assert all(0 < abs(found[step] - plain[step]) / plain[step] < 2e-2 for step in found)
    done = train(tmp_path / "longer", small_data, f"checkpoint.load={run}", "precision=fp8_delayed", "precision.fp8_history=4", code=2)
    assert "Set precision.fp8_history" in done.stderr and "Traceback" not in done.stderr


def test_another_model_is_refused(one, small_data, tmp_path):
    done = train(tmp_path / "run", small_data, half(one), "model.activation=geglu", code=2)
    assert "activation" in done.stderr and "geglu" in done.stderr and "Traceback" not in done.stderr


def test_a_damaged_checkpoint_is_refused_before_training(one, small_data, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(one / "checkpoints", copy)
    shard = next((copy / "step_00000008").glob("shard_*.bin"))
    content = bytearray(shard.read_bytes())
    content[random.Random(1).randrange(len(content))] ^= 1
    shard.write_bytes(content)
    done = train(tmp_path / "run", small_data, f"checkpoint.load={copy}", code=2)
    assert "sha256" in done.stderr and "step_00000004" in done.stderr and "Traceback" not in done.stderr
