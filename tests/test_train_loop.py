"""The loop itself, on one rank in this process: what stops a run, what a loss means, what is refused, a full disk.

Every run goes through the command line's `main`, which returns the exit code that a shell would see.
"""
import json
import math
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import small
import torch
from small import losses, newest, records

from megatron_ext import platform
from megatron_ext.checkpoint.compare import compare
from megatron_ext.checkpoint.manifest import steps as checkpoints_in
from megatron_ext.checkpoint.manifest import verify
from megatron_ext.cli.main import main
from megatron_ext.config.compose import compose
from megatron_ext.config.geometry import steps_of
from megatron_ext.data.build import build_datasets
from megatron_ext.data.prepared import Prepared
from megatron_ext.parallel import signals
from megatron_ext.train import pretrain
from megatron_ext.train.schedule import lr_at
from megatron_ext.train.stop import StopCriteria

QUIET = ("launch.device=cpu", "log.wandb=disabled", "log.every=1000", "checkpoint.save_at_end=false", "train.steps=4")
FLAT = ("optim.schedule=constant", "optim.warmup_steps=0")
EACH = ("checkpoint.every=1", "checkpoint.keep=0", "checkpoint.background=false")
DROPOUT = ("model.hidden_dropout=0.1", "model.attention_dropout=0.1")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    platform.disconnect()


