"""megatron_ext/train/schedule.py against values worked out by hand."""
import dataclasses
import math
from itertools import pairwise

import pytest

from megatron_ext.config.schema import OptimConfig
from megatron_ext.train.schedule import lr_at


def optim(**changes):
    return dataclasses.replace(OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=4), **changes)


def rates(config, steps):
    return [lr_at(step, config, steps) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_warm_up_reaches_lr_at_its_last_step_and_never_is_zero(schedule):
    assert rates(optim(schedule=schedule), 100)[:4] == [0.25, 0.5, 0.75, 1.0]


def test_constant():
    assert rates(optim(schedule="constant", warmup_steps=0), 5) == [1.0] * 5


def test_linear():
    # Peak at step 3, end at step 13: every step takes a tenth of 1.0 - 0.1.
    got = rates(optim(schedule="linear"), 13)
    assert got[3:] == pytest.approx([1.0, 0.91, 0.82, 0.73, 0.64, 0.55, 0.46, 0.37, 0.28, 0.19])
    assert lr_at(13, optim(schedule="linear"), 13) == lr_at(99, optim(schedule="linear"), 13) == 0.1


def test_cosine():
    # Peak at step 3, end at step 15, middle at step 9; a third and two thirds of the way cos is +-1/2.
    config = optim(schedule="cosine")
    assert lr_at(3, config, 15) == pytest.approx(1.0)
    assert lr_at(7, config, 15) == pytest.approx(0.1 + 0.9 * 0.75)
    assert lr_at(9, config, 15) == pytest.approx(0.55)
    assert lr_at(11, config, 15) == pytest.approx(0.1 + 0.9 * 0.25)
    assert lr_at(15, config, 15) == pytest.approx(0.1)


def test_decay_steps_end_the_decay_early_and_do_not_move_when_the_run_is_extended():
    config = optim(schedule="linear", decay_steps=13)
    assert lr_at(8, config, 13) == lr_at(8, config, 10_000) == pytest.approx(0.55)
    assert lr_at(13, config, 10_000) == pytest.approx(0.1)


@pytest.mark.parametrize(("shape", "quarter", "last"), [("sqrt", 0.5, 1 - math.sqrt(15 / 16)), ("linear", 0.75, 1 / 16)])
def test_wsd(shape, quarter, last):
    config = optim(schedule="wsd", decay_steps=16, wsd_decay=shape)
    got = rates(config, 100)
    assert got[3:85] == [1.0] * 82  # stable until the decay begins at step 84
    assert got[88] == pytest.approx(0.1 + 0.9 * quarter)
    assert got[99] == pytest.approx(0.1 + 0.9 * last)
    assert lr_at(100, config, 100) == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(got[84:]))


def test_wsd_decays_over_the_last_fifth_by_default():
    got = rates(optim(schedule="wsd"), 100)
    assert got[80] == 1.0 and got[81] < 1.0


def test_no_update_is_wasted_on_a_rate_of_zero():
    for schedule in ("cosine", "linear", "wsd"):
        assert min(rates(optim(schedule=schedule, min_lr=0.0, warmup_steps=0), 20)) > 0


def test_warm_up_longer_than_the_run_and_runs_of_one_step():
    assert rates(optim(schedule="cosine", warmup_steps=10), 5) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    for schedule in ("cosine", "linear", "wsd", "constant"):
        assert lr_at(0, optim(schedule=schedule, warmup_steps=0), 1) == 1.0


def test_what_it_refuses():
    with pytest.raises(ValueError, match="step=-1"):
        lr_at(-1, optim(), 10)
    with pytest.raises(ValueError, match=r"optim\.schedule=exponential"):
        lr_at(0, optim(schedule="exponential"), 10)
    with pytest.raises(ValueError, match=r"optim\.wsd_decay=cubic"):
        lr_at(9, optim(schedule="wsd", wsd_decay="cubic"), 10)
