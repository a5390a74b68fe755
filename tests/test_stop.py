"""megatron_ext/train/stop.py: each criterion stops when it should, not a step sooner, says why, and survives a resume."""
import json
import math

from megatron_ext.config.schema import Config, StopConfig, TrainConfig
from megatron_ext.train.stop import StopCriteria


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def test_steps():
    criteria = StopCriteria(steps=3)
    assert criteria.after_step(steps_done=2, tokens_done=0) is None
    stop = criteria.after_step(steps_done=3, tokens_done=0)
    assert stop.kind == "steps" and "3 steps" in stop.reason and not stop.failed
    assert criteria.budget(steps_done=3, tokens_done=0).kind == "steps"


def test_tokens():
    criteria = StopCriteria(steps=100, tokens=1000)
    assert criteria.after_step(steps_done=1, tokens_done=999) is None
    stop = criteria.after_step(steps_done=2, tokens_done=1024)
    assert stop.kind == "tokens" and "1,000" in stop.reason and "1,024" in stop.reason


def test_wall_time_is_counted_over_all_lives():
    clock = Clock()
    first = StopCriteria(steps=100, stop=StopConfig(wall_time=60.0), clock=clock)
    clock.now += 40
    assert first.after_step(steps_done=1, tokens_done=0) is None
    state = json.loads(json.dumps(first.state_dict()))
    clock.now += 5000  # between the lives
    second = StopCriteria(steps=100, stop=StopConfig(wall_time=60.0), clock=clock)
    second.load_state_dict(state)
    clock.now += 19
    assert second.after_step(steps_done=2, tokens_done=0) is None
    clock.now += 1
    assert second.after_step(steps_done=3, tokens_done=0).kind == "wall_time"
    assert second.elapsed == 60.0


def test_non_finite_steps_in_a_row():
    criteria = StopCriteria(steps=100, max_bad_steps=3)
    for finite in (False, False, True, False, False):
        assert criteria.after_step(steps_done=1, tokens_done=0, finite=finite) is None
    stop = criteria.after_step(steps_done=6, tokens_done=0, finite=False)
    assert stop.kind == "non_finite" and stop.failed and "3 non-finite" in stop.reason and "step 6" in stop.reason
    assert all(StopCriteria(steps=100).after_step(steps_done=1, tokens_done=0, finite=False) is None for _ in range(50))


def test_non_finite_goes_before_the_end_of_the_budget():
    assert StopCriteria(steps=1, max_bad_steps=1).after_step(steps_done=1, tokens_done=0, finite=False).kind == "non_finite"


def test_target_loss():
    criteria = StopCriteria(steps=100, stop=StopConfig(target_loss=2.0))
    assert criteria.after_validation(steps_done=10, loss=2.001) is None
    assert criteria.after_validation(steps_done=15, loss=math.nan) is None
    stop = criteria.after_validation(steps_done=20, loss=2.0)
    assert stop.kind == "target_loss" and "step 20" in stop.reason


def test_plateau_with_delta():
    criteria = StopCriteria(steps=100, stop=StopConfig(plateau_patience=2, plateau_delta=0.1))
    assert criteria.after_validation(steps_done=1, loss=3.0) is None
    assert criteria.after_validation(steps_done=2, loss=2.95) is None  # better, but not by enough: 1
    assert criteria.after_validation(steps_done=3, loss=2.85) is None  # 0.15 below the best that counted
    assert criteria.after_validation(steps_done=4, loss=2.80) is None  # 1
    stop = criteria.after_validation(steps_done=5, loss=2.76)  # 2
    assert stop.kind == "plateau" and "2 validations" in stop.reason and "2.8500 at step 3" in stop.reason


def test_plateau_without_delta_needs_a_lower_loss():
    criteria = StopCriteria(steps=100, stop=StopConfig(plateau_patience=1))
    assert criteria.after_validation(steps_done=1, loss=3.0) is None
    assert criteria.after_validation(steps_done=2, loss=3.0).kind == "plateau"


def test_losses_that_are_not_finite_are_no_improvement():
    criteria = StopCriteria(steps=100, stop=StopConfig(plateau_patience=3))
    assert criteria.after_validation(steps_done=1, loss=math.nan) is None
    assert criteria.after_validation(steps_done=2, loss=math.inf) is None
    assert criteria.after_validation(steps_done=3, loss=4.0) is None
    assert criteria.best_loss == 4.0 and criteria.stale == 0


def test_plateau_survives_a_resume():
    losses, config = [3.0, 2.5, 2.6, 2.7, 2.55], StopConfig(plateau_patience=3)
    straight = StopCriteria(steps=100, stop=config)
    whole = [straight.after_validation(steps_done=i, loss=x) for i, x in enumerate(losses)]
    resumed = StopCriteria(steps=100, stop=config)
    pieces = []
    for i, x in enumerate(losses):
        state = json.loads(json.dumps(resumed.state_dict()))
        resumed = StopCriteria(steps=100, stop=config)
        resumed.load_state_dict(state)
        pieces.append(resumed.after_validation(steps_done=i, loss=x))
    assert pieces == whole and whole[-1].kind == "plateau" and whole[:-1] == [None] * 4


def test_from_config():
    config = Config(train=TrainConfig(steps=7, tokens=50, max_bad_steps=2), stop=StopConfig(target_loss=1.0))
    criteria = StopCriteria.from_config(config, steps=5)
    assert (criteria.steps, criteria.tokens, criteria.max_bad_steps, criteria.stop.target_loss) == (5, 50, 2, 1.0)
