"""The constants of the timing model. Four were fitted to published throughputs (`plan/fit.py`); the others are counts and measurements of others, and
are the same for every row.

A product of [m, k] and [k, n] takes 2 m n (k + depth) / (gemm P): the sum over k runs at the share `gemm` of the peak P, and what every result costs
beside it (filling the pipeline, the write) is worth `depth` terms of the sum.
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
        gemm, depth: see above. exposed: share of tensor-parallel communication that no product hides. network: share of the network's rate that a
            ring over nodes reaches. These four are fitted.
        attention_forward, attention_backward: share of the bf16 peak in flash attention (FlashAttention-3, arXiv 2407.08608, figures 5 and 6: causal,
            head 128, 4k to 8k tokens). memory: share of the memory's rate in elementwise kernels. nvlink: share of NVLink's rate (NCCL's tests on DGX
            H100). fp8: what FP8 products reach of their peak, over what bf16 products reach of theirs.
        logits: bytes a logit is read and written in an unfused cross-entropy, forward and backward; fused: in one that never stores them.
        latency: of one collective. launch: what a layer costs a CPU-bound step at least, forward or backward.
    """

    gemm: float
    depth: float
    exposed: float
    network: float
    attention_forward: float = 0.55
    attention_backward: float = 0.42
    memory: float = 0.80
    nvlink: float = 0.80
    fp8: float = 0.80
    logits: float = 40.0
    fused: float = 8.0
    latency: float = 15e-6
    launch: float = 150e-6


def load(path: str | None = None) -> Calibration:
    """The shipped constants, or those of a file of `plan calibrate`. Raises UserError."""
    file = SHIPPED if path is None else Path(path)
    try:
        return Calibration(**json.loads(file.read_text(encoding="utf-8"))["constants"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError("plan.calibration", str(file), f"is no calibration: {error}; `plan calibrate` writes one") from None


def as_dict(calibration: Calibration) -> dict[str, float]:
    return asdict(calibration)
