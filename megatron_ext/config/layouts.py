"""Whether a model's sizes agree, and whether it fits its layout: the rules of every engine, whatever it is for. No torch.

They belong to the rules of `validate.py`, which says what a rule is.
"""
import math
from collections.abc import Callable, Iterator

from megatron_ext.config import sizes
from megatron_ext.config.schema import Config
from megatron_ext.errors import UserError

Rule = Callable[[Config], Iterator[UserError]]


def divisors(number: int) -> str:
    """The divisors of `number` for a message: "1, 2, 4, 8"."""
    found = [i for i in range(1, number + 1) if number % i == 0]
    return ", ".join(map(str, found if len(found) <= 12 else [*found[:8], "...", found[-1]]))


# ---- the model ------------------------------------------------------------------------------------------------------------------

def heads_divide_hidden(config: Config) -> Iterator[UserError]:
    model = config.model
    if model.head_dim is None and model.hidden_size % model.num_attention_heads:
        yield UserError("model.num_attention_heads", model.num_attention_heads,
                        f"must divide model.hidden_size={model.hidden_size}, or model.head_dim must say how wide a head is")


def groups_divide_heads(config: Config) -> Iterator[UserError]:
    model = config.model
    if model.num_attention_heads % sizes.query_groups(model):
        yield UserError("model.num_query_groups", model.num_query_groups,
                        f"must divide model.num_attention_heads={model.num_attention_heads}: {divisors(model.num_attention_heads)}")


def rotary_is_even(config: Config) -> Iterator[UserError]:
    model = config.model
    if model.position_embedding != "rope":
        if model.rope_scaling_factor is not None:
            yield UserError("model.rope_scaling_factor", model.rope_scaling_factor,
                            f"scales rotary positions, but model.position_embedding={model.position_embedding}; set it to null")
        return
    width = sizes.head_dim(model) * model.rotary_percent
    if width != int(width) or int(width) % 2 or width < 2:
        yield UserError("model.rotary_percent", model.rotary_percent,
                        f"of a head of {sizes.head_dim(model)} is {width:g} dimensions; rotations need an even whole number")


def scaling_rises(config: Config) -> Iterator[UserError]:
    model = config.model
    if model.rope_scaling_factor is not None and model.rope_high_freq_factor <= model.rope_low_freq_factor:
        yield UserError("model.rope_high_freq_factor", model.rope_high_freq_factor,
                        f"must be greater than model.rope_low_freq_factor={model.rope_low_freq_factor:g}")


def offset_has_a_table(config: Config) -> Iterator[UserError]:
    model = config.model
    if model.position_offset and model.position_embedding != "learned":
        yield UserError("model.position_offset", model.position_offset, "counts rows of a table of positions: needs model.position_embedding=learned, or 0")


def proj_bias_comes_with_qkv(config: Config) -> Iterator[UserError]:
    model = config.model
    if model.proj_bias and not (model.bias or model.qkv_bias):
        yield UserError("model.proj_bias", "true", "comes with model.qkv_bias=true: megatron-core gives attention's projections biases together")


def layers_serve_block(config: Config) -> Iterator[UserError]:
    if config.kernels.layers == "te" and (config.model.block != "serial" or config.model.qk_norm):
        wrong = ("model.qk_norm", "true") if config.model.qk_norm else ("model.block", config.model.block)
        yield UserError(*wrong, "is not what the layers on Transformer Engine compute; kernels.layers=fused does (auto takes it without precision.fp8)")


# ---- the model in a layout -------------------------------------------------------------------------------------------------------

