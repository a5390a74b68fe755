"""What encoders and encoder-decoders can do and cannot: the rules of `model.family`. No torch.

They belong to the rules of `validate.py`, which says what a rule is.
"""
from collections.abc import Iterator
from dataclasses import fields

from megatron_ext.config import sizes
from megatron_ext.config.schema import Config, ModelConfig
from megatron_ext.config.spans import MULTIPLE, SENTINELS, spans_of
from megatron_ext.config.stages import TEXT
from megatron_ext.errors import UserError

POSITIONS = {"decoder": ("rope", "learned"), "encoder": ("rope", "learned"), "encoder_decoder": ("learned", "sinusoidal", "relative")}
# Keys that one family alone has.
OWN = {
    "token_types": "encoder", "embedding_norm": "encoder",
    **dict.fromkeys(("decoder_layers", "relative_buckets", "relative_distance", "attention_scale", "embedding_scale", "logit_scale"), "encoder_decoder"),
}
# What each family takes of the other keys: choices beside the default.
TAKES = {
    "encoder": {"position_offset": (), "embedding_size": ()},
    "encoder_decoder": {"position_offset": (), "embedding_size": (), "qkv_bias": (), "proj_bias": (), "mlp_bias": (), "qk_norm": (), "block": ("post_norm",)},
}
DEFAULTS = {spec.name: spec.default for spec in fields(ModelConfig)}


# ---- the model ---------------------------------------------------------------------------------------------------------------------

def family_has_its_keys(config: Config) -> Iterator[UserError]:
    model = config.model
    for key, family in OWN.items():
        value = getattr(model, key)
        if value != DEFAULTS[key] and model.family != family:
            yield UserError(f"model.{key}", str(value).lower(), f"needs model.family={family}; this one is {model.family}")
    for key, choices in TAKES.get(model.family, {}).items():
        value, right = getattr(model, key), (DEFAULTS[key], *choices)
        if value not in right:
            shown = ["null" if choice is None else str(choice).lower() for choice in right]
            yield UserError(f"model.{key}", str(value).lower(), f"must be {' or '.join(shown)} with model.family={model.family}")
    if model.position_embedding not in POSITIONS[model.family]:
        yield UserError("model.position_embedding", model.position_embedding, f"with model.family={model.family} it must be "
                                                                              f"{' or '.join(POSITIONS[model.family])}")
    if model.family != "encoder_decoder":
        return
    if sizes.query_groups(model) != model.num_attention_heads:
        yield UserError("model.num_query_groups", model.num_query_groups, "must be null with model.family=encoder_decoder: megatron-core's cross-attention "
                                                                          "has as many keys as queries")
    if model.position_embedding == "relative" and model.relative_buckets % 4:
        yield UserError("model.relative_buckets", model.relative_buckets, "must be a multiple of 4: half of them look ahead, half of those are near")
    elif model.position_embedding == "relative" and model.relative_distance <= model.relative_buckets // 2:
        yield UserError("model.relative_distance", model.relative_distance, f"must be above half of model.relative_buckets={model.relative_buckets}, which have "
                                                                            "a distance each")
    if model.position_embedding == "sinusoidal" and model.hidden_size % 2:
        yield UserError("model.hidden_size", model.hidden_size, "must be even with sinusoidal positions: a sine and a cosine each")


# ---- the model in a layout ---------------------------------------------------------------------------------------------------------

def family_fits_layout(config: Config) -> Iterator[UserError]:
    family, kernels = config.model.family, config.kernels
    if family == "decoder":
        return
    if config.parallel.cp > 1:
        yield UserError("parallel.cp", config.parallel.cp, f"cuts sequences for causal attention, and model.family={family} looks at all of a sequence: "
                                                           "must be 1; take parallel.tp with parallel.sp for long ones")
    kinds = ("auto", "fused", "plain") if family == "encoder" else ("auto", "fused")
    if kernels.layers not in kinds:
        yield UserError("kernels.layers", kernels.layers, f"must be {' or '.join(kinds)} with model.family={family}")
    if config.precision.fp8 is not None:
        yield UserError("precision.fp8", config.precision.fp8, f"is for decoders; with model.family={family} leave it out (precision=bf16)")


# ---- the data ----------------------------------------------------------------------------------------------------------------------

def family_fits_stage(config: Config) -> Iterator[UserError]:
    family, stage, data = config.model.family, config.stage.name, config.data
    if family == "decoder":
        return
    if stage not in TEXT:
        yield UserError("stage.name", stage, f"takes a model that writes from left to right, and model.family={family} does not: it can be pretrained "
                                             f"(stage={' or stage='.join(TEXT)})")
    if config.lora.rank:
        yield UserError("lora.rank", config.lora.rank, f"must be 0 with model.family={family}: adapters are for decoders")
    if data.mask_eod_loss:
        yield UserError("data.mask_eod_loss", "true", f"is about the next token, which model.family={family} does not learn from running text: leave it out")
    if family == "encoder_decoder":
        for key in ("reset_positions", "reset_attention"):
            if getattr(data, key):
                yield UserError(f"data.{key}", "true", "must be false with model.family=encoder_decoder: its spans lie in running text")


def spans_fit(config: Config) -> Iterator[UserError]:
    model, parallel, length = config.model, config.parallel, config.data.sequence_length
    if model.family != "encoder_decoder":
        return
    if length < 8:
        yield UserError("data.sequence_length", length, "must be at least 8 with model.family=encoder_decoder: text, a span, and the end")
        return
    spans = spans_of(length, config.data.masked_share, config.data.span_length)
    if spans.spans > SENTINELS:
        yield UserError("data.span_length", config.data.span_length, f"makes {spans.spans} spans of data.sequence_length={length} and data.masked_share="
                                                                     f"{config.data.masked_share:g}; there are {SENTINELS} sentinels: take longer or fewer spans")
    if parallel.sp and spans.decoder % parallel.tp:
        yield UserError("parallel.sp", "true", f"splits the decoder's {spans.decoder} tokens (padded to a multiple of {MULTIPLE}) over parallel.tp={parallel.tp} "
                                               "ranks, which must divide them: leave parallel.sp out")
    if model.position_embedding == "learned" and spans.decoder > model.max_sequence_length:
        yield UserError("data.masked_share", config.data.masked_share, f"makes the decoder say {spans.decoder} tokens, more than the "
                                                                       f"model.max_sequence_length={model.max_sequence_length} learned positions")


def generates(config: Config, checkpoint: object) -> None:
    """Raises UserError where the model of a checkpoint cannot write."""
    if config.model.family != "decoder":
        raise UserError("checkpoint.load", checkpoint, f"holds a model of the family {config.model.family}: generate needs a decoder, which writes from left "
                                                       "to right; evaluate reads any")
