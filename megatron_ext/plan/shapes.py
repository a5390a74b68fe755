"""The parameters that a rank holds, tensor by tensor, from the configuration alone: names, shapes and order are those of a real build. No torch.

With TP ranks a column-parallel matrix [out, in] is [out / TP, in], a row-parallel one [out, in / TP], the table of words [V / TP, e]; norms, position
tables and biases that are added after the sum over ranks are whole. Pipeline rank r holds chunk v of `vpp` as stage v PP + r. An encoder-decoder deals the
layers of both stacks to the stages as one list.
"""
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_ext.config import sizes
from megatron_ext.config.schema import Config, LoraConfig, ModelConfig


@dataclass(frozen=True)
class Tensor:
    """A parameter of this rank. alone: it has a bucket of its own (the table of words that the first and the last stage share)."""

    name: str
    shape: tuple[int, ...]
    alone: bool = False
    trained: bool = True

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Chunk:
    """A model chunk: whether it embeds (`first`), whether it holds the head (`last`), and its layers.

    encoded, decoded: of an encoder-decoder, the layers of each stack. ends: whether the last layer of the encoder, of the decoder (or only stack) is here.
    """

    stage: int
    layers: int
    first: bool
    last: bool
    encoded: int = 0
    decoded: int = 0
    ends: tuple[bool, bool] = (False, False)


def chunks(config: Config, pipeline_rank: int) -> tuple[Chunk, ...]:
    """The chunks of a pipeline rank: one, or `parallel.vpp`."""
    model, pp, vpp = config.model, config.parallel.pp, config.parallel.vpp or 1
    total, stages, found = sizes.layers(model), pp * vpp, []
    for v in range(vpp):
        stage = v * pp + pipeline_rank
        begin, end = total * stage // stages, total * (stage + 1) // stages
        one = Chunk(stage, end - begin, stage == 0, stage == stages - 1)
        if model.family == "encoder_decoder":
            first = model.num_layers
            encoded = max(0, min(end, first) - begin)
            one = replace(one, encoded=encoded, decoded=end - begin - encoded, ends=(encoded > 0 and begin + encoded == first, end == total and end > first))
        else:
            one = replace(one, decoded=end - begin, ends=(False, stage == stages - 1))
        found.append(one)
    return tuple(found)


