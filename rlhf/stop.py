"""When reward modelling and policy optimisation have gone far enough, and the sentence that says what was seen.

A reward model is done when it orders held-out pairs well enough, and believes in itself as much as it should:

    accuracy >= stop.reward_accuracy    while    calibration error <= stop.calibration_error.                 RewardCriteria

A policy that is optimised against a reward model first gets better and then only better at being rewarded (Gao et al. 2022, arXiv 2210.10760: over
the root of the KL the model's reward goes on rising, and what it stands for turns down). It ends when one of these is seen, over the last
w = stop.window iterations: PolicyCriteria

    kl_budget            KL to the reference (k1, nats a response) of an iteration or a validation above the budget. The one that needs no window:
                         a budget is not overdrawn on average.
    entropy_floor        mean entropy of a token below the floor: the policy says one thing only, and learns nothing from its rollouts.
    length_drift         mean response length above d, or below 1 / d, times that of the first w iterations: length is what reward models mistake for
                         quality most often.
    reward_disagreement  mean standard deviation between the reward models above x times that of the first w iterations: the policy has gone where they
                         have learnt nothing (Coste et al. 2023, arXiv 2310.02743).
    reward_per_kl        slope of reward over KL (least squares) below the least that a nat has to earn. Asked only while KL grows: then it is paid for.

Numbers that are missing or not finite are left out; each criterion waits until its window is full. All of it is state: JSON keeps every bit, so
that a resumed run stops where the uninterrupted one does.
"""
import math
from collections import deque
from collections.abc import Mapping, Sequence

from megatron_ext.config.schema import Config
from megatron_ext.train.stop import Best, Stop

