"""The printed page of a plan, and the object that `--json` prints. No torch."""
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ext.config import geometry, stages
from megatron_ext.config.schema import Config
from megatron_ext.observe.flops import token_flops
from megatron_ext.plan import rlhf
from megatron_ext.plan.budget import Budget, budget
from megatron_ext.plan.calibration import Calibration
from megatron_ext.plan.hardware import GIB, timed
from megatron_ext.plan.memory import RankMemory, limit, memory
from megatron_ext.plan.search import Found
from megatron_ext.plan.timing import Step, step_time

PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "margin")


@dataclass(frozen=True)
class Plan:
    """Everything that `plan` says of one configuration."""

    config: Config
    vocab: int
    ranks: list[RankMemory]
    step: Step | None
    budget: Budget
    members: list[rlhf.Member]
    iteration: rlhf.IterationTime | None

    @property
    def fullest(self) -> RankMemory:
        return max(self.ranks, key=lambda one: one.total)

    @property
    def fits(self) -> bool | None:
        """None where the GPU is not known."""
        most = limit(self.config)
        if most is None:
            return None
        return (rlhf.fullest_moment(self.config, self.members)[0] if self.members else self.fullest.total) <= most


def make(config: Config, calibration: Calibration, vocab: int) -> Plan:
    """The plan of a configuration. `vocab`: words that exist."""
    online, known = config.stage.name in stages.ONLINE, timed(config.hardware)
    step = step_time(config, calibration, vocab) if known and not online else None
    flops = token_flops(config.model, sequence_length=config.data.sequence_length, vocab_size=vocab, precision=config.precision, data=config.data).training
    packed = config.stage.name in stages.PACKED
    return Plan(config, vocab, memory(config, vocab), step, budget(config, vocab, step, flops), rlhf.members(config, vocab) if packed else [],
                rlhf.iteration_time(config, calibration, vocab) if online and known else None)


def as_dict(plan: Plan) -> dict[str, object]:
    """One JSON-able object; bytes, seconds, and shares of 1."""
    config = plan.config
    return geometry.report(config, plan.vocab) | {
        "hardware": config.hardware.name, "fits": plan.fits, "memory_limit": limit(config),
        "memory": [one.as_dict() for one in plan.ranks], "step": None if plan.step is None else plan.step.as_dict(),
        "budget": plan.budget.as_dict(), "models": [one.as_dict() for one in plan.members],
        "iteration": None if plan.iteration is None else vars(plan.iteration) | {"seconds": plan.iteration.seconds},
    }


def page(plan: Plan, assumed: Sequence[str] = ()) -> str:
    """The plan for people."""
    lines = [geometry.text(plan.config, plan.vocab)]
    if assumed:
        lines.append("assumed     " + " ".join(assumed))
    lines += ["", *_memory(plan)]
    if plan.members:
        lines += ["", *_members(plan)]
    lines += ["", *_time(plan)]
    if plan.config.stage.name not in stages.PACKED:
        lines += ["", *_budget(plan)]
    return "\n".join(lines)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  " + "  ".join(word.ljust(width) if not i else word.rjust(width) for i, (word, width) in enumerate(zip(row, widths, strict=True))).rstrip()
            for row in rows]


def _memory(plan: Plan) -> list[str]:
    most = limit(plan.config)
    head = "memory      GiB a rank" + ("" if most is None else f", of {most / GIB:g} ({plan.config.hardware.name})")
    verdict = {None: "no GPU is named (hardware=h100_sxm, ...): nothing is judged", True: "fits", False: "does NOT fit"}[plan.fits]
    rows = [["", *(f"stage {one.pipeline_rank}" for one in plan.ranks)]]
    rows += [[part, *(f"{getattr(one, part) / GIB:.2f}" for one in plan.ranks)] for part in PARTS]
    rows += [["together", *(f"{one.total / GIB:.2f}" for one in plan.ranks)], ["parameters", *(f"{one.parameters:,}" for one in plan.ranks)]]
    return [f"{head}: {verdict}", *_table(rows)]


def _members(plan: Plan) -> list[str]:
    needed, where = rlhf.fullest_moment(plan.config, plan.members)
    rows = [["model", "parameters", "held", "at work"]]
    rows += [[one.role + ("" if one.trained else " (weights)"), f"{one.parameters:,}", f"{one.held / GIB:.2f}", f"{one.working / GIB:.2f}"] for one in plan.members]
    return ["models      GiB a rank", *_table(rows), f"  {needed / GIB:.2f} GiB: {where}"]