def tensors(config: Config, chunk: Chunk, vocab: int, *, head: str = "vocabulary") -> list[Tensor]:
    """The parameters of a chunk in the order of `named_parameters()`.

    Args:
        vocab: words that exist.
        head: vocabulary | scalar (reward models and value functions).
    """
    model, tp = config.model, config.parallel.tp
    rows, hidden, embedded = sizes.padded_vocabulary(vocab, model.vocab_multiple, tp) // tp, model.hidden_size, sizes.embedding_size(model)
    tied = model.tied_embeddings and head == "vocabulary"
    apart = tied and config.parallel.pp > 1  # the first and the last stage each have a copy
    found = list(_embeddings(model, rows, apart)) if chunk.first else []
    for layer in range(chunk.encoded):
        found += _layer(model, tp, f"encoder.layers.{layer}.", config.lora)
    found += _norm(model, "encoder.final_layernorm", hidden) if chunk.ends[0] and model.block != "post_norm" else []
    for layer in range(chunk.decoded):
        found += _layer(model, tp, f"decoder.layers.{layer}.", config.lora, crosses=model.family == "encoder_decoder")
    found += _norm(model, "decoder.final_layernorm", hidden) if chunk.ends[1] and model.block != "post_norm" else []
    if chunk.last and head == "scalar":
        found += [Tensor("value_head.weight", (1, hidden)), Tensor("value_head.bias", (1,))]
    elif chunk.last:
        found += [Tensor("project_out.weight", (embedded, hidden))] if embedded != hidden else []
        found += [Tensor("output_layer.weight", (rows, embedded), alone=apart)] if not (tied and chunk.first) else []
        found += [Tensor("output_layer.bias", (rows,))] if model.head_bias else []
    if chunk.last and model.family == "encoder":
        found += [Tensor("transform.weight", (hidden, hidden)), Tensor("transform.bias", (hidden,)), *_norm(model, "transform.norm", hidden)]
    if chunk.first and model.position_embedding == "relative":
        shape = (model.num_attention_heads // tp, model.relative_buckets)
        found += [Tensor("encoder_positions.weight", shape), Tensor("decoder_positions.weight", shape)]
    if config.lora.rank:
        found = [replace(t, trained=t.name.endswith(("lora_a", "lora_b")) or t.name.startswith("value_head.")) for t in found]
    return found


def _embeddings(model: ModelConfig, rows: int, apart: bool) -> Iterator[Tensor]:
    hidden, embedded = model.hidden_size, sizes.embedding_size(model)
    yield Tensor("embedding.word_embeddings.weight", (rows, embedded), alone=apart)
    if embedded != hidden:
        yield Tensor("embedding.word_embeddings.project_in", (hidden, embedded))
    if model.position_embedding == "learned":
        yield Tensor("embedding.position_embeddings.weight", (sizes.position_rows(model), hidden))
    if model.token_types:
        yield Tensor("embedding.tokentype_embeddings.weight", (model.token_types, hidden))
    if model.embedding_norm:
        yield from _norm(model, "embedding.norm", hidden)


def _norm(model: ModelConfig, name: str, width: int) -> list[Tensor]:
    parts = ("weight", "bias") if model.norm == "layernorm" else ("weight",)
    return [Tensor(f"{name}.{part}", (width,)) for part in parts]


def _layer(model: ModelConfig, tp: int, prefix: str, lora: LoraConfig, *, crosses: bool = False) -> Iterator[Tensor]:
    hidden, ffn = model.hidden_size, sizes.ffn_size(model)
    width = sizes.head_dim(model) * model.num_attention_heads
    into_attention = width + 2 * sizes.head_dim(model) * sizes.query_groups(model)
    into_ffn = 2 * ffn if model.activation in sizes.GATED else ffn
    qkv_bias, proj_bias, mlp_bias = sizes.biases(model)

    def linear(name: str, out: int, width: int, column: bool, bias: bool) -> Iterator[Tensor]:
        shape = (out // tp, width) if column else (out, width // tp)
        yield Tensor(f"{name}.weight", shape)
        if bias:
            yield Tensor(f"{name}.bias", shape[:1])
        if lora.rank and name.rpartition(".")[2] in lora.targets:
            yield Tensor(f"{name}.lora_a", (lora.rank, shape[1]))
            yield Tensor(f"{name}.lora_b", (shape[0], lora.rank))

    yield from _norm(model, f"{prefix}input_layernorm", hidden)
    yield from linear(f"{prefix}self_attention.linear_proj", hidden, width, False, proj_bias)
    yield from linear(f"{prefix}self_attention.linear_qkv", into_attention, hidden, True, qkv_bias)
    if model.qk_norm:
        yield from _norm(model, f"{prefix}self_attention.q_layernorm", sizes.head_dim(model))
        yield from _norm(model, f"{prefix}self_attention.k_layernorm", sizes.head_dim(model))
    if crosses:
        yield from _norm(model, f"{prefix}pre_cross_attn_layernorm", hidden)
        yield from linear(f"{prefix}cross_attention.linear_proj", hidden, width, False, mlp_bias)
        yield from linear(f"{prefix}cross_attention.linear_q", width, hidden, True, mlp_bias)
        yield from linear(f"{prefix}cross_attention.linear_kv", 2 * width, hidden, True, mlp_bias)
    if model.block != "parallel_one_norm":
        yield from _norm(model, f"{prefix}pre_mlp_layernorm", hidden)
    yield from linear(f"{prefix}mlp.linear_fc1", into_ffn, hidden, True, mlp_bias)
    yield from linear(f"{prefix}mlp.linear_fc2", hidden, ffn, False, mlp_bias)
