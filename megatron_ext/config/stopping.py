"""Rules of the stop criteria: one that a stage cannot see is refused, not ignored. No torch.

They belong to the rules of `validate.py`, which says what a rule is; `train/stop.py` and `rlhf/stop.py` are the criteria.
"""
from collections.abc import Iterator

from megatron_ext.config.layouts import Rule
from megatron_ext.config.schema import Config, StopConfig
from megatron_ext.config.stages import CHAT, ONLINE, TEXT
from megatron_ext.errors import UserError

ON_LOSS = ("target_loss", "plateau_patience")
OF_REWARD = ("reward_accuracy", "calibration_error")
OF_ONLINE = ("kl_budget", "reward_per_kl", "length_drift", "entropy_floor", "reward_disagreement")


def criteria_fit_the_stage(config: Config) -> Iterator[UserError]:
    stage, stop = config.stage.name, config.stop
    seen_in = dict.fromkeys(ON_LOSS, tuple(name for name in (*TEXT, *CHAT) if name not in ONLINE)) | dict.fromkeys(OF_REWARD, ("reward",)) \
        | dict.fromkeys(OF_ONLINE, ONLINE)
    for name, stages in seen_in.items():
        value = getattr(stop, name)
        if value is not None and stage in (*TEXT, *CHAT) and stage not in stages:
            yield UserError(f"stop.{name}", value, f"is nothing that stage={stage} can see; it is for {', '.join(stages)}")
    if stop.calibration_error is not None and stop.reward_accuracy is None:
        yield UserError("stop.calibration_error", stop.calibration_error, "says when stop.reward_accuracy counts: give that too")
    if stop.reward_disagreement is not None and stage in ONLINE and len(config.rewards.models) < 2:
        yield UserError("stop.reward_disagreement", stop.reward_disagreement, f"is between reward models, and rewards.models names {len(config.rewards.models)}; "
                                                                              "it needs at least 2")


def criteria_are_asked(config: Config) -> Iterator[UserError]:
    validation = config.validation
    if not validation.every:
        for name in (*ON_LOSS, *OF_REWARD):
            if (value := getattr(config.stop, name)) != getattr(StopConfig, name):
                yield UserError(f"stop.{name}", value, "looks at validations, and validation.every is 0; set it to some number of steps")
    if config.checkpoint.best and not validation.every and not validation.at_end:
        yield UserError("checkpoint.best", "true", "keeps the checkpoint with the best validation, and there are none; set validation.every")


STOPPING: tuple[Rule, ...] = (criteria_fit_the_stage, criteria_are_asked)