def ranks_fit(config: Config) -> Iterator[UserError]:
    parallel, ranks = config.parallel, config.launch.ranks
    model_ranks = parallel.tp * parallel.pp * parallel.cp
    if ranks % model_ranks:
        more = (ranks // model_ranks + 1) * model_ranks
        fewer = f"{more - model_ranks} or " if ranks > model_ranks else ""
        yield UserError("launch.ranks", ranks, f"must be a multiple of parallel.tp x pp x cp = {parallel.tp} x {parallel.pp} x {parallel.cp}"
                                               f" = {model_ranks}: {fewer}{more}")


def context_parallel_fits(config: Config) -> Iterator[UserError]:
    model, parallel, length = config.model, config.parallel, config.data.sequence_length
    if parallel.cp == 1:
        return
    if length % (2 * parallel.cp):
        yield UserError("data.sequence_length", length, f"must be a multiple of 2 x parallel.cp = {2 * parallel.cp}: each rank holds an early and a "
                                                        "late chunk of every sequence")
    if model.attention_dropout > 0:
        yield UserError("model.attention_dropout", model.attention_dropout, "must be 0 with parallel.cp greater than 1: ranks would drop different "
                                                                            "weights of the same row; model.hidden_dropout works")
    if config.kernels.layers == "plain" and config.data.reset_attention:
        yield UserError("kernels.layers", "plain", "keeps documents apart with a mask over whole sequences, which ranks with parallel.cp greater than 1 do "
                                                   "not hold; fused layers (auto) take documents")
    if parallel.cp_method == "ulysses" and not config.data.reset_attention:
        heads, groups = model.num_attention_heads // parallel.tp, max(1, sizes.query_groups(model) // parallel.tp)
        if heads % parallel.cp or (groups % parallel.cp and parallel.cp % groups):
            yield UserError("parallel.cp_method", "ulysses", f"shares the {heads} heads and {groups} key/value heads of a tensor-parallel rank out over "
                                                             f"parallel.cp={parallel.cp} ranks, which must divide them; ring has no such limit")


def tp_divides(config: Config) -> Iterator[UserError]:
    model, tp = config.model, config.parallel.tp
    sized = {"model.num_attention_heads": model.num_attention_heads, "feed-forward": sizes.ffn_size(model), "hidden": model.hidden_size}
    wrong = [f"{name}={size}" for name, size in sized.items() if size % tp]
    if wrong:
        yield UserError("parallel.tp", tp, f"must divide {', '.join(wrong)}; what divides all: {divisors(math.gcd(*sized.values()))}")
    groups = sizes.query_groups(model)
    if not wrong and groups % tp and tp % groups:  # a key/value head may be shared by ranks, not by some more and by some less
        yield UserError("parallel.tp", tp, f"must divide model.num_query_groups={groups}, or be a multiple of it")
    width = sizes.head_dim(model) * (model.num_attention_heads + 2 * groups)
    if not wrong and groups < tp and width % tp:
        yield UserError("parallel.tp", tp, f"must divide the {width} rows of queries, keys and values: {divisors(width)}")


def stages_divide_layers(config: Config) -> Iterator[UserError]:
    parallel, layers = config.parallel, sizes.layers(config.model)
    if parallel.vpp is not None and parallel.pp == 1:
        yield UserError("parallel.vpp", parallel.vpp, "interleaves pipeline stages: needs parallel.pp greater than 1, or null")
    elif parallel.vpp is not None and layers % (parallel.pp * parallel.vpp):
        both = f"makes {layers} layers of both stacks, which " if config.model.family == "encoder_decoder" else ""
        yield UserError("model.num_layers", config.model.num_layers, f"{both}must be a multiple of parallel.pp x vpp = {parallel.pp} x {parallel.vpp} = "
                                                    f"{parallel.pp * parallel.vpp}")
    elif layers % parallel.pp:
        named = "the layers of both stacks, " if config.model.family == "encoder_decoder" else "model.num_layers="
        yield UserError("parallel.pp", parallel.pp, f"must divide {named}{layers}: {divisors(layers)}")


def recompute_fits(config: Config) -> Iterator[UserError]:
    parallel = config.parallel
    chunk = sizes.layers(config.model) // (parallel.pp * (parallel.vpp or 1))
    if parallel.recompute == "full" and parallel.recompute_layers > max(chunk, 1):
        yield UserError("parallel.recompute_layers", parallel.recompute_layers, f"a pipeline chunk has only {chunk} layers")


MODEL: tuple[Rule, ...] = (heads_divide_hidden, groups_divide_heads, rotary_is_even, scaling_rises, offset_has_a_table, proj_bias_comes_with_qkv,
                            layers_serve_block)
LAYOUT: tuple[Rule, ...] = (ranks_fit, tp_divides, context_parallel_fits, stages_divide_layers, recompute_fits)
