"""Layouts of a model on N GPUs: the fastest that fit, why others do not, and the nearest one that does. No torch.

Tensor parallelism stays within an NVLink domain; every layout keeps the global batch. A layout that a rule of the configuration refuses is no candidate.
"""
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_ext.config import sizes
from megatron_ext.config.layouts import LAYOUT, MODEL
from megatron_ext.config.schema import Config
from megatron_ext.config.stages import PACKED
from megatron_ext.config.validate import batch_divides, sequence_parallel_fits
from megatron_ext.errors import UserError
from megatron_ext.plan.calibration import Calibration
from megatron_ext.plan.hardware import GIB, timed
from megatron_ext.plan.memory import RankMemory, fullest, limit
from megatron_ext.plan.timing import Step, step_time


@dataclass(frozen=True)
class Candidate:
    """A layout, the memory of its fullest rank, and its step (None where the GPU is not known)."""

    config: Config
    memory: RankMemory
    step: Step | None = None

    @property
    def words(self) -> list[str]:
        """As they are typed."""
        parallel, train = self.config.parallel, self.config.train
        found = [f"parallel.tp={parallel.tp}", f"parallel.pp={parallel.pp}"]
        found += [f"parallel.vpp={parallel.vpp}"] if parallel.vpp else []
        found += [f"parallel.cp={parallel.cp}"] if parallel.cp > 1 else []
        found += ["parallel.sp=true"] if parallel.sp else []
        found += [f"parallel.recompute={parallel.recompute}"] if parallel.recompute != "none" else []
        return found + [f"train.micro_batch_size={train.micro_batch_size}"]


@dataclass(frozen=True)
class Found:
    """`best`: fastest first. `refused`: for each TP x PP without a layout that fits, why. tried, fitting: counts."""

    best: tuple[Candidate, ...]
    refused: tuple[tuple[str, str], ...]
    tried: int
    fitting: int


def divisors(number: int, most: int | None = None) -> list[int]:
    """Of `number`, up to `most`, ascending."""
    return [i for i in range(1, min(number, most or number) + 1) if number % i == 0]


def search(config: Config, calibration: Calibration, vocab: int, *, shown: int | None = None) -> Found:
    """The best layouts of `config.model` on `config.launch.ranks` ranks with its batch and hardware.

    Args:
        vocab: words that exist.
        shown: how many; None = `plan.shown`.
    """
    fitting: list[Candidate] = []
    smallest: dict[tuple[int, int], Candidate] = {}
    tried = 0
    for one in _layouts(config):
        tried += 1
        candidate = Candidate(one, fullest(one, vocab))
        key = one.parallel.tp, one.parallel.pp
        if key not in smallest or candidate.memory.total < smallest[key].memory.total:
            smallest[key] = candidate
        if (most := limit(one)) is None or candidate.memory.total <= most:
            fitting.append(candidate)
    if timed(config.hardware):
        fitting = [replace(one, step=step_time(one.config, calibration, vocab)) for one in fitting]
        fitting.sort(key=lambda one: (one.step.seconds, one.memory.total))
    else:
        fitting.sort(key=lambda one: (one.config.parallel.tp * one.config.parallel.pp, one.config.parallel.recompute != "none", one.memory.total))
    served = {(one.config.parallel.tp, one.config.parallel.pp) for one in fitting}
    refused = tuple((f"TP {tp} x PP {pp}", _why(one, config)) for (tp, pp), one in sorted(smallest.items()) if (tp, pp) not in served)
    best: dict[tuple, Candidate] = {}
    for one in fitting:  # of layouts that differ in chunks, micro-batch or recomputation alone, the best
        best.setdefault((one.config.parallel.tp, one.config.parallel.pp, one.config.parallel.cp), one)
    return Found(tuple(list(best.values())[: shown or config.plan.shown]), refused, tried, len(fitting))


