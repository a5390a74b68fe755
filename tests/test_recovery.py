"""Steps that go wrong, on one rank in this process: what is repeated, who is blamed, what is left out, and that nothing else changes.

The truth is a clean run that is told to leave the same samples out (`recovery.skip`).
"""
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import losses, newest, records
from test_train_loop import EACH, FLAT, events, go, one_thread, watch  # noqa: F401 fixtures

from megatron_ext.checkpoint import read_record
from megatron_ext.checkpoint.compare import compare
from megatron_ext.checkpoint.manifest import verify
from megatron_ext.config.schema import RecoveryConfig
from megatron_ext.train.recovery import Recovery


def faulty(monkeypatch, faults: dict[int, str]) -> list[bool]:
    """Spoils calls of `Engine.step` (numbers from 1): "loss" makes it infinite, "gradient" puts one NaN into one weight's. Whether weights changed."""
    hooks, weights, changed = [], [], []

    def before(engine, step):
        weights[:] = [weight.detach().clone() for weight in engine.models[0].parameters()]
        kind = faults.get(len(changed) + 1)
        if kind == "loss":
            hooks.append(engine.models[0].register_forward_hook(lambda module, given, out: tuple(part * math.inf for part in out)))
        elif kind == "gradient":
            def spoil(gradient):
                gradient = gradient.clone()
                gradient.view(-1)[7] = math.nan
                return gradient

            # A norm's: those of the linear layers are added to the main gradients on the way, past such a hook.
            hooks.append(dict(engine.models[0].named_parameters())["decoder.layers.0.input_layernorm.weight"].register_hook(spoil))

    def after(engine, step, result):
        while hooks:
            hooks.pop().remove()
        changed.append(any(not torch.equal(old, new) for old, new in zip(weights, engine.models[0].parameters(), strict=True)))

    watch(monkeypatch, before, after)
    return changed


def blamed(run: Path) -> list[tuple]:
    return [(event["whom"], event["step"], tuple(event["samples"])) for event in events(run, "blame")]


@pytest.mark.both
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_step_that_is_not_finite_is_done_again_and_then_left_out(go, monkeypatch, dtype):  # noqa: F811
    words = (*FLAT, "train.steps=5", f"precision={dtype}", "checkpoint.save_at_end=true")
    clean = go(*words, "recovery.skip=[0:8,24:32]", run="clean")
    with monkeypatch.context() as patched:
        changed = faulty(patched, {1: "gradient", 2: "gradient", 5: "loss", 6: "loss", 7: "gradient"})
        run = go(*words)
    assert changed == [False, False, True, True, False, False, False, True, True, True]
    assert blamed(run) == [("data", 1, (0, 8)), ("data", 3, (24, 32)), ("hardware", 3, (32, 40))]
    assert losses(run) == losses(clean) and len(losses(run)) == 5
    assert compare(newest(run), newest(clean)) == []
    assert read_record(newest(run))["samples"] == read_record(newest(clean))["samples"] == 56
    assert [(event["step"], event["loss"]) for event in events(run, "bad_step")][1:2] == [(3, "inf")]
    without = go(*words, run="without")
    assert losses(without) != losses(clean)


def test_too_many_in_a_row_stop_the_run_and_the_last_good_checkpoint_is_named(go, monkeypatch):  # noqa: F811
    faulty(monkeypatch, dict.fromkeys(range(3, 20), "gradient"))
    error = go(*FLAT, "checkpoint.every=2", "train.steps=9", "train.max_bad_steps=2", code=1)
    (run,) = {Path(line.split("the last good checkpoint is ")[1].strip()).parents[1] for line in error.splitlines() if "last good" in line}
    assert newest(run).name == "step_00000002" and str(newest(run)) in error
    assert "error: stopped at step 2: 2 non-finite steps in a row, the last was step 3" in error
    verify(newest(run))
    (stop,) = events(run, "stop")
    assert (stop["criterion"], stop["step"], stop["checkpoint"]) == ("non_finite", 2, str(newest(run)))
    assert len(events(run, "bad_step")) == 2


SPIKES = (*FLAT, *EACH, "checkpoint.every=3", "train.steps=10", "checkpoint.save_at_end=true", "recovery.spike_factor=3", "recovery.window=4")