@pytest.fixture
def go(small_data, tmp_path, monkeypatch, capfd):
    """go(*words, run=..., code=0): one training; its run directory, or with another exit code what it printed as an error."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the launcher sets it: put back at the end

    def run(*words: str, run: Path | str = "run", code: int = 0):
        directory = tmp_path / run
        capfd.readouterr()
        found = main(small.command(directory, small_data, *QUIET, *words)[3:])
        error = capfd.readouterr().err
        assert found == code, error
        assert "Traceback" not in error
        return error if code else directory

    return run


def events(run: Path, kind: str) -> list[dict]:
    return [event for event in records(run, "events") if event["kind"] == kind]


def watch(monkeypatch, before=None, after=None) -> None:
    """Calls before(engine, step) and after(engine, step, result) around every step."""

    class Watched(pretrain.Engine):
        def step(self, batches, *, lr, step, **options):
            before and before(self, step)
            result = super().step(batches, lr=lr, step=step, **options)
            after and after(self, step, result)
            return result

    monkeypatch.setattr(pretrain, "Engine", Watched)


# ---- what stops a run ----------------------------------------------------------------------------------------------------------------


def test_weights_that_explode_end_the_command_without_a_traceback(small_data, tmp_path):
    done = small.train(tmp_path / "run", small_data, *QUIET, *FLAT, "optim.lr=1e30", "train.max_bad_steps=2", "train.steps=9", code=1)
    assert "2 non-finite steps in a row" in done.stderr and "no checkpoint was written" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def clock(monkeypatch):
    """A step takes ten seconds, all else nothing."""
    seconds = [0]

    def tick(engine, step, result):
        seconds[0] += 10

    monkeypatch.setitem(StopCriteria.__init__.__kwdefaults__, "clock", lambda: seconds[0])
    watch(monkeypatch, after=tick)


@pytest.mark.parametrize("words, criterion, step, reason", [
    ((), "steps", 4, "all 4 steps are done"),
    (("train.tokens=513",), "tokens", 3, "the budget of 513 tokens is spent (768)"),
    (("stop.wall_time=25",), "wall_time", 3, "the wall time of 25 s is spent (30 s)"),
    (("validation.every=2", "stop.target_loss=100"), "target_loss", 2, "reached the target of 100 at step 2"),
    (("validation.every=1", "stop.plateau_patience=2", "stop.plateau_delta=9"), "plateau", 3, "no improvement by more than 9 in 2 validations"),
])
def test_the_reason_of_a_stop_is_told(go, clock, words, criterion, step, reason):
    run = go("validation.samples=4", "checkpoint.save_at_end=true", *words)
    (stop,) = events(run, "stop")
    assert (stop["criterion"], stop["step"], len(records(run))) == (criterion, step, step)
    assert reason in stop["reason"] and stop["checkpoint"] == str(newest(run)) and newest(run).name == f"step_{step:08d}"


def test_the_counters_of_the_plateau_and_the_clock_survive_a_resume(go, clock):
    words = (*FLAT, "validation.every=1", "validation.samples=4", "stop.plateau_patience=4", "stop.plateau_delta=9",
             "checkpoint.save_at_end=true", "checkpoint.load=auto")
    go(*words, "train.steps=3")  # the best, and two that are no better
    run = go(*words, "train.steps=9")
    first, last = events(run, "stop")
    assert (last["criterion"], last["step"]) == ("plateau", 5) and "in 4 validations" in last["reason"] and "at step 1" in last["reason"]
    assert (first["elapsed"], last["elapsed"]) == (30, 50)
    go(*words, "train.steps=9", "stop.wall_time=45")
    assert events(run, "stop")[-1]["criterion"] == "wall_time" and len(records(run)) == 5


# ---- what is written ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [(), ("data.mask_eod_loss=true", "data.reset_positions=true", "model.tied_embeddings=true")],
                         ids=["plain", "masked"])
def test_the_loss_is_the_mean_over_the_tokens_that_count(go, small_data, monkeypatch, words):
    """By hand: the logits of one sequence at a time, log-softmax in fp64, and the same whatever the micro-batch."""
    config = compose([*small.command(Path("run"), small_data, *words)[4:]])
    samples = build_datasets(config.data, ("train",))["train"]
    expected = []

    def before(engine, step):
        found = []
        for number in range(step * 8, step * 8 + 8):
            tokens = samples[number].tokens.tolist()
            places = list(range(32))
            if words:
                begins = 0
                for place in range(32):
                    begins = place if place and tokens[place - 1] == samples.eod else begins
                    places[place] = place - begins
            with torch.no_grad():
                logits = engine.models[0](torch.tensor([tokens[:-1]]), torch.tensor([places]), rows_differ=bool(words))[0]
            chances = logits[:, : engine.vocab_size].double().log_softmax(-1)
            found += [-chances[i, tokens[i + 1]].item() for i in range(32) if not (words and tokens[i] == samples.eod)]
        expected.append(sum(found) / len(found))
        counted.append(len(found))

    counted = []
    watch(monkeypatch, before)
    found = list(losses(go(*words, "train.steps=3")).values())
    assert found == pytest.approx(expected, rel=1e-6)
    assert (min(counted) < 256) == bool(words)
    watch(monkeypatch)
    for micro in (1, 8):
        again = list(losses(go(*words, "train.steps=3", f"train.micro_batch_size={micro}", run=f"micro{micro}")).values())
        assert again == pytest.approx(found, rel=2e-6)


@pytest.mark.parametrize("words", [
    ("optim.schedule=cosine", "optim.lr=0.0123"), ("optim.schedule=wsd", "optim.decay_steps=2", "train.tokens=1000"), ("optim.schedule=linear", "optim.decay_steps=3"),
])
def test_learning_rates_and_losses_are_written_in_full(go, small_data, monkeypatch, words):
    given, seen = [], []

    def after(engine, step, result):
        given.append(result)
        seen.append({group["lr"] for group in engine.optimizer.param_groups})

    watch(monkeypatch, after=after)
    run = go(*words)
    config = compose([*small.command(run, small_data, *QUIET, *words)[4:]])
    rates = [lr_at(step, config.optim, steps_of(config)) for step in range(4)]
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["lr"] for record in found] == rates and seen == [{rate} for rate in rates] and len(set(rates)) >= 3
    assert [(record["loss"], record["grad_norm"]) for record in found] == [(result.loss, result.grad_norm) for result in given]
    assert [record["tokens"] for record in found] == [256, 512, 768, 1024]


def test_validation_does_not_disturb_training_and_dropout_is_a_function_of_the_seed(go):
    plain = losses(go(*DROPOUT, run="plain"))
    watched = go(*DROPOUT, "validation.every=1", "validation.samples=6", run="watched")
    assert losses(watched) == plain and len(events(watched, "validation")) == 4
    assert all(record["validation_loss"] > 0 and record["validation_bits_per_byte"] > 0 for record in records(watched))
    other = losses(go(*DROPOUT, "train.seed=5", run="other"))
    without = losses(go(run="without"))
    assert all(len({plain[step], other[step], without[step]}) == 3 for step in plain)


def test_fp16_halves_the_scale_where_it_overflows(go, monkeypatch):
    """megatron-core's scaler forgives the first overflow and halves at each one after it."""
    scales = []
    watch(monkeypatch, after=lambda engine, step, result: scales.append(engine.optimizer.get_loss_scale().item()))
    run = go("precision=fp16", "precision.initial_loss_scale=4294967296", "train.max_bad_steps=0", "train.steps=24", *FLAT, *EACH, "checkpoint.every=3")
    found = records(run)
    applied = [record["applied"] for record in found]
    first = applied.index(True)
    assert 6 <= first < 22 and all(record["grad_norm"] is None for record in found[:first])
    assert scales[: first + 1] == [2.0**32] + [2.0 ** (32 - i) for i in range(1, first)] + [2.0 ** (33 - first)]
    saved = checkpoints_in(run / "checkpoints")
    assert compare(saved[0], saved[first // 3 - 1], tensors_only=True) == []
    assert found[-1]["loss"] < found[0]["loss"] - 0.05
    assert found[0]["loss"] == pytest.approx(math.log(500), rel=0.05)


# ---- what is refused ------------------------------------------------------------------------------------------------------------------


def test_a_run_directory_is_not_used_twice_and_a_refused_resume_leaves_it_alone(go, tmp_path):
    run = go("checkpoint.save_at_end=true", "train.steps=1", *FLAT)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert "holds a run already; add checkpoint.load=auto" in go(code=2)
    assert "counted in other samples" in go("checkpoint.load=auto", "data.seed=5", *FLAT, code=2)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    shutil.copy(run / "tokenizer.json", tmp_path / "same.json")
    go("checkpoint.load=auto", f"data.tokenizer={run}/tokenizer.json", "train.steps=2", *FLAT)
    assert (run / "tokenizer.json").read_bytes() == (tmp_path / "same.json").read_bytes() and sorted(losses(run)) == [1, 2]


def test_a_file_in_the_way_of_the_run_directory(go, tmp_path):
    (tmp_path / "file").write_text("mine")
    for run in ("file", "file/run"):
        assert f"run.dir={tmp_path / run}: is a file, or lies below one; name a directory" in go(run=run, code=2)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("words, message", [
    (("model.vocab_size=128",), "model.vocab_size=128: is below the 500 words of the tokenizer"),
    (("data.path=null", "data.paths=[DATA]", "model.vocab_size=128"), "model.vocab_size=128: the tokenizer has 500 words"),
    (("data.sequence_length=10000000", "model.max_sequence_length=10000000"), "data.sequence_length=10000000: DATA (train) has"),
    (("data.sequence_length=TOKENS", "model.max_sequence_length=TOKENS", "validation.every=1"), "DATA (validation) has TOKENS tokens"),
])
def test_data_and_model_that_do_not_fit(go, small_data, tmp_path, words, message):
    tokens = Prepared.load(small_data).splits["validation"].tokens  # one more would make a sample

    def fill(word: str) -> str:
        return word.replace("DATA", str(small_data)).replace("TOKENS", str(tokens))

    assert fill(message) in go(*map(fill, words), code=2)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# ---- a full disk ----------------------------------------------------------------------------------------------------------------------


def test_a_full_disk_does_not_end_training_and_loses_nothing(go, tmp_path):
    size = sum(path.stat().st_size for path in newest(go("checkpoint.save_at_end=true", "train.steps=1", *FLAT, run="measure")).iterdir())
    disk = tmp_path / "run" / "checkpoints"
    disk.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size * 3 // 2}", "tmpfs", str(disk)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.decode().strip()}")
    words = ("checkpoint.every=2", "checkpoint.save_at_end=true", "checkpoint.load=auto", "train.steps=5", *FLAT)
    try:
        error = go(*words, code=2)
        run = tmp_path / "run"
        assert "the save of step 5 failed" in error and "No space left" in error
        assert f"the last good checkpoint is {disk}/step_00000002" in error
        assert sorted(losses(run)) == [1, 2, 3, 4, 5]
        assert [event["step"] for event in events(run, "save_failed")] == [4, 5]
        assert events(run, "stop")[0]["checkpoint"] == str(disk / "step_00000002")
        assert os.listdir(disk) == ["step_00000002"]
        verify(disk / "step_00000002")
        before = losses(run)
        subprocess.run(["mount", "-o", f"remount,size={size * 4}", str(disk)], check=True)
        go(*words)
        assert losses(run) == before and newest(run).name == "step_00000005"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_save_that_failed_is_tried_again_before_the_next_is_due(go, tmp_path, monkeypatch):
    """The disk is full at step 20, and is not any more at step 22: a tenth of the interval."""
    disk = tmp_path / "run" / "checkpoints"

    def before(engine, step):
        if step in (19, 21):  # a file in the way of the directory that a save makes: as good as a full disk, without one
            disk.chmod(0o700)
            blocked = disk / "blocked"
            blocked.touch() if step == 19 else blocked.unlink()

    from megatron_ext.checkpoint import staging

    send = staging.Writer.send

    def sent(writer, job):
        if job["do"] == "write" and (disk / "blocked").exists():
            job = job | {"directory": str(disk / "blocked" / "under")}
        return send(writer, job)

    monkeypatch.setattr(staging.Writer, "send", sent)
    watch(monkeypatch, before)
    run = go(*FLAT, "checkpoint.every=20", "train.steps=25", "checkpoint.background=false", "checkpoint.keep=0")
    assert [event["step"] for event in events(run, "save_failed")] == [20]
    assert [event["step"] for event in events(run, "save")] == [22]
    verify(newest(run))


# ---- told to stop ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint_and_the_next_life_goes_on(go, monkeypatch, number):
    words = (*FLAT, *DROPOUT, "train.steps=8", "checkpoint.save_at_end=true")
    whole = go(*words, run="whole")
    with monkeypatch.context() as patched:
        watch(patched, lambda engine, step: os.kill(os.getpid(), number) if step == 4 else None)
        patched.setattr(signals, "_heard", [])
        error = go(*words, code=75)
    assert "error" not in error
    run = whole.parent / "run"
    assert list(losses(run)) == [1, 2, 3, 4, 5] and newest(run).name == "step_00000005"
    assert events(run, "stop")[0]["criterion"] == "signal" and signal.Signals(number).name in events(run, "stop")[0]["reason"]
    go(*words, "checkpoint.load=auto")
    assert losses(run) == losses(whole) and compare(newest(run), newest(whole)) == []
