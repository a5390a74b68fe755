"""What a token budget costs: days, GPU-hours, energy, money; storage, and how fast checkpoints have to be written. No torch.

Failures come at a rate of one in M = `plan.mttf` hours (or `plan.mttf_gpu` over the GPUs). A checkpoint every t seconds that keeps the run for W seconds
costs the share W / t + t / (2 M) of the time; the best t is sqrt(2 M W) and costs sqrt(2 W / M) (Young 1974). To stay below a share e, W must be at most
e^2 M / 2: the bytes of a checkpoint over that is the bandwidth to ask for.
"""
from dataclasses import asdict, dataclass

from megatron_ext.config import sizes
from megatron_ext.config.geometry import Batch
from megatron_ext.config.schema import Config
from megatron_ext.plan.buffers import BYTES
from megatron_ext.plan.timing import Step

SHARE = 0.02  # of the time, for checkpoints and what failures undo


@dataclass(frozen=True)
class Budget:
    """tokens, steps: of the run. days: of wall time, failures included. energy in kWh, of the site. cost: None without a price.

    data_bytes: tokens and the text that they came from. checkpoint_bytes: one checkpoint; checkpoints_bytes: all that are kept. mttf in hours, of the job.
    write_seconds, write_bandwidth: what a checkpoint may take, and bytes a second that this needs; checkpoint_interval: seconds.
    """

    tokens: int
    steps: int
    days: float | None
    gpu_hours: float | None
    energy: float | None
    cost: float | None
    flops: float
    data_bytes: float
    checkpoint_bytes: float
    checkpoints_bytes: float
    mttf: float
    write_seconds: float
    write_bandwidth: float
    checkpoint_interval: float

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def budget(config: Config, vocab: int, step: Step | None, flops_per_token: float) -> Budget:
    """Of the whole run, `train.tokens` or `train.steps` long.

    Args:
        vocab: words that exist.
        step: None where the GPU is not known; then there are no days.
    """
    batch, plan, ranks = Batch.of(config), config.plan, config.launch.ranks
    tokens = config.train.tokens or batch.tokens
    days = hours = energy = cost = None
    if step is not None:
        days = tokens / step.tokens_per_second / plan.availability / 86400
        hours = 24 * days * ranks
        energy, cost = bill(config, hours)
    size = checkpoint_bytes(config, vocab)
    mttf = plan.mttf or plan.mttf_gpu / ranks
    seconds = SHARE**2 * mttf * 3600 / 2
    return Budget(
        tokens=tokens, steps=batch.steps, days=days, gpu_hours=hours, energy=energy, cost=cost, flops=flops_per_token * tokens,
        data_bytes=tokens * (plan.token_bytes + plan.text_bytes), checkpoint_bytes=size,
        checkpoints_bytes=size * max(config.checkpoint.keep, 1), mttf=mttf, write_seconds=seconds, write_bandwidth=size / seconds,
        checkpoint_interval=SHARE * mttf * 3600,
    )


def bill(config: Config, hours: float) -> tuple[float | None, float | None]:
    """Energy in kWh, of the site, and money for so many GPU-hours; None: the GPU's power is not known, there is no price."""
    plan, energy = config.plan, None
    if config.hardware.power is not None:
        energy = hours * config.hardware.power / 1000 * plan.draw * plan.server * plan.pue
    if plan.price is None and (plan.power_price is None or energy is None):
        return energy, None
    return energy, hours * (plan.price or 0.0) + (energy or 0.0) * (plan.power_price or 0.0)


def checkpoint_bytes(config: Config, vocab: int) -> float:
    """Weights in their dtype, main weights and two moments in fp32 (with fp32 weights, those are the main weights)."""
    size = BYTES[config.precision.dtype]
    padded = sizes.padded_vocabulary(vocab, config.model.vocab_multiple, config.parallel.tp)
    return sizes.parameters(config.model, padded) * float(size + (8 if size == 4 else 12))
