"""How many GPUs a program of training needs, and by when: base training, adaptation, then SFT and RLHF of each domain. No torch.

`plan.stages` lists them as NAME:TOKENS:DAYS[:COPIES], one after the other; copies (a model for each domain) train side by side. Of each stage the smallest
number of replicas of the layout is sought that is through in time, at `plan.availability`. A stage named ppo, grpo or rloo takes its tokens from episodes:
they are generated, scored and trained on, with all models of the stage on the same GPUs.
"""
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from megatron_ext.config import stages
from megatron_ext.config.geometry import Iteration
from megatron_ext.config.schema import Config
from megatron_ext.errors import UserError
from megatron_ext.plan import rlhf
from megatron_ext.plan.budget import bill
from megatron_ext.plan.calibration import Calibration
from megatron_ext.plan.hardware import timed
from megatron_ext.plan.timing import step_time

MOST = 1 << 14  # replicas


@dataclass(frozen=True)
class Wanted:
    """A stage: GPUs of all its copies from day `start` to day `end`, and what that comes to. cost: None without a price."""

    name: str
    tokens: float
    copies: int
    start: float
    end: float
    gpus: int
    gpu_hours: float
    energy: float | None
    cost: float | None


def acquire(config: Config, calibration: Calibration, vocab: int) -> list[Wanted]:
    """The stages of `plan.stages` for the model, layout and GPU of `config`.

    Raises:
        UserError: no stage, one that cannot be read, that no number of GPUs finishes in time, or a GPU that is not known.
    """
    if not timed(config.hardware):
        raise UserError("hardware.name", config.hardware.name or "null", "name a GPU (hardware=h100_sxm, ...): how many are needed follows from its speed")
    if not config.plan.stages:
        raise UserError("plan.stages", "[]", "name the stages to train, such as plan.stages=[base:2.7e11:60,sft:1e9:7:4]")
    found, day = [], 0.0
    for text in config.plan.stages:
        name, tokens, days, copies = _read(text)
        replicas = _replicas(config, calibration, vocab, name, tokens, days, text)
        gpus = replicas * config.parallel.tp * config.parallel.pp * config.parallel.cp
        took = tokens / _speed(config, calibration, vocab, name, replicas) / config.plan.availability / 86400
        hours = 24 * took * gpus * copies
        found.append(Wanted(name, tokens, copies, day, day + took, gpus * copies, hours, *bill(config, hours)))
        day += days
    return found


def _read(text: str) -> tuple[str, float, float, int]:
    parts = text.split(":")
    try:
        name, tokens, days = parts[0], float(parts[1]), float(parts[2])
        copies = int(parts[3]) if len(parts) == 4 else 1
    except (IndexError, ValueError):
        name, tokens, days, copies = "", 0.0, 0.0, 0
    if not name or len(parts) > 4 or not (0 < tokens < math.inf and 0 < days < math.inf and copies > 0):
        raise UserError("plan.stages", text, "must be NAME:TOKENS:DAYS or NAME:TOKENS:DAYS:COPIES, such as base:2.7e11:60 or sft:1e9:7:4")
    return name, tokens, days, copies


def _speed(config: Config, calibration: Calibration, vocab: int, name: str, replicas: int) -> float:
    """Tokens a second of one copy on so many replicas."""
    parallel, train = config.parallel, config.train
    ranks = replicas * parallel.tp * parallel.pp * parallel.cp
    # The batch grows only where fewer samples than replicas would be left.
    group = replicas * train.micro_batch_size * (parallel.pp if parallel.vpp else 1)
    batch = group * math.ceil(train.global_batch_size / group)
    own = replace(config, launch=replace(config.launch, ranks=ranks), train=replace(train, global_batch_size=batch))
    if name not in stages.ONLINE:
        return batch * config.data.sequence_length / step_time(own, calibration, vocab).seconds
    own = replace(own, stage=replace(own.stage, name=name))
    return Iteration.of(own).tokens / rlhf.iteration_time(own, calibration, vocab).seconds


def _replicas(config: Config, calibration: Calibration, vocab: int, name: str, tokens: float, days: float, text: str) -> int:
    needed, count = tokens / (days * 86400 * config.plan.availability), 1
    while count <= MOST and _speed(config, calibration, vocab, name, count) < needed:
        count *= 2
    if count > MOST:
        raise UserError("plan.stages", text, f"is not done in {days:g} days on {MOST} replicas of the layout; give it more days, or a larger batch")
    low = count // 2
    while count - low > 1:
        middle = (low + count) // 2
        low, count = (low, middle) if _speed(config, calibration, vocab, name, middle) >= needed else (middle, count)
    return count


def as_dict(wanted: Sequence[Wanted]) -> dict[str, object]:
    return {"stages": [asdict(one) for one in wanted], "gpus": max(one.gpus for one in wanted), "gpu_hours": sum(one.gpu_hours for one in wanted)}


def page(config: Config, wanted: Sequence[Wanted]) -> str:
    """For people."""
    most, hours = max(one.gpus for one in wanted), sum(one.gpu_hours for one in wanted)
    lines = [f"{config.model.name} on {config.hardware.name}: {most:,} GPUs at most, {hours:,.0f} GPU-hours"]
    for one in wanted:
        extra = "" if one.energy is None else f", {one.energy / 1000:,.1f} MWh"
        extra += "" if one.cost is None else f", cost {one.cost:,.0f}"
        copies = f" x {one.copies}" if one.copies > 1 else ""
        lines.append(f"  day {one.start:6.1f} to {one.end:6.1f}  {one.name + copies:<12} {one.tokens:8.2e} tokens  {one.gpus:6,} GPUs  "
                     f"{one.gpu_hours:12,.0f} GPU-hours{extra}")
    return "\n".join(lines)
