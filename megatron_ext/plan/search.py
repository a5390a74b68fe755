"""Layouts of a model on N GPUs: the fastest that fit, why others do not, and the nearest one that does. No torch.

Tensor parallelism stays within an NVLink domain; every layout keeps the global batch. A layout that a rule of the configuration refuses is no candidate.
"""
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_ext.config import sizes
from megatron_ext.config.families import family_fits_layout, spans_fit
from megatron_ext.config.layouts import LAYOUT, MODEL
from megatron_ext.config.schema import Config, ParallelConfig
from megatron_ext.config.stages import PACKED, models
from megatron_ext.config.validate import batch_divides, sequence_parallel_fits
from megatron_ext.errors import UserError
from megatron_ext.plan.calibration import Calibration
from megatron_ext.plan.hardware import GIB, timed
from megatron_ext.plan.memory import RankMemory, fullest, limit
from megatron_ext.plan.rlhf import together
from megatron_ext.plan.timing import Step, step_time

RULES = (*MODEL, family_fits_layout, *LAYOUT, spans_fit, batch_divides, sequence_parallel_fits)


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

    def instead_of(self, typed: Config) -> list[str]:
        """`words`, and those that take back what `typed` has and this layout has not."""
        now, was, plain = self.config.parallel, typed.parallel, ParallelConfig()
        back = [name for name in ("vpp", "cp", "sp", "recompute", "recompute_layers") if getattr(now, name) == getattr(plain, name) != getattr(was, name)]
        shown = {None: "null", False: "false"}
        return self.words + [f"parallel.{name}={shown.get(getattr(plain, name), getattr(plain, name))}" for name in back]


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


def search(config: Config, calibration: Calibration, vocab: int) -> Found:
    """The best layouts of `config.model` on `config.launch.ranks` ranks with its batch and hardware. `vocab`: words that exist."""
    fitting: list[Candidate] = []
    refused: list[tuple[str, str]] = []
    tried = 0
    for shape in _shapes(config):
        variants = list(_variants(config, *shape))
        tried += len(variants)
        if not variants:
            continue
        least = Candidate(variants[0], fullest(variants[0], vocab))
        if not _holds(least):
            refused.append((f"TP {shape[0]} x PP {shape[1]}", _why(least, config)))
            continue
        fitting += [one for one in (Candidate(variant, fullest(variant, vocab)) for variant in variants) if _holds(one)]
    if timed(config.hardware):
        fitting = [replace(one, step=step_time(one.config, calibration, vocab)) for one in fitting]
        fitting.sort(key=lambda one: (one.step.seconds, one.memory.total))
    else:
        fitting.sort(key=lambda one: (one.config.parallel.tp * one.config.parallel.pp, one.config.parallel.recompute != "none", one.memory.total))
    best: dict[tuple, Candidate] = {}
    for one in fitting:  # of layouts that differ in chunks, micro-batch or recomputation alone, the best
        best.setdefault((one.config.parallel.tp, one.config.parallel.pp, one.config.parallel.cp), one)
    return Found(tuple(list(best.values())[: config.plan.shown]), tuple(refused), tried, len(fitting))


def _why(candidate: Candidate, config: Config) -> str:
    parts = {"weights": candidate.memory.weights, "gradients": candidate.memory.gradients, "optimizer": candidate.memory.optimizer,
             "activations": candidate.memory.activations + candidate.memory.logits}
    largest = max(parts, key=parts.get)
    with_ = "recomputation and " if candidate.config.parallel.recompute == "full" else ""
    return (f"at least {candidate.memory.total / GIB:.1f} GiB of {config.hardware.memory:g}, with {with_}micro-batches of "
            f"{candidate.config.train.micro_batch_size}; most of it {largest}, {parts[largest] / GIB:.1f} GiB")


def _holds(candidate: Candidate) -> bool:
    most = limit(candidate.config)
    return most is None or candidate.memory.total <= most