def spiking(monkeypatch, spikes) -> None:
    """The loss that the loop is told is ten times too high where `spikes(call number, first token of the batch)`."""
    calls = []
    from megatron_ext.train import pretrain

    class Spiking(pretrain.Engine):
        def step(self, batches, **options):
            result = super().step(batches, **options)
            calls.append(tuple(batches[0].tokens.flatten()[:8].tolist()))
            return replace(result, loss=10 * result.loss) if spikes(len(calls), calls) else result

    monkeypatch.setattr(pretrain, "Engine", Spiking)


def test_a_spike_that_does_not_come_again_points_to_hardware(go, monkeypatch):  # noqa: F811
    clean = go(*SPIKES, run="clean")
    with monkeypatch.context() as patched:
        spiking(patched, lambda number, calls: number == 8)
        run = go(*SPIKES)
    assert blamed(run) == [("hardware", 8, (56, 64))]
    assert [(event["from_step"], event["step"]) for event in events(run, "rewind")] == [(8, 6)]
    assert losses(run) == losses(clean) and compare(newest(run), newest(clean)) == []


def test_a_spike_that_comes_again_is_the_datas_and_its_samples_are_left_out(go, monkeypatch):  # noqa: F811
    clean = go(*SPIKES, "recovery.skip=[56:64]", run="clean")
    with monkeypatch.context() as patched:
        spiking(patched, lambda number, calls: len(calls) >= 8 and calls[-1] == calls[7])
        run = go(*SPIKES)
    assert blamed(run) == [("data", 8, (56, 64))]
    assert [(event["from_step"], event["step"]) for event in events(run, "rewind")] == [(8, 6), (8, 6)]
    assert losses(run) == losses(clean) and compare(newest(run), newest(clean)) == []
    assert read_record(newest(run))["recovery"]["skip"] == [[56, 64]]
    assert '"kind": "rewind"' in (run / "goodput.jsonl").read_text()
    # A later life knows it still.
    go(*SPIKES, "train.steps=11", "checkpoint.load=auto")
    assert read_record(newest(run))["recovery"] == {"skip": [[56, 64]], "rewinds": 2, "losses": [losses(run)[step] for step in range(8, 12)]}


def test_a_run_goes_back_only_so_often(go, monkeypatch):  # noqa: F811
    spiking(monkeypatch, lambda number, calls: number >= 8)
    error = go(*SPIKES, "recovery.max_rewinds=2", code=1)
    assert "the loss jumped to" in error and "gone back 2 times (recovery.max_rewinds)" in error and "last good checkpoint is" in error


def test_what_is_left_out():
    recovery = Recovery(RecoveryConfig(skip=("8:16", "16:20", "40:48")))
    assert [recovery.past(at, 8) for at in (0, 8, 16, 20, 32, 33, 36, 48)] == [0, 20, 20, 20, 32, 48, 48, 48]
    assert Recovery(RecoveryConfig(skip=("4:8",))).past(0, 8) == 8


def test_what_jumps():
    recovery = Recovery(RecoveryConfig(spike_factor=2.0, window=3))
    for loss in (4.0, 1.0):
        recovery.keep(loss)
    assert not recovery.spikes(100.0)  # too little is known
    recovery.keep(2.0)
    assert not recovery.spikes(4.0) and recovery.spikes(4.001) and recovery.spikes(math.inf)  # the median is 2
    recovery.keep(math.nan)
    assert recovery.state_dict()["losses"] == [4.0, 1.0, 2.0]
    assert not Recovery(RecoveryConfig()).spikes(math.inf)


@pytest.mark.parametrize("text", ["8", "8:", "16:8", "8:8", "a:b", "-1:4", "1:2:3"])
def test_ranges_that_make_no_sense_are_refused(go, text):  # noqa: F811
    assert f"recovery.skip={text}: must be FIRST:LAST" in go(f"recovery.skip=['{text}']", code=2)


def test_full_metrics_are_there_after_going_back(go, monkeypatch):  # noqa: F811
    spiking(monkeypatch, lambda number, calls: number == 8)
    run = go(*SPIKES)
    assert [record["step"] for record in records(run)] == list(range(1, 11))