SERIES = ("kl_k1", "reward", "response_length", "entropy", "reward_disagreement")


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the least-squares line of y over x; NaN where x does not vary."""
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    spread = math.fsum((a - mean_x) ** 2 for a in x)
    return math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread if spread > 0 else math.nan


class RewardCriteria:
    """Of the reward stage. The plateau and the target of the validation loss are the loop's (`train/stop.py`)."""

    def __init__(self, config: Config):
        self.stop = config.stop

    @property
    def best(self) -> Best:
        """A new choice among validations: the most accurate one, of those that are calibrated where that is asked for."""
        limit = self.stop.calibration_error
        return Best("validation_accuracy", largest=True, within=None if limit is None else ("validation_calibration_error", limit))

    def after_validation(self, metrics: Mapping[str, float]) -> Stop | None:
        """metrics: `step`, and `validation_accuracy`, `validation_calibration_error` where there was a validation."""
        target, limit = self.stop.reward_accuracy, self.stop.calibration_error
        accuracy, error = metrics.get("validation_accuracy"), metrics.get("validation_calibration_error", math.nan)
        if target is None or accuracy is None or not accuracy >= target or limit is not None and not error <= limit:
            return None
        pairs = metrics.get("validation_pairs")
        of = f" of {pairs:,.0f}" if pairs is not None else " of the"
        calibrated = "" if limit is None else f", with a calibration error of {error:.3f} (at most {limit:g})"
        return Stop(f"{accuracy:.1%}{of} held-out pairs are in the right order at step {metrics['step']}, the target was {target:.1%}{calibrated}",
                    "reward_accuracy")

    def state_dict(self) -> dict:
        """Nothing is remembered: each validation speaks for itself."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


class PolicyCriteria:
    """Of ppo, grpo and rloo.

    Attributes:
        recent: by name the last `window` values. start: by name the mean of the first `window`, None until there are so many.
    """

    def __init__(self, config: Config):
        self.stop, self.window = config.stop, config.stop.window
        self.recent: dict[str, deque[float]] = {name: deque(maxlen=self.window) for name in SERIES}
        self.start: dict[str, float | None] = dict.fromkeys(SERIES)

    @property
    def best(self) -> Best:
        """A new choice among validations: the greatest reward, of those within the KL budget where there is one."""
        budget = self.stop.kl_budget
        return Best("validation_reward", largest=True, within=None if budget is None else ("validation_kl_k1", budget))

    def after_iteration(self, metrics: Mapping[str, float]) -> Stop | None:
        """metrics: of one iteration under their usual names, `step` among them; those of a validation where one followed."""
        seen = {name: metrics[name] for name in SERIES if metrics.get(name) is not None and math.isfinite(metrics[name])}
        if not {"kl_k1", "reward"} <= seen.keys():  # they are points of a line: one without the other is none
            seen = {name: value for name, value in seen.items() if name not in ("kl_k1", "reward")}
        for name, value in seen.items():
            self.recent[name].append(value)
            if self.start[name] is None:
                self.start[name] = self._mean(name)
        step = metrics["step"]
        checks = (self._kl_budget, self._entropy_floor, self._length_drift, self._reward_disagreement, self._reward_per_kl)
        found = [stop for stop in (check(metrics) for check in checks) if stop is not None]
        if not found:
            return None
        return Stop(f"at iteration {step} " + "; also, ".join(one.reason for one in found), found[0].kind)

    def _mean(self, name: str) -> float | None:
        """Over the window; None until it is full."""
        values = self.recent[name]
        return math.fsum(values) / len(values) if len(values) == self.window else None

    def _kl_budget(self, metrics: Mapping[str, float]) -> Stop | None:
        budget = self.stop.kl_budget
        for name, where in (("kl_k1", "of its rollouts"), ("validation_kl_k1", "of the held-out prompts")):
            value = metrics.get(name, math.nan)
            if budget is not None and value > budget:
                return Stop(f"the KL to the reference {where} was {value:.3f} nats a response, above the budget of {budget:g}", "kl_budget")
        return None

    def _entropy_floor(self, metrics: Mapping[str, float]) -> Stop | None:
        floor, mean = self.stop.entropy_floor, self._mean("entropy")
        if floor is None or mean is None or not mean < floor:
            return None
        return Stop(f"the entropy of a token was {mean:.4f} nats on average over {self.window} iterations, below the floor of {floor:g}", "entropy_floor")

    def _length_drift(self, metrics: Mapping[str, float]) -> Stop | None:
        limit, mean, start = self.stop.length_drift, self._mean("response_length"), self.start["response_length"]
        if limit is None or mean is None or not (mean > limit * start or mean * limit < start):
            return None
        return Stop(f"responses had {mean:.1f} tokens on average over {self.window} iterations, against {start:.1f} in the first {self.window}: more than "
                    f"{limit:g} times as {'long' if mean > start else 'short'}", "length_drift")

    def _reward_disagreement(self, metrics: Mapping[str, float]) -> Stop | None:
        limit, mean, start = self.stop.reward_disagreement, self._mean("reward_disagreement"), self.start["reward_disagreement"]
        if limit is None or mean is None or not mean > limit * start:
            return None
        return Stop(f"the reward models differed by {mean:.4f} on average over {self.window} iterations, against {start:.4f} in the first {self.window}: "
                    f"more than {limit:g} times as much", "reward_disagreement")

    def _reward_per_kl(self, metrics: Mapping[str, float]) -> Stop | None:
        least, kl, reward = self.stop.reward_per_kl, list(self.recent["kl_k1"]), list(self.recent["reward"])
        if least is None or len(kl) < self.window or not slope(range(self.window), kl) > 0:
            return None
        gained = slope(kl, reward)
        if not gained < least:
            return None
        return Stop(f"a nat of KL earned {gained:.4f} reward over the last {self.window} iterations (KL {kl[0]:.3f} to {kl[-1]:.3f}, reward {reward[0]:.3f} "
                    f"to {reward[-1]:.3f}), below the {least:g} that it has to", "reward_per_kl")

    def state_dict(self) -> dict:
        """JSON-able."""
        return {"recent": {name: list(values) for name, values in self.recent.items()}, "start": dict(self.start)}

    def load_state_dict(self, state: dict) -> None:
        """A window that is another now keeps the start that was measured, and as many of the last values as it holds."""
        for name in SERIES:
            self.recent[name] = deque(state["recent"].get(name, ()), maxlen=self.window)
            self.start[name] = state["start"].get(name)