def _shapes(config: Config) -> Iterator[tuple[int, int, int]]:
    """(TP, PP, CP) that divide the ranks and the model."""
    ranks, model = config.launch.ranks, config.model
    for tp in divisors(math.gcd(ranks, model.num_attention_heads, model.hidden_size, sizes.ffn_size(model)), config.hardware.domain):
        for pp in divisors(ranks // tp, sizes.layers(model)):
            for cp in sorted({1, config.parallel.cp}):
                if sizes.layers(model) % pp == 0 and ranks % (tp * pp * cp) == 0:
                    yield tp, pp, cp


def _variants(config: Config, tp: int, pp: int, cp: int) -> Iterator[Config]:
    """Recomputation, micro-batch and chunks of a shape; what needs least memory comes first. Of interleaving: chunks of one, two and four layers."""
    each = config.train.global_batch_size * tp * pp * cp // config.launch.ranks
    micros = [config.train.micro_batch_size] if config.stage.name in PACKED else [m for m in (1, 2, 4, 8) if m <= each]
    layers = sizes.layers(config.model) // pp
    chunks = [None, *sorted({layers // n for n in (1, 2, 4) if layers % n == 0 and layers > n and pp > 1})]
    for recompute in ("full", "none"):
        for micro in micros:
            for vpp in chunks:
                parallel = replace(config.parallel, tp=tp, pp=pp, cp=cp, vpp=vpp, sp=tp > 1, recompute=recompute, recompute_layers=1)
                one = replace(config, parallel=parallel, train=replace(config.train, micro_batch_size=micro))
                if not any(True for rule in RULES for _ in rule(one)):
                    yield one


def nearest(config: Config, vocab: int) -> Candidate | None:
    """The layout on the same ranks that fits and differs least from `config`; None where none fits."""
    was = config.parallel

    def distance(one: Config) -> float:
        now = one.parallel
        micro = one.train.micro_batch_size / config.train.micro_batch_size
        return (abs(math.log2(now.tp / was.tp)) + abs(math.log2(now.pp / was.pp)) + 0.5 * abs(math.log2(micro)) + 0.75 * (now.recompute != was.recompute)
                + 0.25 * (now.vpp != was.vpp) + 0.1 * (now.sp != was.sp) + 2 * (now.cp != was.cp))

    shapes = [list(_variants(config, *shape)) for shape in _shapes(config)]
    possible = [one for variants in shapes if variants and _holds(Candidate(variants[0], fullest(variants[0], vocab))) for one in variants]
    for one in sorted(possible, key=distance):
        candidate = Candidate(one, fullest(one, vocab))
        if _holds(candidate):
            return candidate
    return None


def refuse(config: Config, vocab: int) -> None:
    """Raises UserError where the GPU that is named cannot hold the configuration, naming the nearest layout that fits."""
    most = limit(config)
    if most is None:
        return
    packed = config.stage.name in PACKED
    if packed:
        needed, where = together(config, vocab)
        batches = f"rollout.batch_tokens={config.rollout.batch_tokens} tokens"
    else:
        found = fullest(config, vocab)
        needed, where, batches = found.total, f"pipeline stage {found.pipeline_rank}", f"{config.train.micro_batch_size}"
    if needed <= most:
        return
    if packed:
        offload = " ppo.offload=true," if len(models(config)) > 1 and not config.ppo.offload else ""
        right = f"take more ranks, a larger parallel.tp or parallel.pp,{offload} or a smaller rollout.batch_tokens"
    elif (near := nearest(config, vocab)) is not None:
        right = "the nearest layout that fits: " + " ".join(near.instead_of(config))
    else:
        right = "no layout on as many ranks fits: take more ranks"
    parallel = config.parallel
    layout = f"TP {parallel.tp} x PP {parallel.pp}" + (f" x CP {parallel.cp}" if parallel.cp > 1 else "")
    raise UserError("hardware.name", config.hardware.name, f"has {config.hardware.memory:g} GiB, and {layout} with micro-batches of "
                    f"{batches} needs {needed / GIB:.1f} GiB ({where}; {100 * config.plan.margin:g} % of the GPU is left free); {right}")
