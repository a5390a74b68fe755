"""What encoders can do and cannot: the rules of `model.family`. No torch.

They belong to the rules of `validate.py`, which says what a rule is.
"""
from collections.abc import Iterator

from megatron_ext.config.schema import Config
from megatron_ext.config.stages import TEXT
from megatron_ext.errors import UserError


def family_has_its_keys(config: Config) -> Iterator[UserError]:
    model = config.model
    if model.family == "decoder":
        for key, shown in (("token_types", model.token_types), ("embedding_norm", "true" if model.embedding_norm else None)):
            if shown:
                yield UserError(f"model.{key}", shown, "belongs to encoders: needs model.family=encoder")


def family_fits_layout(config: Config) -> Iterator[UserError]:
    family, kernels = config.model.family, config.kernels
    if family == "decoder":
        return
    if config.parallel.cp > 1:
        yield UserError("parallel.cp", config.parallel.cp, f"cuts sequences for causal attention, and model.family={family} looks at all of a sequence: "
                                                           "must be 1; take parallel.tp with parallel.sp for long ones")
    if kernels.layers in ("te", "fp8"):
        yield UserError("kernels.layers", kernels.layers, f"must be auto, fused or plain with model.family={family}")
    if config.precision.fp8 is not None:
        yield UserError("precision.fp8", config.precision.fp8, f"is for decoders; with model.family={family} leave it out (precision=bf16)")


def family_fits_stage(config: Config) -> Iterator[UserError]:
    family, stage = config.model.family, config.stage.name
    if family == "decoder":
        return
    if stage not in TEXT:
        yield UserError("stage.name", stage, f"takes a model that writes from left to right, and model.family={family} does not: it can be pretrained "
                                             f"(stage={' or stage='.join(TEXT)})")
    if config.lora.rank:
        yield UserError("lora.rank", config.lora.rank, f"must be 0 with model.family={family}: adapters are for decoders")
    if config.data.mask_eod_loss:
        yield UserError("data.mask_eod_loss", "true", f"is about the next token, which model.family={family} does not learn: the end of a document is "
                                                      "never masked anyway")


def generates(config: Config, checkpoint: object) -> None:
    """Raises UserError where the model of a checkpoint cannot write."""
    if config.model.family != "decoder":
        raise UserError("checkpoint.load", checkpoint, f"holds a model of the family {config.model.family}: generate needs a decoder, which writes from left "
                                                       "to right; evaluate reads any")
