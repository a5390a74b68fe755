"""The constants of the timing model. Two are fitted to published throughputs (`plan/fit.py`); the others are counts, or measurements of others, and were not
moved.

A product of [m, k] and [k, n] takes 2 m n (k + depth) / (gemm P): the sum over k runs at the share `gemm` of the peak P, and what every result costs beside
it (filling the machine's pipeline, the write, communication that a product hides only in part) is worth `depth` terms of the sum.
"""
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_ext.errors import UserError

SHIPPED = Path(__file__).with_name("calibration.json")


@dataclass(frozen=True)
class Calibration:
    """Shares are of the hardware's peak rates, times in seconds.

    Attributes:
        gemm, depth: fitted; see above. FP8 products reach the same share of their own peak.
        attention_forward, attention_backward: share of the bf16 peak in flash attention (FlashAttention-3, arXiv 2407.08608, figures 5 and 6: causal, heads of
            128, 4k to 8k tokens: 0.5 and 0.4 in cuDNN, little more in FlashAttention-3).
        memory: share of the memory's rate in elementwise kernels. nvlink, network: share of a link's rate that NCCL's rings reach (its tests on DGX H100).
        logits: bytes a logit is read and written in a cross-entropy that stores it, forward and backward; fused: in one that never does.
        latency: of one collective. launch: what a layer's pass costs at least, when a GPU waits for Python.
    """

    gemm: float
    depth: float
    attention_forward: float = 0.5
    attention_backward: float = 0.4
    memory: float = 0.8
    nvlink: float = 0.8
    network: float = 0.8
    logits: float = 40.0
    fused: float = 8.0
    latency: float = 15e-6
    launch: float = 150e-6


FITTED = ("gemm", "depth")


def load(path: str | None = None) -> Calibration:
    """The shipped constants, or those of a file of `plan calibrate`. Raises UserError."""
    file = SHIPPED if path is None else Path(path)
    try:
        return Calibration(**json.loads(file.read_text(encoding="utf-8"))["constants"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError("plan.calibration", str(file), f"is no calibration: {error}; `plan calibrate` writes one") from None


def as_dict(calibration: Calibration) -> dict[str, float]:
    return asdict(calibration)