def _time(plan: Plan) -> list[str]:
    if plan.iteration is not None:
        one = plan.iteration
        return [(f"iteration   {one.seconds:,.1f} s with answers of full length = {one.generation:,.1f} generation + {one.scoring:,.1f} scoring + "
                 f"{one.training:,.1f} training")]
    step = plan.step
    if step is None:
        return ["step        unknown: name a GPU (hardware=h100_sxm, ...) for step time, MFU, days and cost"]
    rows = [[name, f"{seconds:.3f} s", f"{100 * seconds / step.seconds:.1f} %"] for name, seconds in sorted(step.parts.items(), key=lambda x: -x[1]) if seconds]
    return [
        f"step        {step.seconds:.2f} s = {step.micro_batches} micro-batches a rank; bubble (p - 1) / (m v) = {100 * step.bubble:.1f} %",
        *_table(rows),
        (f"speed       {step.tokens_per_second:,.0f} tokens/s, {step.tokens_per_second_per_gpu:,.0f} a GPU; {step.tflops_per_gpu:.0f} TFLOP/s a GPU "
         f"({step.causal_tflops_per_gpu:.0f} with half of the attention matrix)"),
        f"MFU         {100 * step.mfu:.1f} %, HFU {100 * step.hfu:.1f} %" if step.mfu is not None else "MFU         unknown",
    ]


def _budget(plan: Plan) -> list[str]:
    one, config = plan.budget, plan.config
    lines = [f"run         {one.tokens:,} tokens, {one.flops:.2e} FLOP"]
    if one.days is not None:
        lines[0] += f": {one.days:,.1f} days at {100 * config.plan.availability:g} % availability, {one.gpu_hours:,.0f} GPU-hours"
        if one.energy is not None:
            lines.append(f"energy      {one.energy / 1000:,.1f} MWh (PUE {config.plan.pue:g})")
        lines.append("cost        name a price: plan.price (of a GPU-hour), plan.power_price (of a kWh)" if one.cost is None else f"cost        {one.cost:,.0f}")
    lines += [
        f"storage     data {_bytes(one.data_bytes)}; a checkpoint {_bytes(one.checkpoint_bytes)}, all that are kept {_bytes(one.checkpoints_bytes)}",
        (f"checkpoints every {one.checkpoint_interval / 60:,.1f} min, written within {one.write_seconds:,.1f} s: {_bytes(one.write_bandwidth)}/s, for a failure "
         f"every {one.mttf:,.1f} h to cost 2 % of the time"),
    ]
    return lines


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.3g} PB"


def search_page(config: Config, found: Found) -> str:
    """The best layouts, and why others do not fit."""
    lines = [(f"{config.model.name} on {config.launch.ranks:,} x {config.hardware.name or 'a GPU that is not named'}, batch "
              f"{config.train.global_batch_size} x {config.data.sequence_length:,} tokens: {found.fitting} of {found.tried} layouts fit")]
    if found.best:
        rows = [["layout", "GiB", "step", "tokens/s", "MFU"]]
        for one in found.best:
            step = one.step
            rows.append([" ".join(one.words), f"{one.memory.total / GIB:.1f}", *(("", "", "") if step is None else (
                f"{step.seconds:.2f} s", f"{step.tokens_per_second:,.0f}", "unknown" if step.mfu is None else f"{100 * step.mfu:.1f} %"))])
        lines += ["", *_table(rows)]
    if found.refused:
        lines += ["", "does not fit:", *(f"  {layout}: {why}" for layout, why in found.refused)]
    return "\n".join(lines)


def search_dict(found: Found) -> dict[str, object]:
    return {"tried": found.tried, "fitting": found.fitting, "refused": [{"layout": layout, "why": why} for layout, why in found.refused],
            "best": [{"overrides": one.words, "memory": one.memory.as_dict(), "step": None if one.step is None else one.step.as_dict()} for one in found.best]}


def fit_page(found: dict) -> list[str]:
    """What `plan calibrate` prints."""
    error = found["error"]
    rows = [["row", "measured", "fitted", "left out", "constant"]]
    rows += [[row["name"], f"{row['measured']:.1f}", f"{row['predicted']:.1f} ({100 * row['error']:+.1f} %)", f"{row['left_out']:.1f}", f"{row['constant']:.1f}"]
             for row in found["rows"]]
    others = [["not fitted", "measured", "predicted", "unit"]]
    others += [[row["name"], f"{row['measured']:.0f}", f"{row['predicted']:.0f} ({100 * row['error']:+.1f} %)", row["unit"]] for row in found["not_fitted"]]
    scaling = [["strong scaling", "stated MFU", "predicted", "with 4 chunks a stage"]]
    scaling += [[row["name"], "" if row["stated_mfu"] is None else f"{100 * row['stated_mfu']:.0f} %", f"{100 * row['mfu']:.1f} %",
                 f"{100 * row['mfu_four_chunks']:.1f} %"] for row in found["strong_scaling"]]
    return [
        "fitted      " + ", ".join(f"{name} = {found['constants'][name]:.4g}" for name in found["fitted"]) + f"; {found['source']}",
        (f"error       {100 * error['fit']:.1f} % on the rows fitted, {100 * error['leave_one_out']:.1f} % leaving one out; the best constant, leaving one out: "
         f"{100 * error['constant']:.1f} %"), "", *_table(rows), "", *_table(others), "", *_table(scaling),
    ]
