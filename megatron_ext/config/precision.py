"""Rules of precision and of the backends that serve it: the corners of FP8 that break, and attention that a backend cannot do. No torch.

They belong to the rules of `validate.py`, which says what a rule is.
"""
from collections.abc import Iterator

from megatron_ext.config import sizes
from megatron_ext.config.schema import Config
from megatron_ext.config.stages import PACKED
from megatron_ext.errors import UserError

FP8_RECIPES = ("delayed", "current", "blockwise", "mxfp8")


def fp8_fits(config: Config) -> Iterator[UserError]:
    """The corners in which FP8 is known to break or to be refused by the hardware."""
    model, parallel, precision, kind = config.model, config.parallel, config.precision, config.kernels.layers
    if precision.fp8 is None:
        if kind == "fp8":
            yield UserError("kernels.layers", "fp8", "needs precision.fp8: delayed, current or blockwise (precision=fp8_current)")
        return
    if precision.fp8 not in FP8_RECIPES:
        yield UserError("precision.fp8", precision.fp8, f"must be one of {', '.join(FP8_RECIPES)}, or null")
        return
    if kind in ("fused", "plain"):
        yield UserError("kernels.layers", kind, f"has no FP8; with precision.fp8={precision.fp8} it must be auto, te or fp8")
    if precision.fp8 == "mxfp8" and kind == "fp8":
        yield UserError("precision.fp8", "mxfp8", "comes from Transformer Engine alone: kernels.layers=te, on compute capability 10.0 and later")
    if precision.dtype == "fp16":
        yield UserError("precision.dtype", "fp16", "and FP8 scale gradients twice, and overflow; use bf16")
    if kind == "te" and precision.fp8 == "delayed":  # `auto` takes our layers then (models/layers.py)
        if parallel.pp > 1:
            yield UserError("precision.fp8", "delayed", "with kernels.layers=te reduces its largest values over all ranks at once, which pipeline stages "
                                                        "of different layers cannot; use current, or kernels.layers=fp8")
        if precision.fp8_edge_layers:
            yield UserError("precision.fp8_edge_layers", precision.fp8_edge_layers, "must be 0 with delayed scaling in Transformer Engine: leaving "
                                                                                    "its context between layers upsets the reduction")
    if 2 * precision.fp8_edge_layers >= model.num_layers:
        yield UserError("precision.fp8_edge_layers", precision.fp8_edge_layers, f"leaves none of the {model.num_layers} layers to FP8")
    step = 128 if precision.fp8 == "blockwise" else 32 if precision.fp8 == "mxfp8" else 16
    widths = {
        "hidden": model.hidden_size, "attention": sizes.head_dim(model) * model.num_attention_heads,
        "query, key and value": sizes.head_dim(model) * (model.num_attention_heads + 2 * sizes.query_groups(model)),
        "feed-forward": sizes.ffn_size(model),
    }
    for name, width in widths.items():
        share = width if name == "hidden" else width // parallel.tp
        if share % step:
            yield UserError("precision.fp8", precision.fp8, f"multiplies matrices in pieces of {step}; the {name} width of a rank is {share}")
    tokens = config.data.sequence_length * config.train.micro_batch_size // parallel.cp
    packed = config.stage.name in PACKED  # config/rlhf.py refuses te and auto there
    if kind in ("te", "auto") and tokens % step and not packed:  # auto is te where Transformer Engine is installed, which is not known here
        yield UserError("train.micro_batch_size", config.train.micro_batch_size, f"gives {tokens} tokens a micro-batch and rank; precision.fp8="
                                                                                f"{precision.fp8} in Transformer Engine needs a multiple of {step}; kernels.layers=fp8 pads")


def attention_serves(config: Config) -> Iterator[UserError]:
    backend = config.kernels.attention
    if backend in ("varlen", "flex") and not config.data.reset_attention:
        yield UserError("kernels.attention", backend, "serves packed documents alone: data.reset_attention=true, or another backend (auto)")
