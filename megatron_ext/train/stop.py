"""When a run is over, and the sentence that says why.

Criteria: the budget (steps, tokens, wall time), non-finite steps in a row, and on the validation loss a target and a plateau: no
improvement on the best by more than `delta` nats for `patience` validations.
What must survive a resume (best loss, validations without improvement, seconds used) goes into the checkpoint as JSON. The wall time is
a budget, so it is counted over all lives of a run, up to the checkpoint that each life resumed from.

Ranks have clocks of their own: the caller takes one rank's verdict and gives it to all (a `Stop` is two strings).
"""
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from megatron_ext.config.schema import Config, StopConfig


@dataclass(frozen=True)
class Stop:
    """`kind`: steps | tokens | wall_time | non_finite | target_loss | plateau | signal | loss_spike, or one of rlhf/stop.py. `reason`: a sentence for people."""

    reason: str
    kind: str

    @property
    def failed(self) -> bool:
        """True when the run did not end as it was meant to."""
        return self.kind in ("non_finite", "loss_spike")

    @property
    def unfinished(self) -> bool:
        """True when the run was told to stop, and is to be gone on with."""
        return self.kind == "signal"


class StopCriteria:
    """Counts, and says when it is enough.

    Args:
        steps: updates of the run, the first is number 1. tokens: budget, None = off. max_bad_steps: non-finite steps in a row, 0 = off.
        stop: the other criteria. clock: seconds, for tests.
    """

    def __init__(self, *, steps: int, tokens: int | None = None, max_bad_steps: int = 0, stop: StopConfig | None = None,
                 clock: Callable[[], float] = time.monotonic):
        self.steps, self.tokens, self.max_bad_steps, self.stop = steps, tokens, max_bad_steps, stop or StopConfig()
        self._clock, self._start, self._earlier = clock, clock(), 0.0
        self.bad_steps = 0
        self.best_loss: float | None = None
        self.best_step: int | None = None
        self.stale = 0

    @classmethod
    def from_config(cls, config: Config, *, steps: int) -> "StopCriteria":
        """`steps`: length of the run in updates, worked out by the caller when the budget is in tokens."""
        return cls(steps=steps, tokens=config.train.tokens, max_bad_steps=config.train.max_bad_steps, stop=config.stop)

    @property
    def elapsed(self) -> float:
        """Seconds used, this life and the earlier ones."""
        return self._earlier + self._clock() - self._start

    def budget(self, *, steps_done: int, tokens_done: int) -> Stop | None:
        """Whether anything is left to spend; ask before the first step too, a resumed run may have none."""
        if self.tokens is not None and tokens_done >= self.tokens:
            return Stop(f"the budget of {self.tokens:,} tokens is spent ({tokens_done:,})", "tokens")
        if steps_done >= self.steps:
            return Stop(f"all {self.steps} steps are done", "steps")
        if self.stop.wall_time is not None and self.elapsed >= self.stop.wall_time:
            return Stop(f"the wall time of {self.stop.wall_time:g} s is spent ({self.elapsed:.0f} s)", "wall_time")
        return None

    def after_step(self, *, steps_done: int, tokens_done: int, finite: bool = True) -> Stop | None:
        """`finite`: whether loss and gradient were, so that the step was taken."""
        if finite:
            self.bad_steps = 0
            return self.budget(steps_done=steps_done, tokens_done=tokens_done)
        return self.not_finite(step=steps_done) or self.budget(steps_done=steps_done, tokens_done=tokens_done)

    def not_finite(self, *, step: int) -> Stop | None:
        """A step that was not taken."""
        self.bad_steps += 1
        if self.max_bad_steps and self.bad_steps >= self.max_bad_steps:
            return Stop(f"{self.bad_steps} non-finite steps in a row, the last was step {step}", "non_finite")
        return None

    def after_validation(self, *, steps_done: int, loss: float) -> Stop | None:
        """`loss`: nats a token. One that is not finite counts as no improvement."""
        if self.best_loss is None and math.isfinite(loss) or self.best_loss is not None and loss < self.best_loss - self.stop.plateau_delta:
            self.best_loss, self.best_step, self.stale = loss, steps_done, 0
        else:
            self.stale += 1
        if self.stop.target_loss is not None and loss <= self.stop.target_loss:
            return Stop(f"validation loss {loss:.4f} reached the target of {self.stop.target_loss:g} at step {steps_done}", "target_loss")
        if self.stop.plateau_patience is not None and self.stale >= self.stop.plateau_patience:
            best = "no finite loss so far" if self.best_loss is None else f"best {self.best_loss:.4f} at step {self.best_step}"
            return Stop(f"no improvement by more than {self.stop.plateau_delta:g} in {self.stale} validations ({best})", "plateau")
        return None

    def state_dict(self) -> dict:
        """JSON-able."""
        return {"best_loss": self.best_loss, "best_step": self.best_step, "stale": self.stale, "bad_steps": self.bad_steps,
                "elapsed": self.elapsed}

    def load_state_dict(self, state: dict) -> None:
        self.best_loss, self.best_step = state["best_loss"], state["best_step"]
        self.stale, self.bad_steps = int(state["stale"]), int(state["bad_steps"])
        self._earlier, self._start = float(state["elapsed"]), self._clock()


class Best:
    """Which validation was the best so far.

    Args:
        metric: of the validation's numbers. largest: the best is the largest.
        within: (another number, its limit): a validation beyond it, or without it, is never the best; such as a KL budget.
    """

    def __init__(self, metric: str, *, largest: bool = False, within: tuple[str, float] | None = None):
        self.metric, self.largest, self.within = metric, largest, within
        self.step: int | None = None
        self.value: float | None = None

    @classmethod
    def of(cls, config: Config) -> "Best":
        """By the validation loss; stages that judge otherwise make their own."""
        return cls("validation_loss")

    def better(self, step: int, metrics: dict) -> bool:
        """Takes note of a validation; True when it is the best so far. One that is not finite never is."""
        value = metrics.get(self.metric)
        if value is None or not math.isfinite(value):
            return False
        if self.within is not None and not metrics.get(self.within[0], math.nan) <= self.within[1]:
            return False
        if self.value is not None and (value <= self.value if self.largest else value >= self.value):
            return False
        self.step, self.value = step, value
        return True

    def state_dict(self) -> dict:
        """JSON-able."""
        return {"metric": self.metric, "step": self.step, "value": self.value}

    def load_state_dict(self, state: dict) -> None:
        """What was chosen by another number does not count."""
        if state["metric"] == self.metric:
            self.step, self.value = state["step"], state["value"]
