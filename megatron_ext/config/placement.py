"""The models beside the policy, each in a layout of its own on the same ranks: their configurations, and whether they fit. No torch.

A role's layout is the policy's `parallel`, with what `reference_layout`, `reward_layout`, `critic_layout`, `rollout_layout` say otherwise
(`train/stage.py` makes the process groups by the same rule).
"""
from collections.abc import Iterator
from dataclasses import replace

from megatron_ext.config.layouts import LAYOUT, ranks_fit
from megatron_ext.config.schema import Config, ModelConfig
from megatron_ext.errors import UserError


def layout_key(role: str) -> str:
    """Where the layout of a role is configured: "reward" -> "reward_layout"; the policy's is `parallel`."""
    return "parallel" if role == "policy" else f"{role}_layout"


def placed(config: Config, role: str, model: ModelConfig | None = None) -> Config:
    """`config` as the role's engine sees it.

    Args:
        role: policy | reference | reward | critic | rollout.
        model: its sizes, where its checkpoint has been read; None = the policy's.
    """
    parallel = config.parallel
    if role != "policy":
        own = getattr(config, layout_key(role))
        tp, pp = own.tp or parallel.tp, own.pp or parallel.pp
        sp = own.sp if own.sp is not None else parallel.sp and tp > 1
        parallel = replace(parallel, tp=tp, pp=pp, sp=sp, vpp=parallel.vpp if pp == parallel.pp else None)
    return replace(config, parallel=parallel, model=model or config.model)


def misplaced(config: Config, role: str, model: ModelConfig | None = None) -> Iterator[UserError]:
    """What keeps a role from its layout, in the role's keys. Where its sizes are in a checkpoint that has not been read, only the number of ranks."""
    key, own = layout_key(role), placed(config, role, model)
    unread = model is None and role in ("reward", "critic")
    for rule in (ranks_fit,) if unread else LAYOUT:
        for error in rule(own):
            yield UserError(error.key.replace("parallel.", f"{key}."), error.value, error.reason.replace("parallel.", f"{key}."))
    if own.parallel.sp and own.parallel.tp == 1:
        yield UserError(f"{key}.sp", "true", f"splits norms over the tensor-parallel ranks: needs {key}.tp greater than 1")