def _why(candidate: Candidate, config: Config) -> str:
    parts = {"weights": candidate.memory.weights, "gradients": candidate.memory.gradients, "optimizer": candidate.memory.optimizer,
             "activations": candidate.memory.activations + candidate.memory.logits}
    largest = max(parts, key=parts.get)
    with_ = "recomputation and " if candidate.config.parallel.recompute == "full" else ""
    return (f"at least {candidate.memory.total / GIB:.1f} GiB of {config.hardware.memory:g}, with {with_}micro-batches of "
            f"{candidate.config.train.micro_batch_size}; most of it {largest}, {parts[largest] / GIB:.1f} GiB")


def _layouts(config: Config) -> Iterator[Config]:
    ranks, model, packed = config.launch.ranks, config.model, config.stage.name in PACKED
    for tp in divisors(math.gcd(ranks, model.num_attention_heads, model.hidden_size, sizes.ffn_size(model)), config.hardware.domain):
        for pp in divisors(ranks // tp, sizes.layers(model)):
            if sizes.layers(model) % pp:
                continue
            for cp in sorted({1, config.parallel.cp}):
                if ranks % (tp * pp * cp):
                    continue
                each = config.train.global_batch_size * tp * pp * cp // ranks
                micros = [config.train.micro_batch_size] if packed else [m for m in (1, 2, 4, 8) if m <= each]
                for micro in micros:
                    for vpp in [None, *(v for v in divisors(sizes.layers(model) // pp) if pp > 1 and v > 1)]:
                        for recompute in ("none", "full"):
                            parallel = replace(config.parallel, tp=tp, pp=pp, cp=cp, vpp=vpp, sp=tp > 1, recompute=recompute, recompute_layers=1)
                            one = replace(config, parallel=parallel, train=replace(config.train, micro_batch_size=micro))
                            if not any(True for rule in (*MODEL, *LAYOUT, batch_divides, sequence_parallel_fits) for _ in rule(one)):
                                yield one


def nearest(config: Config, vocab: int) -> Candidate | None:
    """The layout on the same ranks that fits and differs least from `config`; None where none fits."""
    most = limit(config)
    was = config.parallel

    def distance(one: Config) -> float:
        now = one.parallel
        return (abs(math.log2(now.tp / was.tp)) + abs(math.log2(now.pp / was.pp)) + 0.5 * abs(math.log2(one.train.micro_batch_size / config.train.micro_batch_size))
                + 0.75 * (now.recompute != was.recompute) + 0.25 * (now.vpp != was.vpp) + 0.1 * (now.sp != was.sp) + 2 * (now.cp != was.cp))

    for one in sorted(_layouts(config), key=distance):
        candidate = Candidate(one, fullest(one, vocab))
        if most is None or candidate.memory.total <= most:
            return candidate
    return None


def refuse(config: Config, vocab: int) -> None:
    """Raises UserError where the GPU that is named cannot hold the configuration, naming the nearest layout that fits."""
    most = limit(config)
    if most is None:
        return
    if config.stage.name in PACKED:
        from megatron_ext.plan.rlhf import together

        needed, where = together(config, vocab)
    else:
        found = fullest(config, vocab)
        needed, where = found.total, f"pipeline stage {found.pipeline_rank}"
    if needed <= most:
        return
    parallel, near = config.parallel, None if config.stage.name in PACKED else nearest(config, vocab)
    right = "no layout on as many ranks fits: take more ranks" if near is None else "the nearest layout that fits: " + " ".join(near.words)
    if config.stage.name in PACKED:
        right = "take more ranks, larger layouts, ppo.offload=true, or a smaller rollout.batch_tokens"
    layout = f"TP {parallel.tp} x PP {parallel.pp}" + (f" x CP {parallel.cp}" if parallel.cp > 1 else "")
    raise UserError("hardware.name", config.hardware.name, f"has {config.hardware.memory:g} GiB, and {layout} with micro-batches of "
                    f"{config.train.micro_batch_size} needs {needed / GIB:.1f} GiB ({where}; {100 * config.plan.margin:g} % of the GPU is left free); {right}")
