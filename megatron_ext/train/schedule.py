"""The learning rate as a pure function of the step: nothing to save, and a resume cannot get it wrong.

`step` counts updates from 0. With W = warmup_steps, the update `step` < W uses lr (step + 1) / W: the first update is not wasted on a
rate of zero, and update W - 1 (the peak) uses lr itself. From the peak on, with t in [0, 1] the part of the decay that is done:

    cosine    min_lr + (lr - min_lr) (1 + cos(pi t)) / 2     Loshchilov & Hutter 2017, arXiv 1608.03983
    linear    min_lr + (lr - min_lr) (1 - t)                 Bergsma et al. 2025, arXiv 2502.15938
    wsd       lr until the final decay, then 1 - sqrt(t) or 1 - t in place of (1 - t) above: warm-up, stable, decay
              (Hu et al. 2024, arXiv 2404.06395; the square root: Hägele et al. 2024, arXiv 2405.18392)
    constant  lr

min_lr is reached at t = 1, the update *after* the last one of the decay, so that a min_lr of 0 wastes no update either.
"""
import math

from megatron_ext.config.schema import OptimConfig


def lr_at(step: int, optim: OptimConfig, steps: int) -> float:
    """Learning rate of update `step` (0 is the first).

    Args:
        optim: `decay_steps` is where the decay ends for cosine and linear (None: at `steps`), and how long it lasts at the end of the
            run for wsd (None: a fifth of `steps`).
        steps: length of the run in updates.

    Raises:
        ValueError: a negative step, an unknown schedule or decay shape.
    """
    if step < 0:
        raise ValueError(f"step={step}: updates are counted from 0")
    if optim.schedule not in ("cosine", "linear", "wsd", "constant"):
        raise ValueError(f"optim.schedule={optim.schedule}: cosine, linear, wsd or constant")
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    peak = max(optim.warmup_steps - 1, 0)
    if optim.schedule == "wsd":
        length = optim.decay_steps if optim.decay_steps is not None else max(1, round(steps / 5))
        begin, end = max(steps - length, peak), steps
    else:
        begin, end = peak, optim.decay_steps if optim.decay_steps is not None else steps
    t = 1.0 if step >= end else max(0.0, (step - begin) / (end - begin))
    return optim.min_lr + (optim.lr - optim.min_lr) * _remaining(t, optim)


def _remaining(t: float, optim: OptimConfig) -> float:
    if optim.schedule == "cosine":
        return (1 + math.cos(math.pi * t)) / 2
    if optim.schedule == "linear" or optim.wsd_decay == "linear":
        return 1 - t
    if optim.wsd_decay == "sqrt":
        return 1 - math.sqrt(t)
    raise ValueError(f"optim.wsd_decay={optim.wsd_decay}: sqrt or linear")
